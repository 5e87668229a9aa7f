"""Text from a checkpoint."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

import train_gpt
from data import run_as_program
from tools import sample

ROOT = Path(__file__).resolve().parents[2]
WITH_WEIGHTS = [flag for flag in small.TINY if flag != "--no_weights"]


@pytest.fixture
def checkpoint(home):
    assert home.run("--save_every=3").code == 0
    return max(home.scratch.glob("*.pt"))


def text_of(capfd, *argv):
    capfd.readouterr()
    code = run_as_program(sample.main, list(map(str, argv)))
    out, err = capfd.readouterr()
    return code, out, err


def log_of(home):
    (path,) = home.scratch.glob("*.txt")
    return path.read_text()


def test_the_newest_checkpoint_writes_the_same_text_again(checkpoint, capfd):
    named = text_of(capfd, checkpoint, "--tokens", 20)
    newest = text_of(capfd, "--tokens", 20)
    assert named == newest and named[0] == 0 and str(checkpoint) in named[2]
    other_seed = text_of(capfd, checkpoint, "--tokens", 20, "--seed", 1)
    assert other_seed[1] != named[1]


def test_the_text_begins_with_the_prompt(checkpoint, capfd):
    code, out, _ = text_of(capfd, checkpoint, "--prompt", "naïve", "--tokens", 5)
    assert code == 0 and out.startswith("naïve")


def test_an_empty_prompt_is_a_document_from_its_beginning(checkpoint, capfd):
    code, out, _ = text_of(capfd, checkpoint, "--prompt", "", "--tokens", 5)
    assert code == 0 and out.strip()


@pytest.mark.parametrize("prompt", [" ", "\n", "\t \n ", " " * 3000])
def test_a_prompt_of_white_space_is_a_prompt(checkpoint, capfd, prompt):
    code, out, _ = text_of(capfd, checkpoint, "--prompt", prompt, "--tokens", 3)
    assert code == 0 and out.startswith(prompt)


def test_an_utf8_prompt_counts_also_where_the_console_is_ascii():
    """There Python makes a surrogate of each byte."""
    surrogates = "naïve".encode().decode("ascii", "surrogateescape")
    assert sample.encode(surrogates, 256) == list("naïve".encode())


def test_a_terminal_gets_no_commands(checkpoint, capfd, monkeypatch):
    evil = "\x1b]0;title\x07\x9b2J\r\u202e\x08"
    written = [256, *f"{evil}\n\tx".encode(), *evil.encode()]
    monkeypatch.setattr(sample, "generate", lambda *args: [written])
    named = checkpoint.rename(checkpoint.with_name(f"a{evil}\nb.pt"))
    code, out, err = text_of(capfd, named, "--prompt", f"{evil}\n\tx", "--tokens", 3)
    assert code == 0 and out.count("\n") == 2 and err.count("\n") == 1
    assert all(c.isprintable() for c in (out + err).replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("argv, named", [
    (["--prompt", "\udcff"], "--prompt"),
    (["--prompt", "\ud800"], "--prompt"),
    (["--temperature", "nan"], "--temperature"),
    (["--seed", str(2**80)], "--seed"),
    (["--temperature", "0"], "--temperature"),
    (["--tokens", "-3"], "--tokens"),
    (["--samples", "0"], "--samples"),
    (["no-such-file.pt"], "no-such-file.pt"),
])
def test_mistakes_are_one_line(checkpoint, capfd, argv, named):
    code, _, err = text_of(capfd, *argv)
    assert code == 2
    errors = [line for line in err.splitlines() if not line.startswith(str(checkpoint))]
    assert len(errors) == 1 and named in errors[0]


def test_without_a_checkpoint_it_is_one_line(home, capfd):
    code, _, err = text_of(capfd)
    assert code == 2
    assert len(err.splitlines()) == 1 and str(home.scratch) in err


def test_padding_changes_nothing(checkpoint, monkeypatch):
    """The mask is causal: what stands behind the last token of the context is not seen."""
    trained = sample.load_model(str(checkpoint))
    settings = dict(count=8, temperature=0.8, seed=0, samples=2)
    padded = sample.generate(trained, [256, *b"the text"], **settings)
    zeros = sample.F.pad
    monkeypatch.setattr(sample.F, "pad", lambda x, pad: zeros(x, pad, value=65))
    assert sample.generate(trained, [256, *b"the text"], **settings) == padded


def test_a_batch_of_samples_has_the_logits_of_each_text(checkpoint, capfd):
    """Each sampled token is nearly the most probable one at a low temperature, so all samples of a
    batch are the one that is sampled alone."""
    trained = sample.load_model(str(checkpoint))
    alone, *_ = sample.generate(trained, [256, *b"w"], 12, temperature=1e-5, seed=0, samples=1)
    batch = sample.generate(trained, [256, *b"w"], 12, temperature=1e-5, seed=1, samples=3)
    assert batch == [alone] * 3


def test_weights_of_a_finished_run_write_the_text_of_its_last_checkpoint(home, capfd):
    assert home.run("--save_every=3", flags_before=WITH_WEIGHTS).code == 0
    last = max(home.scratch.glob("*_step*.pt"))
    (weights,) = set(home.scratch.glob("*.pt")) - set(home.scratch.glob("*_step*.pt"))
    code, out, err = text_of(capfd, weights, "--tokens", 20)
    assert code == 0 and text_of(capfd, last, "--tokens", 20)[1] == out
    assert weights.stem in err and "step 6 " in err
    (loss,) = {line.split("val_loss:")[1].split()[0] for line in log_of(home).splitlines()
               if line.startswith("step:6/6 val_loss")}
    assert loss in err
    newest = text_of(capfd, "--tokens", 20)
    assert newest[:2] == (0, out) and str(weights) in newest[2]


def test_another_script_trains_and_samples(home, capfd, tmp_path):
    """Its file is refused by train_gpt.py, whose model could be another with the same shapes."""
    assert home.run(flags_before=WITH_WEIGHTS).code == 0
    (weights,) = home.scratch.glob("*.pt")
    saved = torch.load(weights, weights_only=True)
    script = ROOT / "records/scratch/sample-test.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(Path(train_gpt.__file__).read_text() + "# edited\n")
    saved["info"]["code_hash"] = sample.script_hash(script)
    torch.save(saved, weights)
    try:
        code, out, err = text_of(capfd, weights, "--tokens", 3)
        assert code == 2 and err.count("\n") == 1 and str(weights) in err
        code, out, err = text_of(capfd, weights, "--tokens", 3, "--script", script)
        assert code == 0 and out
        code, out, err = text_of(capfd, weights, "--tokens", 3, "--script", tmp_path / "none.py")
        assert code == 2 and "none.py" in err
    finally:
        script.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("setting, redirect, out, code", [
    ("PYTHONIOENCODING=ascii", "", b"na\\xefve", 0),
    ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "", b"na\\xefve", 0),
    ("", ">&-", b"", 0), ("", ">&- 2>&-", b"", 0), ("", ">/dev/full", b"", 2)])
def test_a_console_that_is_not_utf8_or_is_gone(checkpoint, setting, redirect, out, code):
    command = shlex.join([sys.executable, "-m", "tools.sample", str(checkpoint), "--prompt",
                          "naïve", "--tokens", "5"])
    done = subprocess.run(["bash", "-c", f"{setting} {command} {redirect}"], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.startswith(out)


@pytest.mark.parametrize("change", ["track", "layers"])
def test_a_checkpoint_of_an_edited_script_is_one_line(checkpoint, capfd, monkeypatch, change):
    """train_gpt.py does not have the track that the copy had, or has other layers."""
    if change == "track":
        saved = torch.load(checkpoint, weights_only=True)
        saved["hyperparameters"]["track"] = "mine"
        torch.save(saved, checkpoint)
    else:
        layers = train_gpt.LAYERS["laptop"]
        monkeypatch.setitem(train_gpt.LAYERS, "laptop", (*layers, layers[-1]))
    code, out, err = text_of(capfd, checkpoint, "--tokens", 3)
    assert code == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(checkpoint) in errors[0] and "Traceback" not in err

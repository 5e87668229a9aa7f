"""Text from a checkpoint."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
from data import run_as_program
from tools import sample

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(home):
    assert home.run("--save_every=3").code == 0
    return max(home.scratch.glob("*.pt"))


def text_of(capfd, *argv):
    capfd.readouterr()
    code = run_as_program(sample.main, list(map(str, argv)))
    out, err = capfd.readouterr()
    return code, out, err


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
    monkeypatch.setattr(sample, "generate", lambda model, tokens, *rest: [*tokens, *evil.encode()])
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
    (["no-such-file.pt"], "no-such-file.pt"),
])
def test_mistakes_are_one_line(checkpoint, capfd, argv, named):
    code, _, err = text_of(capfd, *argv)
    assert code == 2
    errors = [line for line in err.splitlines() if not line.startswith("checkpoint:")]
    assert len(errors) == 1 and named in errors[0]


def test_without_a_checkpoint_it_is_one_line(home, capfd):
    code, _, err = text_of(capfd)
    assert code == 2
    assert len(err.splitlines()) == 1 and str(home.scratch) in err


def test_padding_changes_nothing(checkpoint, monkeypatch):
    """The mask is causal: what stands behind the last token of the context is not seen."""
    model, step = sample.load_model(str(checkpoint))
    tokens = [256, *b"the text"]
    padded = sample.generate(model, tokens, count=8, temperature=0.8, seed=0, step=step)
    zeros = sample.F.pad
    monkeypatch.setattr(sample.F, "pad", lambda x, pad: zeros(x, pad, value=65))
    assert sample.generate(model, tokens, count=8, temperature=0.8, seed=0, step=step) == padded


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

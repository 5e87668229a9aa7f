"""The log of a run, its console, and what must leave no trace in it: the warm-up and the import."""
import dataclasses
import importlib.util
import io
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from conftest import metric_lines
from run_helpers import finish, log_text, logged_lines, no_warm_up, steps_of

import train_gpt
from train_gpt import Optimizer, Progress, Runtime, TokenStream

CPU = torch.device("cpu")
SOURCE = Path(train_gpt.__file__)
# How people search a log, which holds the script's source, for its metrics.
SEARCHES = ["val_loss:", "val_loss:[0-9.]+", "train_loss:", "train_time:", "step_avg:",
            "step:[0-9]+/", "tokens:[0-9]+"]
# What tools/compare reads of the environment.
KEYS = {"run_id", "command", "script", "code_hash", "git_commit", "git_dirty", "hyperparameters",
        "target", "stage_tokens", "data_fingerprint", "train_tokens", "activations", "compiled",
        "world_size", "device", "device_count", "threads", "torch", "cuda", "python", "platform"}


def test_log_is_source_environment_lines(home):
    """Each followed by a line of 100 '='. The environment holds a JSON object."""
    done = home.run("--seed=5", "--entry=candidates/2026-01-01_Test")
    assert done.code == 0, done.err
    (path,) = (home.root / "records/candidates/2026-01-01_Test").glob("*.txt")
    source, environment, _ = path.read_bytes().split(b"\n" + b"=" * 100 + b"\n")
    assert source + b"\n" == SOURCE.read_bytes()

    environment = environment.decode()
    facts = json.loads(environment[environment.index("\n{"):environment.rindex("}") + 1])
    assert facts.keys() >= KEYS
    assert facts["run_id"] == path.stem
    assert facts["hyperparameters"]["seed"] == 5
    assert facts["hyperparameters"]["track"] == "laptop"
    assert facts["torch"] == torch.__version__
    assert facts["world_size"] == 1
    assert facts["threads"] == torch.get_num_threads()
    assert facts["activations"] == "float32" and facts["compiled"] is False
    assert facts["stage_tokens"] == [2 * 256]  # tokens of a step in each stage
    assert facts["train_tokens"] == 2 * 3000


def test_stage_tokens_of_the_recipe(recipe_home, monkeypatch):
    no_warm_up(monkeypatch)
    monkeypatch.setattr(train_gpt, "training_step", lambda *args: torch.ones(()))
    monkeypatch.setattr(train_gpt, "validate", lambda *args: 1.0)
    done = recipe_home.run()
    assert done.code == 0, done.err
    environment = log_text(recipe_home).split(train_gpt.SEPARATOR + "\n")[1]
    facts = json.loads(environment[environment.index("\n{"):environment.rindex("}") + 1])
    assert facts["stage_tokens"] == [512 * n for n in (1, 2, 3, 3, 3)]
    tokens = [int(line.split(" tokens:")[1]) for line in logged_lines(recipe_home)
              if " train_loss:" in line]
    per_step = [512] * 4 + [1024] * 4 + [1536] * 6
    assert tokens == [sum(per_step[:step]) for step in range(1, 15)]


def test_metric_lines_have_the_format_of_modded_nanogpt_and_the_tokens(home):
    """Validations are those of --val_every and the last step, never at step 0."""
    done = home.run("--val_every=4")
    assert done.code == 0, done.err
    lines = [line for line in logged_lines(home) if line.startswith("step:")]
    for line in lines:
        match = re.fullmatch(
            r"step:(\d+)/6 (?:val|train)_loss:\d+\.\d{4} train_time:(\d+)ms "
            r"step_avg:(\d+\.\d\d)ms tokens:(\d+)", line)
        assert match, line
        step, train_ms, step_avg, tokens = map(float, match.groups())
        assert tokens == 512 * step
        assert step_avg * step == pytest.approx(train_ms, abs=1)
    assert steps_of(lines, "val_loss") == [4, 6]
    assert steps_of(lines, "train_loss") == [1, 2, 3, 4, 5, 6]


def test_log_every(home, monkeypatch):
    no_warm_up(monkeypatch)
    done = home.run("--log_every=4", "--val_every=1")
    assert steps_of(metric_lines(done.out), "train_loss") == [4]
    assert steps_of(metric_lines(done.out), "val_loss") == [1, 2, 3, 4, 5, 6]


def test_search_finds_only_metrics(home, monkeypatch):
    """Although the log holds the source."""
    no_warm_up(monkeypatch)
    assert home.run().code == 0
    lines = log_text(home).splitlines()
    metrics = [line for line in logged_lines(home) if line.startswith("step:")]
    assert metrics
    for pattern in SEARCHES:
        found = [line for line in lines if re.search(pattern, line)]
        assert found == [line for line in metrics if re.search(pattern, line)], pattern
        assert found, pattern


def test_file_and_console_agree(home):
    """Line by line; nothing is on stderr."""
    done = home.run("--save_every=3")
    assert done.code == 0
    assert done.err == ""
    assert done.out.splitlines() == logged_lines(home)


def test_equal_commands_print_equal_losses(home):
    first, second, other = home.run(), home.run(), home.run("--seed=1")
    assert first.code == 0
    assert metric_lines(first.out) == metric_lines(second.out)
    assert metric_lines(first.out) != metric_lines(other.out)
    assert len(list(home.scratch.glob("*.txt"))) == 3


class BrokenStream:
    """A console or a file that is gone."""
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("console", [">&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_console_that_is_closed_or_full_does_not_end_a_process(home, console):
    process = home.start(shell=console)
    _, err = finish(process)
    assert process.returncode == 0
    assert err == ""
    assert steps_of(logged_lines(home), "val_loss") == [3, 6]


def test_console_that_lacks_characters_shows_escapes(home, monkeypatch):
    no_warm_up(monkeypatch)
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(train_gpt, "device_name", lambda device: "Intel\N{REGISTERED SIGN} CPU")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        code = train_gpt.main(small.TINY)
    assert code == 0
    assert rb"Intel\xae CPU" in console.buffer.getvalue()
    assert "Intel\N{REGISTERED SIGN} CPU" in log_text(home)


def test_console_that_is_gone_does_not_end_the_run(home, monkeypatch):
    """As with `| head -1`."""
    no_warm_up(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", BrokenStream())
        code = train_gpt.main(small.TINY)
    assert code == 0
    assert steps_of(logged_lines(home), "val_loss") == [3, 6]


def test_log_that_cannot_grow_does_not_end_the_run(home, monkeypatch):
    no_warm_up(monkeypatch)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)  # a run may set it
    start_log = train_gpt.start_log

    def start_log_on_a_full_disk(*args):
        start_log(*args)
        for handler in train_gpt.log.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.stream.close()
                handler.stream = BrokenStream()

    monkeypatch.setattr(train_gpt, "start_log", start_log_on_a_full_disk)
    done = home.run()
    assert done.code == 0
    assert "Traceback" not in done.err
    assert steps_of(metric_lines(done.out), "val_loss") == [3, 6]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_shows_a_progress_bar_and_the_log_does_not(home, monkeypatch):
    no_warm_up(monkeypatch)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        code = train_gpt.main(small.TINY)
    assert code == 0
    assert "\r" in terminal.getvalue() and "/6" in terminal.getvalue()
    assert terminal.getvalue().split("\r")[-1].strip() == ""  # nothing of it is left
    assert "\r" not in "\n".join(logged_lines(home))


def test_validation_on_fewer_tokens_is_no_result(home, monkeypatch):
    """Each validation reads --val_tokens, and a target that its loss reaches does not count."""
    no_warm_up(monkeypatch)
    track = dataclasses.replace(train_gpt.TRACKS["laptop"], target=9.7531)
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", track)
    read = []
    sequence = TokenStream.sequence

    def noted_sequence(self, index, length):
        if "_val_" in str(self.paths[0]):
            read.append((index, length))
        return sequence(self, index, length)

    monkeypatch.setattr(TokenStream, "sequence", noted_sequence)
    done = home.run("--val_tokens=4096", "--save_every=3")
    assert done.code == 0, done.err
    assert read == [(0, 2048), (1, 2048)] * 2
    for path in home.scratch.glob("*.pt"):
        assert train_gpt.open_checkpoint(str(path))["progress"]["target_step"] is None
    warnings = [line for line in logged_lines(home) if "--val_tokens" in line]
    assert warnings and "4,096" in warnings[0] and "16,384" in warnings[0]


def test_repository_is_found_by_more_than_a_run_sh(tmp_path, monkeypatch):
    """A run.sh of the user's own, nearer to the script, is not the repository's."""
    script = tmp_path / "repository/records/mine/ideas/train_gpt.py"
    script.parent.mkdir(parents=True)
    (script.parents[1] / "run.sh").touch()
    monkeypatch.setattr(train_gpt, "__file__", str(script))
    assert train_gpt.find_root() == Path.cwd()
    (tmp_path / "repository/run.sh").touch()
    (tmp_path / "repository/data").mkdir()
    assert train_gpt.find_root() == tmp_path / "repository"


@pytest.mark.parametrize("place, expected", [("top", True), ("below", False), ("outside", False)])
def test_commit_is_that_of_this_repository_or_none(tmp_path, monkeypatch, place, expected):
    """A copy of the project inside another repository has not that repository's commit."""
    def git(*words):
        identity = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path / "top", check=True,
                       capture_output=True)

    for folder in ("top", "top/below", "outside"):
        (tmp_path / folder).mkdir()
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    root = {"top": "top", "below": "top/below", "outside": "outside"}[place]
    monkeypatch.setattr(train_gpt, "ROOT", tmp_path / root)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    commit, dirty = train_gpt.git_state()
    assert bool(commit) == expected
    assert not dirty
    (tmp_path / "top" / "new_file").touch()
    assert train_gpt.git_state() == (commit, expected)


def test_second_epoch_is_logged_once(home, monkeypatch):
    """10,240 tokens are read of a text of 6,000."""
    no_warm_up(monkeypatch)
    done = home.run("--num_steps=20", "--val_every=0")
    assert done.code == 0
    assert len([line for line in logged_lines(home) if "6,000" in line]) == 1


def test_target_is_reached_when_a_validation_first_reaches_it():
    progress = Progress()
    validations = [(10, 1.5, 100.0), (20, 1.0, 200.0), (30, 0.9, 300.0)]
    for progress.step, val_loss, progress.train_ms in validations:
        progress.note_target(val_loss, target=1.0)
    assert (progress.target_step, progress.target_ms) == (20, 200.0)


def test_target_is_logged(home, monkeypatch):
    """The step at which a validation reached it, before the end of the run."""
    no_warm_up(monkeypatch)
    track = dataclasses.replace(train_gpt.TRACKS["laptop"], target=9.7531)
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", track)
    assert home.run().code == 0
    (line,) = [line for line in logged_lines(home) if "9.7531" in line]  # no time looks so
    assert re.search(r"\b3\b", line)


@pytest.mark.parametrize("settings, model, comm_dtype", [
    ("hp", "tiny_model", torch.float32), ("recipe", "recipe_model", torch.float32),
    ("hp", "tiny_model", torch.bfloat16)])
def test_warm_up_leaves_nothing(request, tmp_path, monkeypatch, settings, model, comm_dtype):
    """Weights, optimizer and random state are what they were, bit for bit, although it trained."""
    hp = request.getfixturevalue(settings)
    model = request.getfixturevalue(model)
    small.write_corpus(tmp_path, train_tokens=10_000)
    small.install(train_gpt, tmp_path, monkeypatch, recipe=settings == "recipe")
    track = train_gpt.TRACKS["laptop"]
    stream = TokenStream(track.train_files, track, 1)
    optimizer = Optimizer(model, hp, comm_dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = [{name: value.clone() for name, value in bucket.state.items()}
              for bucket in optimizer.buckets]
    random_state = torch.get_rng_state()
    updated = set()

    def noted_update(direction, group, *args):
        updated.add(group.name)
        return train_gpt.compute_update(direction, group, *args)

    optimizer.update_fns = dict.fromkeys(optimizer.update_fns, noted_update)
    train_gpt.warm_up(model, optimizer, stream, hp, Runtime(0, 1, CPU))
    assert updated >= {"attention", "mlp_in", "head", "values", "ngrams"}
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name
        assert p.grad is None, name
    assert optimizer.num_updates == 0
    for bucket, state in zip(optimizer.buckets, states, strict=True):
        for name, value in bucket.state.items():
            assert torch.equal(value, state[name]), (bucket.group.name, name)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow
def test_profile_writes_a_trace_of_three_steps(home):
    done = home.run("--profile", "--num_steps=8", "--val_every=0")
    assert done.code == 0, done.err
    (path,) = home.scratch.glob("*.trace.json")
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert len([name for name in names if name.startswith("ProfilerStep")]) == 3
    assert any(name.startswith("aten::") for name in names)


def test_import_has_no_effects():
    """Another import of the script changes neither handlers, nor threads, nor the random state."""
    def state():
        return (logging.getLogger("train_gpt").handlers[:], logging.getLogger("train_gpt").level,
                logging.getLogger().handlers[:], signal.getsignal(signal.SIGINT),
                torch.get_num_threads(), torch.get_rng_state().tolist(),
                torch.get_default_dtype(), torch.is_grad_enabled())

    before = state()
    spec = importlib.util.spec_from_file_location("imported_again", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    assert module.main is not train_gpt.main
    assert state() == before

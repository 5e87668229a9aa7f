"""What several tests of whole runs need."""
import dataclasses
import subprocess
import threading
from pathlib import Path

import torch

import train_gpt

LIMIT = 600  # seconds; it only ends a process that hangs


def no_warm_up(monkeypatch) -> None:
    """Skip the warm-up, which takes half the time of a short run. test_log.py tests it."""
    monkeypatch.setattr(train_gpt, "warm_up", lambda *args: None)


def validate_less(monkeypatch) -> None:
    """Validate on 4,096 tokens: validations take most of the time of the recipe's short run."""
    track = dataclasses.replace(train_gpt.TRACKS["laptop"], val_tokens=4096)
    monkeypatch.setitem(train_gpt.TRACKS, "laptop", track)


def checkpoints(home) -> list[Path]:
    """All checkpoints, in the order of their names."""
    return sorted(home.scratch.glob("*.pt"))


def checkpoint(home, step: int) -> Path:
    """The only checkpoint of a step."""
    (path,) = home.scratch.glob(f"*_step{step:06d}.pt")
    return path


def log_text(home) -> str:
    """The text of the only log."""
    (path,) = home.scratch.glob("*.txt")
    return path.read_text()


def logged_lines(home) -> list[str]:
    """The lines of the only log, without the source and the environment."""
    return log_text(home).split(train_gpt.SEPARATOR + "\n")[-1].splitlines()


def steps_of(lines: list[str], name: str) -> list[int]:
    """The steps of the lines that have a metric, train_loss or val_loss."""
    return [int(line.split(":")[1].split("/")[0]) for line in lines if f" {name}:" in line]


def assert_one_line(done, *named) -> None:
    """The command ended by exit code 2 and one line on stderr, which holds all that is named."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    assert "Traceback" not in done.err
    for name in named:
        assert name in done.err, (name, done.err)


def assert_same_state(path: Path, expected: Path) -> None:
    """Two checkpoints hold the same weights and optimizer state, bit for bit."""
    found = torch.load(path, weights_only=True)
    expected = torch.load(expected, weights_only=True)
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    assert found["optimizer"]["num_updates"] == expected["optimizer"]["num_updates"]
    buckets = zip(found["optimizer"]["buckets"], expected["optimizer"]["buckets"], strict=True)
    for state, expected_state in buckets:
        assert state.keys() == expected_state.keys()
        for name, value in expected_state.items():
            assert torch.equal(state[name], value), name


def finish(process) -> tuple[str, str]:
    """(stdout, stderr) of a process that ends by itself. One that hangs is ended, which fails the
    test."""
    try:
        return process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def wait_for(process, text: str) -> None:
    """Read a process's stdout up to the line that holds the text."""
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if text in line:
                return
    finally:
        timer.cancel()
    raise AssertionError(f"the process printed no line with {text!r}: {process.stderr.read()}")

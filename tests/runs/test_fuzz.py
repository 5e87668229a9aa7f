"""Hostile flags, shards and checkpoints: each either works or ends with exit code 2 and one line.

A case that ends with another exception, a traceback, fails the test by itself.
"""
import dataclasses

import numpy as np
import pytest
import small
import torch
from run_helpers import assert_one_line, checkpoint, no_warm_up, validate_less

import train_gpt

pytestmark = pytest.mark.slow

SHORT = ["--num_steps=1", "--val_every=0"]
TRAIN = "data/laptop/laptop_train_000001.bin"
VAL = "data/laptop/laptop_val_000000.bin"
HEADER_BYTES = 1024


@pytest.fixture
def try_run(home, monkeypatch):
    """try_run(*flags) -> whether a short run worked; if not, its one line is checked."""
    no_warm_up(monkeypatch)
    validate_less(monkeypatch)
    monkeypatch.setattr(train_gpt, "output_of", lambda *command: "")  # git takes longer than a run

    def try_run(*flags):
        done = home.run(*SHORT, *flags)
        if done.code:
            assert_one_line(done)
        return done.code == 0

    try_run.home = home
    return try_run


NUMBERS = ["", "abc", "-1", "0x10", "nan", "1e400", "0", "3", "1.5"]
TEXTS = ["", "..", "/", "a\nb", "x" * 300, "ü", "*"]


@pytest.mark.parametrize("kind, values", [("number", NUMBERS), ("text", TEXTS)])
def test_flags(try_run, kind, values):
    worked = []
    for field in dataclasses.fields(train_gpt.Hyperparameters):
        if field.type is bool or (field.type is str) != (kind == "text"):
            continue
        for value in values:
            if try_run(f"--{field.name}={value}"):
                worked.append((field.name, value))
    if kind == "number":
        works_with_3 = [name for name, value in worked if value == "3"]
        assert len(works_with_3) > 10  # it was the value that mattered
        assert not [case for case in worked if case[1] in ("", "abc", "-1", "1e400")
                    and case[0] != "logit_shift"]


def header(index, value):
    """A change of one number of a shard's header."""
    def change(data):
        numbers = np.frombuffer(data[:HEADER_BYTES], "<u4").copy()
        numbers[index] = value
        return numbers.tobytes() + data[HEADER_BYTES:]
    return change


def token(position, value):
    """A change of one token of a shard."""
    def change(data):
        tokens = np.frombuffer(data[HEADER_BYTES:], "<u2").copy()
        tokens[position] = value
        return data[:HEADER_BYTES] + tokens.tobytes()
    return change


@pytest.mark.parametrize("name", [TRAIN, VAL])
def test_shards(try_run, name):
    path = try_run.home.root / name
    good = path.read_bytes()
    num_tokens = (len(good) - HEADER_BYTES) // 2
    bad = [good[:size] for size in (0, 1, 11, 1023, 1024, 1026, len(good) // 2, len(good) - 1)]
    bad += [good + b"\0", good + b"\0\0", b"Once upon a time " * 200]
    bad += [header(0, value)(good) for value in (0, 20240519, 2**32 - 1)]
    bad += [header(1, value)(good) for value in (0, 2, 7)]
    bad += [header(2, value)(good) for value in (0, 1, num_tokens - 1, num_tokens + 1, 2**31)]
    zeros = good[:HEADER_BYTES] + bytes(2 * num_tokens)
    fine = [good, zeros, header(3, 5)(good), token(3, 256)(good)]
    for data in fine:
        path.write_bytes(data)
        assert try_run()
    for data in bad:
        path.write_bytes(data)
        assert not try_run()
    for position in (0, num_tokens // 2, num_tokens - 1):
        for value in (257, 50_256, 65_535):
            path.write_bytes(token(position, value)(good))
            try_run()  # a short run does not read all tokens

    path.unlink()
    path.mkdir()
    assert not try_run()
    path.rmdir()
    path.symlink_to(path.with_name("nowhere"))
    assert not try_run()


def test_documents(recipe_home, monkeypatch):
    """The recipe cuts documents: all of one token, only one, one at the end of the text."""
    no_warm_up(monkeypatch)
    validate_less(monkeypatch)
    shards = sorted(recipe_home.root.glob("data/laptop/laptop_train_*.bin"))
    ones = np.ones(20_000, np.uint16)
    only_starts = np.full(20_000, 256, np.uint16)
    start_first, start_last = ones.copy(), ones.copy()
    start_first[0] = start_last[-1] = 256
    for tokens in (only_starts, start_first, start_last):
        for shard in shards:
            small.write_shard(shard, tokens)
        done = recipe_home.run("--val_every=0")
        assert done.code == 0, done.err


def test_checkpoints(try_run):
    home = try_run.home
    assert try_run("--save_every=1")
    path = checkpoint(home, 1)
    good = path.read_bytes()
    for size in (0, 1, 64, 1000, len(good) // 2, len(good) - 1000, len(good) - 1):
        path.write_bytes(good[:size])
        assert not try_run("--resume", path), size

    path.write_bytes(good)
    places = [("model",), ("model", "embed.weight"), ("optimizer",), ("optimizer", "buckets"),
              ("optimizer", "buckets", 0), ("optimizer", "num_updates"), ("progress",),
              ("hyperparameters",), ("hyperparameters", "num_steps"), ("hyperparameters", "track"),
              ("info",), ("info", "activations"), ("info", "run_id"), ("info", "code_hash")]
    for place in places:
        for value in ("text", None, [], {}, torch.zeros(3)):
            if isinstance(value, torch.Tensor) and place[0] in ("info", "hyperparameters"):
                continue
            state = torch.load(path, weights_only=True)
            inner = state
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            changed = path.with_name("changed.pt")
            torch.save(state, changed)
            try_run("--resume", changed)

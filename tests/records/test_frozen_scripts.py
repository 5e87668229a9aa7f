"""Each frozen script trains: its loss falls, and micro-batches change nothing."""
import dataclasses

import pytest
from frozen_entries import ADAMW, ENTRIES, MODERN, UNTIE, Sandbox

import train_gpt

pytestmark = pytest.mark.slow

TINY = ("--device=cpu --dtype=float32 --compile=off --num_steps=14 --batch_size=2 --micro_batch=2 "
        "--sequence_length=256 --num_heads=2 --model_dim=32 --val_every=3 --log_every=1").split()
# Flags that only some scripts have.
OPTIONAL = {"num_layers": 2, "ngram_rows": 1021, "ngrams": 3, "val_length": 2048,
            "sample_tokens": 0, "cooldown_steps": 3, "cooldown": 0.5, "window_end": 128}


def tiny(module) -> list[str]:
    """Return TINY and those of OPTIONAL that this script has."""
    fields = {field.name for field in dataclasses.fields(module.Hyperparameters)}
    return TINY + [f"--{name}={value}" for name, value in OPTIONAL.items() if name in fields]


@pytest.mark.parametrize("entry", ENTRIES)
def test_trains(entry, tmp_path, monkeypatch):
    sandbox = Sandbox(tmp_path, entry, monkeypatch)
    losses = sandbox.run(*tiny(sandbox.module))
    for kind in ("train", "val"):
        found = [loss for name, loss in losses if name == kind]
        assert len(found) >= 4
        assert found[-1] < found[0] - 0.1, kind


@pytest.mark.parametrize("port", [ADAMW, MODERN, UNTIE])
def test_micro_batches_change_nothing(port, tmp_path, monkeypatch):
    sandbox = Sandbox(tmp_path, f"published/{port}", monkeypatch)
    flags = tiny(sandbox.module)
    whole = sandbox.run(*flags)
    parts = sandbox.run(*flags, "--micro_batch=1")
    assert [loss for _, loss in whole] == pytest.approx([loss for _, loss in parts], abs=1e-3)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_mistake_ends_in_one_line(entry, tmp_path, monkeypatch, capsys):
    sandbox = Sandbox(tmp_path, entry, monkeypatch)
    for flag in ("--model_dim=33", "--moun=1", "--num_steps=0"):
        assert sandbox.module.main(["--track=laptop", "--device=cpu", flag]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert flag.split("=")[0] in error


@pytest.mark.parametrize("entry", ENTRIES)
def test_tracks_are_todays(entry, tmp_path, monkeypatch):
    """Data, vocabulary, validation tokens and target are equal, so results compare."""
    sandbox = Sandbox(tmp_path, entry, monkeypatch)
    monkeypatch.undo()  # the full track again
    names = {field.name for field in dataclasses.fields(train_gpt.Track)}
    for track in ("fineweb", "laptop"):
        theirs = sandbox.module.TRACKS[track]
        common = [field.name for field in dataclasses.fields(theirs)
                  if field.name in names and field.name != "get_data"]
        assert {"val_tokens", "vocab_size", "target"} <= set(common)
        for name in common:
            assert getattr(theirs, name) == getattr(train_gpt.TRACKS[track], name), name

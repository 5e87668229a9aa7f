"""What a finished run leaves: its weights, and the loss on a held-out slice."""
import re

import numpy as np
import pytest
import small
import torch
from run_helpers import assert_one_line, log_text, logged_lines, no_warm_up

import train_gpt
from tools import sample

WITH_WEIGHTS = [flag for flag in small.TINY if flag != "--no_weights"]


def run_with_weights(home, *flags):
    return home.run(*flags, flags_before=WITH_WEIGHTS)


def weights_of(home):
    """The files of weights; checkpoints have a step in their names."""
    return [path for path in home.scratch.glob("*.pt") if "_step" not in path.stem]


def held_out_losses(text):
    """The losses on the held-out slice that a log or console names, and the slice's tokens."""
    return re.findall(r"^held_out_loss:(\S+) .*?([\d,]+) tokens", text, re.MULTILINE)


def test_a_finished_run_leaves_its_weights_and_the_log_names_them(home, monkeypatch):
    no_warm_up(monkeypatch)
    assert run_with_weights(home).code == 0
    (path,) = weights_of(home)
    assert str(path) in logged_lines(home)[-1]
    saved = torch.load(path, weights_only=True)
    assert "optimizer" not in saved and saved["progress"]["step"] == 6


def test_a_run_that_does_not_want_weights_or_fails_leaves_none(home, monkeypatch):
    no_warm_up(monkeypatch)
    assert home.run().code == 0  # --no_weights
    original = train_gpt.training_step

    def step_to_nan(model, *rest):
        loss = original(model, *rest)
        model.head.linear.weight.data[0, 0, 0] = torch.nan
        return loss

    monkeypatch.setattr(train_gpt, "training_step", step_to_nan)
    done = run_with_weights(home, "--log_every=100", "--val_every=0")
    assert done.code == 2 and done.err.count("\n") == 1
    assert not list(home.scratch.glob("*.pt")) and not list(home.scratch.glob("*.tmp"))


def test_a_full_disk_is_a_warning(home, monkeypatch):
    no_warm_up(monkeypatch)

    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_gpt.torch, "save", save)
    done = run_with_weights(home)
    assert done.code == 0 and "No space left" in done.err and not weights_of(home)


def test_weights_are_not_resumed(home, monkeypatch):
    """Not when they are named, and `latest` passes over them."""
    no_warm_up(monkeypatch)
    assert run_with_weights(home, "--save_every=3").code == 0
    (path,) = weights_of(home)
    assert_one_line(home.run("--resume", path), path.name)
    (last,) = home.scratch.glob("*_step000006.pt")
    assert str(last) in home.run("--resume=latest").out
    last.unlink()
    assert str(next(home.scratch.glob("*_step000003.pt"))) in home.run("--resume=latest").out


def test_the_held_out_slice_follows_the_validation(home, monkeypatch):
    """Its loss is that of the saved weights on whole sequences behind the validation's tokens. No
    other loss changes, and a run that is resumed at its end names the same loss."""
    no_warm_up(monkeypatch)
    without = home.run()
    assert without.code == 0 and not held_out_losses(without.out)
    tokens = small.words(small.VAL_TOKENS + 3 * 2048 + 500, seed=1)
    small.write_shard(home.root / "data/laptop/laptop_val_000000.bin", tokens)
    for path in home.scratch.glob("*.txt"):
        path.unlink()
    done = run_with_weights(home, "--save_every=6")
    ((loss, num_tokens),) = held_out_losses(log_text(home))
    assert int(num_tokens.replace(",", "")) == 3 * 2048

    (path,) = weights_of(home)
    trained = sample.load_model(str(path))
    rest = torch.from_numpy(tokens[small.VAL_TOKENS:].astype(np.int64))
    expected = []
    with torch.no_grad():
        for start in range(0, 3 * 2048, 2048):
            text, targets = rest[start:start + 2048], rest[start + 1:start + 2049]
            logits = trained.model(text[None], None, trained.schedule)
            expected.append(train_gpt.F.cross_entropy(logits, targets).item())
    assert float(loss) == pytest.approx(np.mean(expected), abs=2e-4)
    assert re.findall(r"_loss:\S+ train", done.out) == re.findall(r"_loss:\S+ train", without.out)

    path.unlink()
    again = home.run("--resume", next(home.scratch.glob("*_step000006.pt")), flags_before=[])
    assert held_out_losses(again.out) == [(loss, num_tokens)]
    assert sample.load_model(str(path)).progress == trained.progress
    few = home.run("--val_tokens=2048")
    assert few.code == 0 and not held_out_losses(few.out)

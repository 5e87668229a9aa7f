"""A run that was interrupted continues as if nothing had happened, and a checkpoint is never half.

Signals are tested in test_signals.py, checkpoints of other scripts in test_errors.py.
"""
import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import small
import torch
from conftest import metric_lines
from run_helpers import (
    assert_one_line,
    assert_same_state,
    checkpoint,
    checkpoints,
    finish,
    logged_lines,
    no_warm_up,
    steps_of,
    validate_less,
)
from run_patches import write_half

import train_gpt

PATCHES = Path(__file__).with_name("run_patches.py")  # patches for processes


def test_run_of_all_stages_resumes_exactly(recipe_home, monkeypatch):
    """In mid-stage, before and after the untying: losses, weights and optimizer state are those of
    the run that was not interrupted, bit for bit. (test_signals.py resumes at the untying.)"""
    no_warm_up(monkeypatch)
    validate_less(monkeypatch)
    whole = recipe_home.run("--save_every=2")
    assert whole.code == 0, whole.err
    lines = metric_lines(whole.out)
    last = checkpoint(recipe_home, 14)
    last = last.rename(last.with_suffix(".whole"))
    untied = torch.load(checkpoint(recipe_home, 8), weights_only=True)["model"]
    assert torch.equal(untied["embed.weight"], untied["head.linear.weight"][0])  # untied at step 8

    for step in (6, 10):
        rest = recipe_home.run("--save_every=2", "--resume", checkpoint(recipe_home, step))
        assert rest.code == 0, rest.err
        found = metric_lines(rest.out)
        assert steps_of(found, "train_loss") == list(range(step + 1, 15))
        assert found == lines[-len(found):]
        assert_same_state(checkpoint(recipe_home, 14), last)
        checkpoint(recipe_home, 14).unlink()


def test_averages_of_the_weights_are_used_once(recipe_home, monkeypatch):
    """After the last step only, and not again when a run with a checkpoint of the final weights is
    resumed. They count as training time."""
    no_warm_up(monkeypatch)
    validate_less(monkeypatch)
    used = []
    models = []
    seconds = [0.0]
    use_averages = train_gpt.Optimizer.use_averages
    load_checkpoint = train_gpt.load_checkpoint

    def slow_use_averages(self):
        used.append((self.num_updates, self.num_averages))
        seconds[0] += 1000
        use_averages(self)

    def noted_load(model, *args):
        models.append(model)
        return load_checkpoint(model, *args)

    monkeypatch.setattr(train_gpt.Optimizer, "use_averages", slow_use_averages)
    monkeypatch.setattr(train_gpt.Runtime, "seconds", lambda self: seconds[0])
    monkeypatch.setattr(train_gpt, "load_checkpoint", noted_load)
    whole = recipe_home.run("--save_every=14")
    assert whole.code == 0, whole.err
    assert used == [(14, 3)]
    path = checkpoint(recipe_home, 14)
    saved = torch.load(path, weights_only=True)
    assert saved["progress"]["train_ms"] == 1_000_000

    again = recipe_home.run("--resume", path, flags_before=[])
    assert again.code == 0, again.err
    for name, value in models[-1].state_dict().items():
        assert torch.equal(value, saved["model"][name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_laptop_run_resumes_exactly(home, dtype):
    """With the warm-up, which comes before the checkpoint is loaded, in the first run's log. In
    bfloat16 with the exact values of the weights, from which the averages are made."""
    whole = home.run("--save_every=3", "--val_every=2", f"--dtype={dtype}", "--average_tail=1")
    assert whole.code == 0, whole.err
    last = checkpoint(home, 6)
    last = last.rename(last.with_suffix(".whole"))
    rest = home.run("--save_every=3", "--resume", checkpoint(home, 3), flags_before=[])
    assert rest.code == 0, rest.err
    found = metric_lines(rest.out)
    assert len(found) == 5  # three training losses, two validations
    assert found == metric_lines(whole.out)[-5:]
    assert_same_state(checkpoint(home, 6), last)
    assert metric_lines("\n".join(logged_lines(home))) == metric_lines(whole.out) + found


def test_time_goes_on_from_the_checkpoint(home, monkeypatch):
    """Times in the lines never decrease, and a resumed run does not begin at zero again."""
    no_warm_up(monkeypatch)

    def times(text):
        words = [word for line in text.splitlines() for word in line.split()]
        return [int(word[11:-2]) for word in words if word.startswith("train_time:")]

    whole = home.run("--save_every=3")
    saved = torch.load(checkpoint(home, 3), weights_only=True)["progress"]["train_ms"]
    rest = home.run("--resume", checkpoint(home, 3))
    assert times(whole.out) == sorted(times(whole.out))
    assert times(rest.out) == sorted(times(rest.out))
    assert times(rest.out)[0] >= round(saved)


# --- Which checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("names, track, newest", [
    # of one run the highest step, not the newest file (the last in this list is written last)
    (["laptop-20260101-000000-aaaaaa_step000010", "laptop-20260101-000000-aaaaaa_step000002"],
     "laptop", 0),
    # the run that was started last, whatever its step
    (["laptop-20260102-000000-aaaaaa_step000001", "laptop-20260101-235959-ffffff_step000900"],
     "laptop", 0),
    # no other track, even if its name begins alike
    (["laptop-20260101-000000-aaaaaa_step000001", "laptop-b-20260102-000000-aaaaaa_step000009",
      "fineweb-20260103-000000-aaaaaa_step000009"], "laptop", 0),
    (["laptop-b-20260101-000000-aaaaaa_step000001", "laptop-20260102-000000-aaaaaa_step000009"],
     "laptop-b", 0),
    # any track, if none is named
    (["fineweb-20260102-000000-aaaaaa_step000001", "laptop-20260101-000000-aaaaaa_step000009"],
     "", 0),
    # files with other names are none of ours
    (["best_step000009", "laptop_step000003", "model"], "laptop", None),
    ([], "", None)])
def test_latest_is_the_last_run_of_the_track(tmp_path, names, track, newest):
    paths = [tmp_path / f"{name}.pt" for name in names]
    for seconds, path in enumerate(paths):
        path.touch()
        os.utime(path, (seconds, seconds))
    expected = "" if newest is None else str(paths[newest])
    assert train_gpt.newest_checkpoint(tmp_path, track) == expected


def test_latest_resumes_the_highest_step_or_begins(home, monkeypatch):
    no_warm_up(monkeypatch)
    first = home.run("--resume=latest", "--save_every=2")
    assert first.code == 0, first.err
    assert steps_of(metric_lines(first.out), "train_loss") == [1, 2, 3, 4, 5, 6]
    checkpoint(home, 6).unlink()
    os.utime(checkpoint(home, 2))  # the newest file
    rest = home.run("--resume=latest", flags_before=[])
    assert rest.code == 0, rest.err
    assert steps_of(metric_lines(rest.out), "train_loss") == [5, 6]
    assert str(checkpoint(home, 4)) in rest.out


# --- With which settings --------------------------------------------------------------------------


def test_settings_come_from_the_checkpoint_and_flags_override(home, monkeypatch):
    no_warm_up(monkeypatch)
    flags = ["--seed=4", "--val_every=2", "--num_steps=8", "--save_every=4"]
    whole = home.run(*flags)
    assert whole.code == 0, whole.err
    path = str(checkpoint(home, 4))
    settings = train_gpt.parse_arguments(["--resume", path])
    given = train_gpt.parse_arguments([*small.TINY, *flags])
    assert settings == dataclasses.replace(given, resume=path)
    changed = train_gpt.parse_arguments(["--resume", path, "--val_every=1", "--seed=5"])
    assert changed == dataclasses.replace(settings, val_every=1, seed=5)

    rest = home.run("--resume", path, flags_before=[])
    assert rest.code == 0, rest.err
    found = metric_lines(rest.out)
    assert found == metric_lines(whole.out)[-len(found):]
    assert steps_of(found, "val_loss") == [6, 8]


def test_dtype_of_activations_comes_from_the_checkpoint(home, monkeypatch):
    """What --dtype auto was on the machine that saved it holds on a machine with bfloat16, too."""
    no_warm_up(monkeypatch)

    def set_bfloat16(supported):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    set_bfloat16(False)
    assert home.run("--dtype=auto", "--save_every=3").code == 0
    set_bfloat16(True)
    auto = train_gpt.parse_arguments([*small.TINY, "--dtype=auto"])
    assert train_gpt.activation_dtype(auto, torch.device("cpu")) == torch.bfloat16
    path = checkpoint(home, 3)
    resumed = train_gpt.parse_arguments(["--resume", str(path)])
    assert train_gpt.activation_dtype(resumed, torch.device("cpu")) == torch.float32


def test_checkpoint_of_a_script_with_other_settings(home, monkeypatch):
    """Settings that this script does not have are left out; those that the checkpoint does not have
    are the track's."""
    no_warm_up(monkeypatch)
    assert home.run("--save_every=6").code == 0
    path = checkpoint(home, 6)
    saved = torch.load(path, weights_only=True)
    saved["hyperparameters"] = {"track": "laptop", "seed": 7, "unknown": 1, "profile": True}
    torch.save(saved, path)
    found = train_gpt.parse_arguments(["--resume", str(path)])
    expected = train_gpt.parse_arguments(["--track=laptop", "--seed=7", "--dtype=float32"])
    assert found == dataclasses.replace(expected, resume=str(path))


def changes(done, *names) -> set[str]:
    """Which of the names a run's output has."""
    assert done.code == 0, done.err
    return {name for name in names if name in done.out}


def test_log_names_what_differs(home, monkeypatch, tmp_path):
    """A setting with both values, the script; nothing if nothing differs."""
    no_warm_up(monkeypatch)
    assert home.run("--save_every=3").code == 0
    path = checkpoint(home, 3)
    names = ["muon_lr", "code_hash", "seed", "activations", "compiled", "world_size"]
    assert changes(home.run("--resume", path, flags_before=[]), *names) == set()

    done = home.run("--resume", path, "--muon_lr=0.0213", flags_before=[])
    assert changes(done, *names) == {"muon_lr"}
    (line,) = [line for line in done.out.splitlines() if "muon_lr" in line]
    assert "0.035" in line and "0.0213" in line
    assert line in logged_lines(home)

    edited = tmp_path / "edited.py"
    edited.write_bytes(Path(train_gpt.__file__).read_bytes() + b"# an edit\n")
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "__file__", str(edited))
        done = home.run("--resume", path, flags_before=[])
    assert changes(done, *names) == {"code_hash"}


@pytest.mark.parametrize("change", ["other text", "one more shard", "a shorter last shard"])
def test_other_data_are_refused(home, monkeypatch, change):
    """The rest of the run would read another text, or the same in another order."""
    no_warm_up(monkeypatch)
    assert home.run("--save_every=3").code == 0
    path = checkpoint(home, 3)
    lines = logged_lines(home)
    number, size = {"other text": (1, 3000), "one more shard": (3, 500),
                    "a shorter last shard": (2, 2999)}[change]
    shard = home.root / f"data/laptop/laptop_train_{number:06d}.bin"
    small.write_shard(shard, small.words(size, seed=9 if number == 1 else 1 + number))
    assert_one_line(home.run("--resume", path, flags_before=[]), str(path), "data")
    assert logged_lines(home) == lines


def test_latest_is_of_the_seed_that_is_given(home, monkeypatch):
    """Runs of several seeds write into one folder; each resumes its own."""
    no_warm_up(monkeypatch)
    for seed in (3, 4):
        assert home.run(f"--seed={seed}", "--save_every=3").code == 0

    def seed_of_latest(*flags):
        hp = train_gpt.parse_arguments(["--resume=latest", *flags])
        return hp.seed, hp.resume != "latest"

    assert seed_of_latest("--seed=3") == (3, True)
    assert seed_of_latest("--seed=4") == (4, True)
    assert seed_of_latest("--seed=5") == (5, False)  # a new run
    assert seed_of_latest("--track=laptop")[1]


def test_longer_run_continues_and_a_shorter_one_is_a_mistake(home, monkeypatch):
    no_warm_up(monkeypatch)
    assert home.run("--save_every=6").code == 0
    path = checkpoint(home, 6)
    longer = home.run("--resume", path, "--num_steps=8")
    assert longer.code == 0, longer.err
    assert steps_of(metric_lines(longer.out), "train_loss") == [7, 8]
    assert_one_line(home.run("--resume", path, "--num_steps=5"), path.name, "--num_steps")


# --- A checkpoint is whole or absent --------------------------------------------------------------


def test_kill_in_a_save_leaves_the_checkpoint_before(home):
    whole = home.run("--save_every=2")
    assert whole.code == 0, whole.err
    last = checkpoint(home, 6)
    last = last.rename(home.root / "whole.pt")
    shutil.rmtree(home.scratch)

    process = home.start("--save_every=2", patch=f"{PATCHES}:kill_in_the_second_save")
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert checkpoints(home) == [checkpoint(home, 2)]
    rest = home.run("--resume=latest", flags_before=[])
    assert rest.code == 0, rest.err
    found = metric_lines(rest.out)
    assert steps_of(found, "train_loss") == [3, 4, 5, 6]
    assert found == metric_lines(whole.out)[-len(found):]
    assert_same_state(checkpoint(home, 6), last)


@pytest.mark.slow
def test_killed_twenty_times(home):
    """The losses and the final weights are those of an unharmed run; steps that were repeated gave
    the same numbers."""
    flags = ["--num_steps=200", "--save_every=1", "--val_every=16"]
    whole = home.run(*flags)
    assert whole.code == 0, whole.err
    last = checkpoint(home, 200).rename(home.root / "whole.pt")
    shutil.rmtree(home.scratch)
    process = home.start(*flags, "--resume=latest", patch=f"{PATCHES}:twenty_kills")
    _, err = finish(process)
    assert process.returncode == 0, err
    found = []
    for path in home.scratch.glob("*.txt"):
        found += metric_lines(path.read_text())
    assert set(found) == set(metric_lines(whole.out))
    assert_same_state(checkpoint(home, 200), last)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("disk full")])
def test_checkpoint_that_cannot_be_written_is_a_warning(home, monkeypatch, error):
    """The run goes on; the checkpoint before is untouched and nothing half is left."""
    no_warm_up(monkeypatch)
    saves = []

    def save(state, path):
        saves.append(path)
        if len(saves) == 2:
            write_half(state, path)
            raise error
        torch.serialization.save(state, path)

    monkeypatch.setattr(torch, "save", save)
    done = home.run("--save_every=2")
    assert done.code == 0
    assert done.err.count("\n") == 1 and "_step000004.pt" in done.err
    assert steps_of(metric_lines(done.out), "train_loss") == [1, 2, 3, 4, 5, 6]
    assert checkpoints(home) == [checkpoint(home, 2), checkpoint(home, 6)]
    assert not list(home.scratch.glob("*.tmp"))
    for path in checkpoints(home):
        train_gpt.open_checkpoint(str(path))

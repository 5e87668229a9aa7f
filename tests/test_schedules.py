"""Schedules and hyperparameters: the published formulas, the corners, the command line."""
from dataclasses import fields, replace

import pytest

from train_gpt import (
    PRESETS,
    TRACKS,
    Hyperparameters,
    UserError,
    check_hyperparameters,
    lr_scale,
    muon_momentum,
    parse_arguments,
    window_size,
)

RECORD = Hyperparameters()


def test_trapezoid_of_the_record():
    assert lr_scale(0, RECORD) == 1.0                      # no warmup
    assert lr_scale(1530 - 600, RECORD) == 1.0             # the corner itself
    assert lr_scale(1530 - 600 + 1, RECORD) == 599 / 600
    assert lr_scale(1529, RECORD) == 1 / 600               # the last step still learns
    assert all(lr_scale(s, RECORD) == 1.0 for s in range(930))


def test_trapezoid_warmup():
    hp = replace(RECORD, warmup_steps=256, num_steps=9536, cooldown_steps=2048)
    assert lr_scale(0, hp) == 1 / 256 and lr_scale(255, hp) == 1.0 == lr_scale(256, hp)
    area = sum(lr_scale(s, hp) for s in range(hp.num_steps))
    assert area == pytest.approx((9536 - 256 - 2048) + 256.5 * 256 / 256 / 2 * 1 + 2049 / 2, abs=1)


@pytest.mark.parametrize("step", [0, 1, 56, 57, 125, 765, 1529, 1530])
def test_window_of_the_record(step):
    exact = (step * (1792 - 64) + 64 * 1530) // 1530       # floor of the published formula in whole numbers
    assert window_size(step, RECORD) == 64 * (exact // 64)


def test_window_never_leaves_its_range():
    sizes = [window_size(s, RECORD) for s in range(1531)]
    assert sizes == sorted(sizes) and sizes[0] == 64 and sizes[-1] == 1792 and all(w % 64 == 0 for w in sizes)


def test_momentum_warmup():
    assert muon_momentum(0, RECORD) == 0.85
    assert muon_momentum(150, RECORD) == pytest.approx(0.90)
    assert muon_momentum(300, RECORD) == muon_momentum(1529, RECORD) == 0.95
    assert muon_momentum(0, replace(RECORD, momentum_warmup_steps=0)) == 0.95


def test_defaults_are_the_record():
    for name, value in dict(num_steps=1530, cooldown_steps=600, batch_size=8, sequence_length=65536, num_layers=12,
                            num_heads=6, model_dim=768, embed_lr=0.6, head_lr=0.008, scalar_lr=0.04, muon_lr=0.05,
                            adam_beta1=0.8, adam_beta2=0.95, logit_cap=30.0, val_every=125).items():
        assert getattr(parse_arguments(["--track", "fineweb"]), name) == value
    assert (TRACKS["fineweb"].val_tokens, TRACKS["fineweb"].target) == (10_485_760, 3.28)


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name} " in text and f.metadata["help"] for f in fields(Hyperparameters))


def test_flags_beat_the_preset_and_the_preset_beats_the_default():
    hp = parse_arguments(["--track", "laptop", "--num_steps", "7"])
    assert hp.num_steps == 7 and hp.model_dim == PRESETS["laptop"]["model_dim"] and hp.adam_beta2 == RECORD.adam_beta2


@pytest.mark.parametrize("words", [["--frobnicate"], ["--num_steps"], ["--num_steps", "many"], ["--track", "moon"],
                                   ["--dtype", "float8"], ["--num_step", "3"]])
def test_bad_flags_are_refused(words):
    with pytest.raises(UserError):
        parse_arguments(words)


@pytest.mark.parametrize("change, named", [
    (dict(batch_size=8), "--batch_size 9"), (dict(sequence_length=100), "--sequence_length"),
    (dict(sequence_length=384), "powers of two"), (dict(num_heads=5), "--num_heads"),
    (dict(num_steps=101), "use --cooldown_steps 50 --warmup_steps 0"),
    (dict(num_steps=101, warmup_steps=90), "use --cooldown_steps 50 --warmup_steps 50"),
    (dict(num_steps=0), "--num_steps"), (dict(window_end=32), "--window_end"), (dict(val_every=-1), "--val_every")])
def test_bad_hyperparameters_name_the_flag_to_change(change, named):
    with pytest.raises(UserError, match=named):
        check_hyperparameters(replace(Hyperparameters(batch_size=9), **change), world_size=3)


@pytest.mark.parametrize("track", TRACKS)
def test_presets_can_run_on_their_usual_ranks(track):
    for world_size in (1, 2):
        check_hyperparameters(parse_arguments(["--track", track]), world_size)

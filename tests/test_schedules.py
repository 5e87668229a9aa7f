"""Schedules and hyperparameters: the published formulas, the corners, the command line."""
import math
import re
from dataclasses import fields, replace
from fractions import Fraction

import pytest
import slow_model
import torch

import train_gpt
from tests.simulate.stages import by_tables
from train_gpt import (
    PRESETS,
    STAGES,
    TRACKS,
    Hyperparameters,
    Schedule,
    UserError,
    check_hyperparameters,
    lr_scale,
    muon_momentum,
    parse_arguments,
    rotary_at,
    sequences_before,
    short_window,
    stage_ends,
    stage_index,
    tokens_before,
)

CPU = torch.device("cpu")
RECORD = Hyperparameters()
# 1,365 scheduled steps: thirds end at 455 and 910, the sampled softmax at 1,297 (1,296.75, rounded); then 40 more
BEGINS = (0, 455, 910, 1297, 1365)


def test_stages_of_the_record():
    assert stage_ends(RECORD) == [455, 910, 1297, 1365, 1405]
    for stage, begin in enumerate(BEGINS):
        assert stage_index(begin, RECORD) == stage and (begin == 0 or stage_index(begin - 1, RECORD) == stage - 1)
    assert stage_index(1404, RECORD) == stage_index(1405, RECORD) == 4


def test_batches_of_the_record_token_by_token():
    """8, 16 and 24 sequences of 16,384 tokens in thirds of the run, and 24 in its extension: 373.6 M tokens."""
    sequences = 0
    for step in range(1405):
        assert (sequences_before(step, RECORD), tokens_before(step, RECORD)) == (sequences, 16_384 * sequences)
        sequences += 8 if step < 455 else 16 if step < 910 else 24
    assert sequences_before(1405, RECORD) == sequences
    assert tokens_before(1405, RECORD) == 16_384 * (8 * 455 + 16 * 455 + 24 * 495) == pytest.approx(373.6e6, abs=5e4)
    assert [tokens_before(b + 1, RECORD) - tokens_before(b, RECORD) for b in BEGINS] == [131_072, 262_144, *[393_216] * 3]


def test_words_of_the_softmax():
    """Published (2026-08-31): 10,240 at first, 14,336 after 57 % of the run, 24,576 after 80 %, all after 92 %. Here the
    next number holds from each change of the batch on, so never fewer, but for one step."""
    words = [Schedule(step, RECORD, CPU).words for step in range(1406)]
    assert words == [10_240] * 455 + [14_336] * 455 + [24_576] * 387 + [0] * 109
    for step, mine in enumerate(words[:-1]):
        share = step / 1405
        published = 10_240 if share < 681 / 1194 else 14_336 if share < 961 / 1194 else 24_576
        assert (mine or 50_304) >= (published if share < 1101 / 1194 + 0.002 else 50_304)
    assert not any(stage.words for stage in STAGES["laptop"])


@pytest.mark.parametrize("num_steps, extension_steps", [(1, 0), (2, 1), (3, 0), (14, 2), (100, 99), (1000, 0)])
def test_batches_of_short_runs(num_steps, extension_steps):
    """Whatever the length, each step has its stage's batch, and the sum is what is read before the next."""
    hp, sequences = replace(RECORD, num_steps=num_steps, extension_steps=extension_steps), 0
    for step in range(num_steps):
        share = Fraction(step, num_steps - extension_steps)
        stage = stage_index(step, hp)
        assert sequences_before(step, hp) == sequences
        sequences += STAGES["fineweb"][stage].batch * 8
        if step < num_steps - extension_steps:  # the stage of its share; where a border is broken, the nearest step's
            begin, end = [0, Fraction(1, 3), Fraction(2, 3), Fraction(95, 100), 1][stage:stage + 2]
            slack = Fraction(1, 2 * (num_steps - extension_steps))
            assert begin - slack <= share <= end + slack
        else:
            assert stage == 4
    assert sequences_before(num_steps, hp) == sequences


@pytest.mark.parametrize("step, wanted", [
    (0, 1.0),                                                # no warmup
    (454, 1.0), (455, 1.52),                                 # the second stage
    (546, 1.52),                                             # the corner: 0.6 of the schedule is left
    (547, 1.52 * 818 / 819 + 0.15 * 1 / 819),
    (909, 1.52 * 456 / 819 + 0.15 * 363 / 819),
    (910, 1.73 * 455 / 819 + 0.15 * 364 / 819),              # the third
    (955, 1.73 * 410 / 819 + 0.15 * 409 / 819),              # half way down
    (1297, 1.73 * 68 / 819 + 0.15 * 751 / 819),              # the fourth changes the softmax alone
    (1364, 1.73 * 1 / 819 + 0.15 * 818 / 819),
    (1365, 0.15), (1404, 0.15), (1405, 0.15)])               # the extension is flat
def test_rates_of_the_record(step, wanted):
    assert lr_scale(step, RECORD) == pytest.approx(wanted, rel=1e-12)


def test_rate_factors_are_powers_of_the_batch():
    first, second, third, *last = (stage.lr for stage in STAGES["fineweb"])
    assert first == 1 and second == pytest.approx(2 ** 0.6, abs=0.005) and third == pytest.approx(3 ** 0.5, abs=0.005)
    assert last == [third, third]


def test_rates_of_one_stage():
    """The laptop track's: flat, then linearly down to the floor."""
    hp = replace(parse_arguments(["--track=laptop"]), num_steps=100, cooldown=0.25, lr_floor=0.1)
    assert [lr_scale(s, hp) for s in (0, 75)] == [1.0, 1.0]
    assert lr_scale(76, hp) == pytest.approx(0.96 + 0.04 * 0.1) and lr_scale(100, hp) == pytest.approx(0.1)
    assert lr_scale(99, replace(hp, lr_floor=0.0)) == pytest.approx(1 / 25)  # the last step still learns


@pytest.mark.parametrize("step, wanted", [
    (0, 0.85), (150, 0.90), (300, 0.95), (700, 0.95), (1355, 0.95), (1380, 0.90), (1404, 0.852), (1405, 0.85)])
def test_momentum_rises_over_300_steps_and_falls_over_the_last_50(step, wanted):
    assert muon_momentum(step, RECORD) == pytest.approx(wanted, abs=1e-12)


def test_momentum_without_a_rise_or_a_fall():
    hp = replace(RECORD, momentum_warmup_steps=0, momentum_cooldown_steps=0)
    assert {muon_momentum(s, hp) for s in (0, 1, 1404, 1405)} == {0.95}


# ---------------------------------------------------------------------------------------------------------------------
# Windows and positions

@pytest.mark.parametrize("stage, long, short", [(0, 3, 1), (1, 7, 3), (2, 11, 5), (3, 11, 5), (4, 13, 6)])
def test_windows_of_the_record_in_blocks_of_128(stage, long, short):
    """In the stages; in the last validation 20 blocks in long layers, 6 in the others."""
    windows = {kind: tokens.item() for kind, tokens in Schedule(BEGINS[stage], RECORD, CPU).windows.items()}
    assert windows == {"long": 128 * long, "short": 128 * short, "paired": 128 * short}
    by_layer = [128 * (long if layer in (3, 10) else short) for layer in range(11) if layer != 6]
    assert [windows[layer.attention] for layer in RECORD.layers if layer.attention] == by_layer
    assert [size for size in by_tables(train_gpt, BEGINS[stage], RECORD) if size] == by_layer
    last = {kind: tokens.item() for kind, tokens in Schedule(1405, RECORD, CPU).windows.items()}
    assert last == {"long": 128 * 20, "short": 128 * 6, "paired": 128 * 6}


def test_short_windows_are_whole_blocks_or_the_window():
    assert [short_window(w) for w in (1, 100, 128, 200, 256, 384, 511, 512, 2560)] == [
        1, 100, 128, 128, 128, 128, 128, 256, 1280]


@pytest.mark.parametrize("stage, factor", [(0, 0.1), (1, 0.1170), (2, 0.1275), (3, 0.1275), (4, 0.1318)])
def test_yarn_at_each_stage(stage, factor):
    """The published factors of the scores at 3, 7, 11, 13 blocks, and each angle by the formula, in float64."""
    theta, scale = slow_model.yarn([384, 896, 1408, 1408, 1664][:stage + 1], 32)
    frequencies, ours = rotary_at(stage, RECORD)
    assert ours == pytest.approx(scale, rel=1e-9) == pytest.approx(factor, abs=6e-5) and frequencies.shape == (32,)
    torch.testing.assert_close(frequencies.double(), theta.double(), rtol=2e-6, atol=0)
    schedule = Schedule(BEGINS[stage], RECORD, CPU)
    assert torch.equal(schedule.frequencies, frequencies)
    assert schedule.attention_scale.item() == pytest.approx(ours, rel=1e-6)


def test_yarn_keeps_what_turns_often_and_slows_what_does_not():
    """More than 32 turns in the old window: as before; less than one: slowed as the window grows."""
    before, after = (rotary_at(stage, RECORD)[0] for stage in (0, 1))
    turns = 384 * before / (2 * math.pi)
    torch.testing.assert_close(after[turns > 32], before[turns > 32])
    torch.testing.assert_close(after[turns < 1], before[turns < 1] * 384 / 896)
    assert (turns > 32).any() and (turns < 1).any() and ((after <= before) & (after >= before * 384 / 896 - 1e-9)).all()


def test_the_last_validation_has_the_last_stages_positions():
    """A wider window without YaRN: record 2025-09-21."""
    last, stage = Schedule(1405, RECORD, CPU), Schedule(1404, RECORD, CPU)
    assert torch.equal(last.frequencies, stage.frequencies)
    assert last.attention_scale.item() == stage.attention_scale.item() == pytest.approx(0.1318, abs=5e-5)


@pytest.mark.parametrize("step, weights", [
    (0, (1, 0.5, 0.25)), (161, (1, 0.5, 0.25 * 294 / 455)), (454, (1, 0.5, 0.25 / 455)),
    (455, (1, 0.5)), (682, (1, 0.5 * 228 / 455)), (909, (1, 0.5 / 455)), (910, (1,)), (1365, (1,)), (1405, (1,))])
def test_weights_of_the_next_tokens(step, weights):
    torch.testing.assert_close(Schedule(step, RECORD, CPU).target_weights, torch.tensor(weights, dtype=torch.float32))


def test_tied_for_two_thirds_and_untied_once():
    schedules = [Schedule(step, RECORD, CPU) for step in range(1406)]
    assert [s.tied for s in schedules] == [True] * 910 + [False] * 496
    assert [s.step for s in schedules if s.unties] == [910]
    laptop = parse_arguments(["--track=laptop"])
    assert not any(Schedule(step, laptop, CPU).unties for step in range(391))


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def test_defaults_are_the_record():
    hp = parse_arguments(["--track", "fineweb"])
    for name, value in dict(num_steps=1405, extension_steps=40, batch_size=8, sequence_length=16_384, num_heads=6,
                            model_dim=768, ngrams=2, ngram_rows=251_520, head_lr=0.008, value_lr=0.6, ngram_lr=0.6,
                            ngram_rule="adam", scalar_lr=0.04, muon_lr=0.023, muon_decay=1.2, muon_beta2=0.9,
                            adam_every=2, adam_decay=0.005, logit_cap=23.0, logit_shift=5.0, logit_scale=7.5,
                            attention_scale=0.1, final_window=2560, cooldown=0.6, lr_floor=0.15,
                            val_every=125).items():
        assert getattr(hp, name) == value, name
    assert [stage.document for stage in hp.stages] == [896, *[2048] * 4]
    assert (TRACKS["fineweb"].val_tokens, TRACKS["fineweb"].target) == (10_485_760, 3.28)


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name} " in text and f.metadata["help"] for f in fields(Hyperparameters))


def test_flags_beat_the_preset_and_the_preset_beats_the_default():
    hp = parse_arguments(["--track", "laptop", "--num_steps", "7"])
    assert hp.num_steps == 7 and hp.model_dim == PRESETS["laptop"]["model_dim"] and hp.scalar_lr == RECORD.scalar_lr


@pytest.mark.parametrize("words", [["--frobnicate"], ["--num_steps"], ["--num_steps", "many"], ["--track", "moon"],
                                   ["--dtype", "float8"], ["--num_step", "3"]])
def test_bad_flags_are_refused(words):
    with pytest.raises(UserError):
        parse_arguments(words)


@pytest.mark.parametrize("change, named", [
    (dict(batch_size=8), "--batch_size 9"), (dict(sequence_length=200), "--sequence_length 200"),
    (dict(val_length=384), "use a power of two"), (dict(num_heads=5), "--num_heads 5"),
    (dict(num_heads=128), "--num_heads 128"),  # heads of 6 dimensions have no quarter
    (dict(num_steps=40), "use --extension_steps 1"), (dict(extension_steps=1405), "use --extension_steps 35"),
    (dict(num_steps=0), "--num_steps"), (dict(cooldown=0.0), "--cooldown"), (dict(val_every=-1), "--val_every"),
    (dict(adam_every=0), "--adam_every"), (dict(muon_beta2=math.nan), "--muon_beta2")])
def test_bad_hyperparameters_name_the_flag_to_change(change, named):
    with pytest.raises(UserError, match=named):
        check_hyperparameters(replace(Hyperparameters(batch_size=9), **change), world_size=3)


@pytest.mark.parametrize("val_tokens, length", [(5000, 2048), (65_537, 2048), (10**6, 384), (100, 2048)])
def test_val_tokens_that_do_not_divide_name_the_nearest_that_do(monkeypatch, val_tokens, length):
    def check(tokens):
        monkeypatch.setitem(TRACKS, "laptop", replace(TRACKS["laptop"], val_tokens=tokens))
        check_hyperparameters(parse_arguments(["--track=laptop", f"--val_length={length}"]), 1)
    with pytest.raises(UserError) as error:
        check(val_tokens)
    nearest = int(re.search(r"val_tokens ([\d,]+)", str(error.value))[1].replace(",", ""))
    assert abs(nearest - val_tokens) < length and nearest <= max(val_tokens, length)  # so many the data have
    check(nearest)


@pytest.mark.parametrize("wrong, meant", [("--moun_lr=1", "--muon_lr"), ("--num_step", "--num_steps"),
                                          ("--batch-size", "--batch_size")])
def test_a_mistyped_flag_names_the_one_that_was_meant(wrong, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}\?"):
        parse_arguments([wrong, "3"])
    for other in (["--frobnicate"], ["--num_steps=x"], ["--track=moon"]):
        with pytest.raises(UserError) as error:
            parse_arguments(other)
        assert "did you mean" not in str(error.value)


def test_help_begins_with_what_the_program_is(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    usage, empty, first, *_ = capsys.readouterr().out.splitlines()
    assert len(usage) < 80 and not empty and first == train_gpt.__doc__.splitlines()[0]


def test_flags_that_an_error_proposes_can_run():
    check_hyperparameters(Hyperparameters(batch_size=9), world_size=3)
    check_hyperparameters(Hyperparameters(num_steps=40, extension_steps=1), world_size=1)


@pytest.mark.parametrize("track", TRACKS)
def test_presets_can_run_on_their_usual_ranks(track):
    for world_size in (1, 2, 4, 8):
        check_hyperparameters(parse_arguments(["--track", track]), world_size)


@pytest.mark.parametrize("table, row, change", [
    ("LAYERS", 1, {"attention": "longg"}), ("LAYERS", 0, {"skip_from": 0}), ("LAYERS", 1, {"attends_to": 1}),
    ("LAYERS", 2, {"skip_from": -1}), ("LAYERS", 6, {"value_table": 0}), ("LAYERS", 1, {"value_table": 7}),
    ("STAGES", 1, {"until": 0.2}), ("STAGES", 0, {"targets_end": (1,)}),
    ("STAGES", 3, {"tied": True}), ("STAGES", 1, {"batch": 0})])
def test_impossible_rows_are_one_line(monkeypatch, table, row, change):
    hp = train_gpt.Hyperparameters()
    train_gpt.check_hyperparameters(hp, 8)
    rows = list(getattr(train_gpt, table)["fineweb"])
    rows[row] = rows[row]._replace(**change)
    monkeypatch.setitem(getattr(train_gpt, table), "fineweb", tuple(rows))
    with pytest.raises(train_gpt.UserError, match=table):
        train_gpt.check_hyperparameters(hp, 8)

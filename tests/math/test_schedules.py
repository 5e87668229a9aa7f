"""Schedules: stages, batches, learning rates, momentum, windows, rotary frequencies, and the
weights of multi-token prediction."""
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from reference import model as reference_model

from train_gpt import (
    STAGES,
    Hyperparameters,
    Schedule,
    average_weight,
    lr_scale,
    momentum_schedule,
    muon_momenta,
    parse_arguments,
    rotary_frequencies,
    sequences_before,
    short_window,
    stage_ends,
    stage_index,
    tokens_before,
)

CPU = torch.device("cpu")
# The published schedule. The track's own run is shorter, with the same shares.
FINEWEB = replace(Hyperparameters(), num_steps=1405, extension=10 / 1405)
# 1,395 scheduled steps, then the extension of 10. Thirds of the schedule end at 465 and 930, and
# 92.7% of it at 1,293 (1,293.165, rounded).
STAGE_BEGINS = (0, 465, 930, 1293, 1395)


# --- Stages and batches ---------------------------------------------------------------------------


def test_stages_of_the_fineweb_track_begin_at_the_published_steps():
    """The proof has 1,375 scheduled steps and 10 after them. 20 scheduled steps are added for the
    sampled softmax."""
    assert stage_ends(FINEWEB) == [465, 930, 1293, 1395, 1405]
    assert FINEWEB.scheduled_steps == 1375 + 20
    assert FINEWEB.extension_steps == 10
    for stage, begin in enumerate(STAGE_BEGINS):
        assert stage_index(begin, FINEWEB) == stage
        if begin:
            assert stage_index(begin - 1, FINEWEB) == stage - 1
    assert stage_index(1404, FINEWEB) == 4
    assert stage_index(1405, FINEWEB) == 4


def test_batches_of_the_fineweb_track_are_the_published_ones():
    """8, 16 and 24 sequences of 16,384 tokens in the thirds of the schedule, and 24 in the
    extension: 369.6 million tokens in all."""
    sequences = 0
    for step in range(1405):
        assert sequences_before(step, FINEWEB) == sequences
        assert tokens_before(step, FINEWEB) == 16_384 * sequences
        sequences += 8 if step < 465 else 16 if step < 930 else 24
    assert sequences_before(1405, FINEWEB) == sequences
    assert tokens_before(1405, FINEWEB) == 16_384 * (8 * 465 + 16 * 465 + 24 * 475)
    assert tokens_before(1405, FINEWEB) == pytest.approx(369.6e6, abs=5e4)


@pytest.mark.parametrize("num_steps, extension_steps",
                         [(1, 0), (2, 1), (3, 0), (14, 2), (100, 99), (1000, 0)])
def test_stages_of_runs_of_any_length_have_their_share_of_the_steps(num_steps, extension_steps):
    """A stage's borders are its shares of the schedule, rounded to the nearest step, and
    sequences_before sums up the batches of the steps before."""
    hp = replace(FINEWEB, num_steps=num_steps, extension=extension_steps / num_steps)
    assert hp.extension_steps == extension_steps
    scheduled_steps = num_steps - extension_steps
    borders = [0, Fraction(1, 3), Fraction(2, 3), Fraction(927, 1000), 1]
    rounding = Fraction(1, 2 * scheduled_steps)
    sequences = 0
    for step in range(num_steps):
        stage = stage_index(step, hp)
        assert sequences_before(step, hp) == sequences
        sequences += STAGES["fineweb"][stage].batch_multiplier * 8
        if step >= scheduled_steps:
            assert stage == 4
        else:
            share = Fraction(step, scheduled_steps)
            assert borders[stage] - rounding <= share <= borders[stage + 1] + rounding
    assert sequences_before(num_steps, hp) == sequences


def test_the_embedding_is_untied_once_after_two_thirds_of_the_schedule():
    schedules = [Schedule(step, FINEWEB, CPU) for step in range(1406)]
    assert [s.tied for s in schedules] == [True] * 930 + [False] * 476
    assert [step for step, s in enumerate(schedules) if s.unties] == [930]
    laptop = parse_arguments(["--track=laptop"])
    for step in range(laptop.num_steps + 1):
        assert not Schedule(step, laptop, CPU).unties


def test_the_sampled_softmax_has_at_least_the_published_sizes():
    """Published (pull request 360 of 2026-08-31): 10,240 entries at first, 14,336 after 57% of the
    run, 24,576 after 80%, all after 92%. Here each size begins with a stage, which is earlier."""
    sizes = [Schedule(step, FINEWEB, CPU).softmax_size for step in range(1406)]
    assert sizes == [10_240] * 465 + [14_336] * 465 + [24_576] * 363 + [0] * 113
    for step, size in enumerate(sizes[:-1]):
        share = step / 1405
        if share < 681 / 1194:
            published = 10_240
        elif share < 961 / 1194:
            published = 14_336
        elif share < 1101 / 1194:
            published = 24_576
        else:
            published = 50_304
        assert (size or 50_304) >= published, step
    assert not any(stage.softmax_size for stage in STAGES["laptop"])


# --- Learning rates, momentum, weights of the targets ---------------------------------------------


@pytest.mark.parametrize("step, expected", [
    (0, 1.0),                                         # there is no warmup
    (464, 1.0), (465, 1.52),                          # the second stage begins
    (558, 1.52),                                      # the decay begins: 0.6 of it is left
    (559, 1.52 * 836 / 837 + 0.15 * 1 / 837),
    (929, 1.52 * 466 / 837 + 0.15 * 371 / 837),
    (930, 1.73 * 465 / 837 + 0.15 * 372 / 837),       # the third stage begins
    (975, 1.73 * 420 / 837 + 0.15 * 417 / 837),
    (1293, 1.73 * 102 / 837 + 0.15 * 735 / 837),      # the fourth stage changes only the softmax
    (1394, 1.73 * 1 / 837 + 0.15 * 836 / 837),
    (1395, 0.15), (1404, 0.15), (1405, 0.15)])        # flat in the extension
def test_learning_rates_of_the_fineweb_track(step, expected):
    assert lr_scale(step, FINEWEB) == pytest.approx(expected, rel=1e-12)


def test_lr_multipliers_are_powers_of_the_batch_multipliers():
    """Published: batch_multiplier ** 0.6 in the second stage, ** 0.5 in the third."""
    first, second, third, *others = (stage.lr_multiplier for stage in STAGES["fineweb"])
    assert first == 1
    assert second == pytest.approx(2 ** 0.6, abs=0.005)
    assert third == pytest.approx(3 ** 0.5, abs=0.005)
    assert others == [third, third]


def test_learning_rates_of_a_run_with_one_stage():
    """Constant, then linear down to the floor; with a floor of zero the last step still learns."""
    hp = replace(parse_arguments(["--track=laptop"]), num_steps=100, cooldown=0.25, lr_floor=0.1)
    assert lr_scale(0, hp) == 1.0
    assert lr_scale(75, hp) == 1.0
    assert lr_scale(76, hp) == pytest.approx(0.96 + 0.04 * 0.1)
    assert lr_scale(100, hp) == pytest.approx(0.1)
    assert lr_scale(99, replace(hp, lr_floor=0.0)) == pytest.approx(1 / 25)


@pytest.mark.parametrize("step, expected", [
    (0, 0.85), (150, 0.90), (300, 0.95), (700, 0.95), (1355, 0.95), (1380, 0.90), (1404, 0.852),
    (1405, 0.85)])
def test_momentum_rises_over_300_steps_and_falls_over_the_last_50(step, expected):
    assert momentum_schedule(step, FINEWEB) == pytest.approx(expected, abs=1e-12)


def test_muon_has_a_fast_and_a_slow_momentum_after_two_fifths_of_the_run():
    """Published: 0.85 and 0.4385 of the fast one, from step 514 of 1,194 on (43%) or 1,000 of
    3,250 (31%). Before, there is one momentum. The look-ahead always is the scheduled one."""
    for step in range(1405):
        nesterov, fast, fast_weight = muon_momenta(step, FINEWEB)
        assert nesterov == momentum_schedule(step, FINEWEB)
        assert (fast, fast_weight) == ((nesterov, 1.0) if step < 562 else (0.85, 0.4385)), step
    laptop = parse_arguments(["--track=laptop"])
    assert all(muon_momenta(step, laptop).fast_weight == 1 for step in range(laptop.num_steps))


def test_averages_of_weights_are_updated_in_every_fourth_step_of_the_tail():
    """In the last 351 steps, a quarter of the run, the last step included; the time constant is
    half of that. Published: the last 298 of 1,194 steps, 150 steps."""
    weights = [average_weight(step, FINEWEB) for step in range(1405)]
    updates = [step for step, weight in enumerate(weights) if weight]
    assert updates == list(range(1056, 1405, 4))
    assert {weights[step] for step in updates} == {4 / (351 / 2)}
    published = replace(FINEWEB, num_steps=1194, average_tail=298 / 1194)
    assert average_weight(1193, published) == pytest.approx(4 / 150, rel=0.01)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 9])
def test_averages_of_weights_of_short_runs(num_steps):
    """The last step always updates them, and no weight exceeds 1."""
    hp = replace(FINEWEB, num_steps=num_steps, average_tail=1.0)
    weights = [average_weight(step, hp) for step in range(num_steps)]
    assert 0 < weights[-1] <= 1
    assert sum(weight > 0 for weight in weights) == math.ceil(num_steps / 4)
    without = replace(hp, average_tail=0.0)
    assert not any(average_weight(step, without) for step in range(num_steps))


def test_momentum_without_warmup_and_cooldown_is_constant():
    hp = replace(FINEWEB, momentum_warmup=0.0, momentum_cooldown=0.0)
    assert {momentum_schedule(step, hp) for step in (0, 1, 1404, 1405)} == {0.95}


@pytest.mark.parametrize("step, weights", [
    (0, (1, 0.5, 0.25)), (161, (1, 0.5, 0.25 * 304 / 465)), (464, (1, 0.5, 0.25 / 465)),
    (465, (1, 0.5)), (697, (1, 0.5 * 233 / 465)), (929, (1, 0.5 / 465)),
    (930, (1,)), (1395, (1,)), (1405, (1,))])
def test_weights_of_multi_token_prediction(step, weights):
    expected = torch.tensor(weights, dtype=torch.float32)
    schedule = Schedule(step, FINEWEB, CPU)
    K = len(weights)
    torch.testing.assert_close(schedule.target_weights[:K], expected)
    assert schedule.has_prefix == (len(schedule.target_weights) == K + 1) == (step < 930)
    if schedule.has_prefix:  # 0.25, which falls to 0 in the second stage
        expected_prefix = 0.25 * min(1, (930 - step) / 465)
        assert schedule.target_weights[K].item() == pytest.approx(expected_prefix)


# --- Windows and rotary frequencies ---------------------------------------------------------------


@pytest.mark.parametrize("step, long, short", [
    (0, 3, 1), (465, 7, 3), (930, 11, 5), (1293, 11, 5), (1395, 13, 6), (1405, 20, 6)])
def test_windows_of_the_fineweb_track_in_blocks_of_128(step, long, short):
    """At the beginning of each stage, and in the last validation, where long layers see 20
    blocks."""
    windows = {kind: w.item() for kind, w in Schedule(step, FINEWEB, CPU).windows.items()}
    assert windows == {"long": 128 * long, "short": 128 * short, "paired": 128 * short,
                       "pointer": 8192}


def test_short_windows_are_whole_blocks_or_the_window():
    windows = (1, 100, 128, 200, 256, 384, 511, 512, 2560)
    assert [short_window(w) for w in windows] == [1, 100, 128, 128, 128, 128, 128, 256, 1280]


@pytest.mark.parametrize("stage, factor",
                         [(0, 0.085), (1, 0.0994), (2, 0.1084), (3, 0.1084), (4, 0.1120)])
def test_yarn_in_each_stage_agrees_with_the_reference(stage, factor):
    """The frequencies agree with the formula in float64, and the factors of the attention scores
    with the published ones."""
    windows = [384, 896, 1408, 1408, 1664][:stage + 1]
    expected, expected_scale = reference_model.yarn(windows, num_frequencies=32)
    frequencies, scale = rotary_frequencies(stage, FINEWEB)
    assert frequencies.shape == (32,)
    assert scale == pytest.approx(expected_scale, rel=1e-9)
    assert scale == pytest.approx(factor, abs=6e-5)
    torch.testing.assert_close(frequencies.double(), expected.double(), rtol=2e-6, atol=0)
    schedule = Schedule(STAGE_BEGINS[stage], FINEWEB, CPU)
    assert torch.equal(schedule.frequencies, frequencies)
    assert schedule.attention_scale.item() == pytest.approx(scale, rel=1e-6)


def test_yarn_slows_down_only_dimensions_that_rotate_rarely():
    """A dimension with more than 32 rotations in the old window keeps its frequency. One with less
    than one rotation is slowed down by the factor by which the window grows."""
    before = rotary_frequencies(0, FINEWEB)[0]
    after = rotary_frequencies(1, FINEWEB)[0]
    rotations = 384 * before / (2 * math.pi)
    often = rotations > 32
    rarely = rotations < 1
    assert often.any() and rarely.any()
    torch.testing.assert_close(after[often], before[often])
    torch.testing.assert_close(after[rarely], before[rarely] * 384 / 896)
    assert (after <= before).all()
    assert (after >= before * 384 / 896 - 1e-9).all()


def test_the_last_validation_keeps_the_rotary_frequencies_of_the_last_stage():
    """Its window is larger, but YaRN is not applied again (record 2025-09-21)."""
    last = Schedule(1405, FINEWEB, CPU)
    before = Schedule(1404, FINEWEB, CPU)
    assert torch.equal(last.frequencies, before.frequencies)
    assert last.attention_scale.item() == before.attention_scale.item()


def test_the_schedule_of_a_changed_table_is_not_a_cached_one(hp, monkeypatch):
    """Schedule caches tensors; another STAGES table must not receive those of the old one."""
    before = Schedule(0, hp, CPU)
    stage = STAGES["laptop"][0]._replace(window=128, mtp_weights=(1, 0.5), mtp_weights_end=(1, 0))
    monkeypatch.setitem(STAGES, "laptop", (stage,))
    after = Schedule(0, hp, CPU)
    assert before.windows["long"].item() == 256 and after.windows["long"].item() == 128
    assert len(before.target_weights) == 1 and len(after.target_weights) == 2

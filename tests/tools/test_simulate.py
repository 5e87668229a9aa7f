"""The simulated node: its performance model, its verdicts, and defects that it must find."""
import concurrent.futures
import copy
import gzip
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import train_gpt
from tools.simulate import __main__ as simulation
from tools.simulate import calibrate, judge, model, stages
from tools.simulate.model import CARDS, Shape, predict
from tools.simulate.stages import Step

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
H100 = CARDS["H100"]
SHAPE = Shape(tokens=65_536, model_dim=768, vocab_size=50_304, keys=549)


def event(kind="aten", name="mul", moved=0, flops=0, **more):
    defaults = dict(where="train_gpt.py:1", tensors=[], code="", elements=0)
    return dict(kind=kind, name=name, moved=moved, flops=flops) | defaults | more


def collective(number, moved, blocking=False):
    return event("collective", "_reduce_scatter_base_", moved, number=number, blocking=blocking)


def predict_one(kernel, known=()):
    """The prediction for a step of one kernel on one H100."""
    return predict([kernel], list(known), SHAPE, H100, 1)


# --- The performance model ------------------------------------------------------------------------

def test_a_kernel_takes_the_longer_of_moving_and_computing():
    moving = predict_one(event(moved=10**9))
    assert moving.ms["eager"] == pytest.approx(
        1e3 * (1e9 / (model.MEMORY * 3.35e12) + model.LAUNCH))
    both = predict_one(event(name="mm", moved=10**9, flops=10**13))
    assert both.ms["matrix products"] == pytest.approx(
        1e3 * (1e13 / (model.MATMUL * 989.4e12) + model.LAUNCH))
    assert both.flops == 1e13
    assert model.utilization(both, H100) == pytest.approx(model.MATMUL, rel=1e-3)


def test_attention_is_counted_by_the_keys_that_queries_see():
    forward = event("triton", "triton_tem_fused_flex_attention_1")
    backward = event("triton", "triton_tem_fused_flex_attention_backward_2")
    flops = 4 * 65_536 * (549 + 128) * 768  # scores and values; a block of 128 keys more
    assert predict_one(forward).flops == flops
    assert predict_one(backward).flops == 2.5 * flops
    causal = event(name="_scaled_dot_product_flash_attention", flops=4e12)
    assert predict_one(causal).flops == 2e12


@pytest.mark.parametrize("q, v, share", [
    ([65_536, 6, 128], [65_536, 6, 128], 1), ([1, 3, 131_072, 128], [1, 3, 131_072, 128], 1),
    ([65_536, 6, 64], [65_536, 6, 128], 0.75), ([1, 2, 65_536, 128], [1, 2, 65_536, 16], 0.1875),
    ([65_536, 3 * 768], [65_536, 3 * 768], 1)])
def test_narrow_heads_cost_less(q, v, share):
    """Q and V of six heads, of paired heads, of narrow ones; all in one tensor."""
    forward = event("triton", "triton_tem_fused_flex_attention_1", tensors=[q, q, v, [64]])
    assert predict_one(forward).flops == share * 4 * 65_536 * (549 + 128) * 768


@pytest.mark.parametrize("tensors, flops", [
    ([[4096, 768], [3072, 768], [4096, 3072], [4096, 3072]], 2 * 4096 * 768 * 3072),
    ([[2, 2048, 768], [768, 3072], [2, 2048, 3072], [3072]], 2 * 4096 * 768 * 3072),
    ([[16, 768, 512], [16, 512, 512]], 2 * 16 * 768 * 512 * 512),  # X^T X, from one argument
    ([[4096, 3072], [4096, 3072], [64]], 0)])
def test_a_product_in_a_triton_kernel_costs_its_operations(tensors, flops):
    """Its matrices are found among its arguments; without them the report names the kernel."""
    launch = event("triton", "relu_squared", moved=10**6, code="a", tensors=tensors)
    kernel = dict(name="relu_squared", code="a", products=1)
    prediction = predict_one(launch, [kernel])
    assert prediction.flops == flops
    unknown = model.unknown_work([launch], [kernel])
    if flops:
        ms = 1e3 * (flops / (model.MATMUL * 989.4e12) + model.LAUNCH)
        assert prediction.ms == {"matrix products": pytest.approx(ms)} and not unknown
    else:
        assert list(prediction.ms) == ["generated"] and unknown == {"relu_squared"}
    assert predict_one(launch, [dict(kernel, products=0)]).flops == 0


def test_the_products_of_flex_attention_keep_their_own_rule():
    launch = event("triton", "triton_tem_fused_flex_attention_1", code="a",
                   tensors=[[4096, 768], [3072, 768], [4096, 3072]])
    kernel = dict(name=launch["name"], code="a", products=4)
    assert predict_one(launch, [kernel]) == predict_one(launch)
    assert not model.unknown_work([launch], [kernel])


def test_a_product_in_fp8_has_its_own_rate():
    """55 % of the 1,979 TFLOP/s of an H100's data sheet."""
    prediction = predict_one(event(name="_scaled_mm", moved=10**6, flops=10**13))
    assert prediction.ms["matrix products"] == pytest.approx(
        1e3 * (1e13 / (0.55 * 1979e12) + model.LAUNCH), rel=1e-3)


def test_the_ratios_measured_on_an_h200_are_those_of_the_study():
    study = (REPOSITORY / "records/studies/2026-11-28_H200/details.md").read_text()
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in study.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    for measured in model.MEASURED:
        (first,) = [i for i, row in enumerate(rows) if f"step of {measured.tokens:,}" in row[0]]
        found = {row[0]: row[1:] for row in rows[first:first + 7]}
        for part, ratio in measured.ratios.items():
            assert float(found[part][2]) == ratio
        step, kernels = float(rows[first][2]), float(found["all kernels"][1])
        assert measured.between == pytest.approx(step - kernels, abs=0.05)


def test_a_step_by_the_measured_ratios():
    """The prediction of the study itself becomes what was measured there."""
    parts = {"matrix products": 35.5, "attention": 5.7, "head and loss": 7.6, "generated": 13.0,
             "eager": 4.0}
    step = predict_one(event())._replace(ms=parts, exposed=0.0)
    assert step.by_measured_ratios(32_768) == pytest.approx(70.1, abs=0.3)
    assert step._replace(exposed=2.0).by_measured_ratios(32_768) == pytest.approx(72.1, abs=0.3)
    assert step.by_measured_ratios(65_536) != step.by_measured_ratios(32_768)
    assert step.by_measured_ratios(2048) is None  # far from what was measured


@pytest.mark.parametrize("name, reads, parts", [
    ("triton_poi_fused_clone", 1, 1), ("triton_poi_fused_clone", 3, 1),
    ("triton_red_fused_rms_norm", 2, 2), ("triton_red_fused_rms_norm", 3, 2)])
def test_a_kernel_reads_its_parts_of_q_k_v_in_one_tensor(name, reads, parts):
    """A copy of V reads a third, however often its source names the tensor; the norm reads Q, K."""
    part = 65_536 * 768
    kernel = event("triton", name, moved=2 * (reads + 1) * part, elements=part,
                   tensors=[[65_536, 3 * 768], [65_536, 768]], counted=[reads * part, part])
    seconds = predict_one(kernel).ms["generated"] / 1e3
    moved = 2 * (parts + 1) * part
    assert seconds == pytest.approx(moved / (model.MEMORY * 3.35e12) + model.LAUNCH)


def test_a_kernel_with_many_instructions_is_bound_by_them():
    """110 instructions a logit, on 132 multiprocessors that issue 4 instructions a cycle."""
    kernel = dict(name="triton_red_fused", code="a", warps=16, instructions=[[130, 147, 163], 732],
                  constants={"XBLOCK": 1, "R0_BLOCK": 2048})
    assert model.instructions_per_element(kernel) == 440 * 32 * 16 / 2048
    logits = 65_536 * 50_304
    launch = event("triton", "triton_red_fused", moved=2 * logits, code="a", elements=logits,
                   tensors=[[65_536, 50_304]])
    prediction = predict_one(launch, [kernel])
    seconds = logits * 110 / 32 / (528 * model.ISSUE * 1.98e9)
    assert prediction.ms["head and loss"] == pytest.approx(1e3 * seconds, rel=1e-3)
    slower = dict(kernel, instructions=[[1300], 2000])  # the autotuner would not take it
    assert predict_one(launch, [slower, kernel]).total == prediction.total


def test_collectives_hide_behind_kernels_until_the_script_waits():
    kernel = event(name="mm", flops=6.827e12)  # 10.0 ms, as each collective
    moved = 427 * 10**7 * 8 // 7
    first, second, wait = collective(0, moved), collective(1, moved), event("wait", of=0)
    for events, exposed in (
            ([kernel, first, wait], 10), ([first, kernel, wait], 0), ([first, wait, kernel], 10),
            ([collective(0, moved, blocking=True), kernel], 10),
            ([first, second, kernel, wait], 10),  # one after the other
            ([first, second, kernel, wait, kernel, event("wait", of=1)], 0)):
        prediction = predict(events, [], SHAPE, H100, 8)
        assert prediction.exposed == pytest.approx(exposed, abs=0.1)
        assert prediction.total == pytest.approx(sum(prediction.ms.values()) + exposed, abs=0.1)
    alone = predict([first, wait], [], SHAPE, H100, 1)
    assert alone.collectives == pytest.approx(1e3 * H100.link_latency)


def test_the_mean_number_of_keys_that_a_query_sees():
    grown = [64 * int((64 + step / 1530 * 1728) // 64) for step in range(1530)]  # ValueEmbed's
    assert model.visible_keys(grown, 65_536) == pytest.approx(549, abs=1)
    assert 60 < model.visible_keys([64], 65_536) < 64
    assert model.visible_keys([], 65_536) == 0
    assert model.visible_keys([1792], 256) < 256
    assert model.visible_keys([10**9], 10**9) <= model.DOCUMENT


def test_the_mean_of_steps_is_weighted_by_how_often_they_occur():
    small, large = (
        predict([event(moved=n * 10**9), event("triton", "a", n * 10**9), collective(0, 10**6)],
                [], SHAPE, H100, 8) for n in (1, 2))
    mean = model.mean([(3, small), (1, large)])
    assert mean.total == pytest.approx((3 * small.total + large.total) / 4)
    assert mean.sent == 10**6
    for part, ms in mean.ms.items():
        assert ms == pytest.approx((3 * small.ms[part] + large.ms[part]) / 4)
    launches = {(part, name): count for part, name, _, count in mean.kernels}
    assert launches == {("eager", "mul"): 1, ("generated", "a"): 1} and mean.launches == 2
    assert sum(ms for _, _, ms, _ in mean.kernels) == pytest.approx(sum(mean.ms.values()))


def test_the_readme_has_the_errors_of_the_model():
    lines = (REPOSITORY / "docs/simulator.md").read_text().splitlines()
    for row in model.PUBLISHED:
        (line,) = [line for line in lines if row.record in line and "|" in line]
        assert str(row.published_ms) in line and str(row.predicted_ms) in line
        if row.left_out is None:  # ERROR rests on those that were never fitted
            assert abs(row.predicted_ms / row.published_ms - 1) < model.ERROR + 0.005
        else:
            assert f"{100 * row.left_out:+.1f} %" in line
    assert model.left_out_error() == pytest.approx(0.028, abs=5e-4)


# --- Which real steps a short run stands for ------------------------------------------------------

def in_thirds(num_steps, sizes=(2, 4, 6)):
    """Steps of a run in three stages, as a script's schedules would give them."""
    return [Step(sizes[3 * i // num_steps], (64 + 64 * i // num_steps,)) for i in range(num_steps)]


def test_a_short_run_has_every_kind_of_step():
    """First of a stage, odd, even: nine steps have all of three stages, FEWEST those of one."""
    assert stages.steps_of_a_short_run(in_thirds(1600), in_thirds) == 9
    alike = [Step(4, ())] * 1530
    assert stages.steps_of_a_short_run(alike, lambda count: alike[:count]) == stages.FEWEST
    lacks = stages.steps_of_a_short_run(in_thirds(1600), lambda count: alike[:count])
    assert lacks == stages.FEWEST


@pytest.mark.parametrize("num_steps", [100, 1601])
@pytest.mark.parametrize("sizes", [(2, 4, 6), (2, 4, 2), (4, 4, 6)])
def test_a_real_step_is_represented_by_a_step_of_its_kind(num_steps, sizes):
    real, short = in_thirds(num_steps, sizes), in_thirds(12, sizes)
    numbered = [step._replace(windows=(i,)) for i, step in enumerate(real)]
    meant = stages.stand_for(numbered, short)
    numbers = [[step.windows[0] for step in steps] for steps in meant]
    assert sorted(sum(numbers, [])) == list(range(num_steps))  # each once
    for i, steps in enumerate(meant):
        assert all(step.tokens == short[i].tokens for step in steps)
        if i == 0 or short[i].tokens != short[i - 1].tokens:  # the first step of a stage
            assert len(steps) == 1
            continue
        # The others are of the same parity, and less than a third of the run away.
        assert {number % 2 for number in numbers[i]} == {i % 2}
        assert all(abs(number / num_steps - i / 12) < 1 / 3 for number in numbers[i])


def test_steps_with_another_sampled_softmax_are_of_another_kind():
    real = [Step(6, (64,), 100 if i < 900 else 0) for i in range(1000)]
    short = [Step(6, (64,), 100 if i < 6 else 0) for i in range(12)]
    meant = stages.stand_for(real, short)
    assert sum(map(len, meant[:6])) == 900 and sum(map(len, meant[6:])) == 100
    assert len(meant[0]) == len(meant[6]) == 1
    for step, steps in zip(short, meant, strict=True):
        assert {real_step.softmax_size for real_step in steps} <= {step.softmax_size}


def test_a_step_that_the_short_run_lacks_is_named():
    with pytest.raises(LookupError) as error:
        stages.stand_for(in_thirds(99) + in_thirds(1), in_thirds(12)[:8])
    assert re.findall(r"\d+", str(error.value))[:3] == ["66", "100", "6"]  # step, steps, tokens


# --- The verdicts ---------------------------------------------------------------------------------

def phase(name, **more):
    return dict(
        name=name, seconds=1.0, compiled=0, peak=30 * 2**30, live=2**30, syncs=[],
        events=[event(moved=10**9)], tokens=65_536, after=dict(syncs=[], events=[]),
        peak_tensors=[["bfloat16[65536, 50304] forward graph 3", 6 * 2**30]]) | more


@pytest.fixture
def record():
    """The record of a rank without defects."""
    step = phase("training_step", events=[event(moved=10**9), collective(0, 10**6)])
    phases = [phase("training_step", compiled=5), phase("warm_up", compiled=1), phase("validate")]
    phases += [copy.deepcopy(step) for _ in range(6)]
    kernel = dict(name="triton_tem_fused", code="k", shared=131_072, registers=200, spilled=0,
                  warps=8, wgmma=24, error="", constants={})
    return dict(code=0, error="", phases=phases, messages=[], compilations=6, kernels=[kernel],
                real=[[1530, [524_288, [1000]]]], short=[[6, [524_288, [1000]]]], batch_size=8,
                sequence_length=65_536, model_dim=768, vocab_size=50_304)


def findings(record, card=H100, world_size=8, price=24.0):
    """The findings by the name of their check."""
    return {finding.check: finding for finding in judge.judge(record, card, world_size, price)}


def verdicts(record):
    return {check: finding.verdict for check, finding in findings(record).items()}


def ends_early(record):
    record["error"] = "Traceback\nRuntimeError: shape"


def compiles_late(record):
    record["phases"][-1]["compiled"] = 1


def gives_up_compiling(record):
    record["messages"].append("torch._dynamo hit config.recompile_limit (8)\n   function: 'f'")


def waits_after_each_step(record):
    for step in record["phases"][3:]:
        step["after"]["syncs"] = ["item in train_gpt.py:700"]


def waits_in_a_step(record):
    record["phases"][-1]["syncs"].append("item in train_gpt.py:7")


def is_too_large(record):
    record["phases"][-1]["peak"] = 75 * 2**30


def has_a_broken_kernel(record):
    record["kernels"][0]["error"] = "OutOfResources"


def wants_too_much_shared_memory(record):
    record["kernels"][0]["shared"] = H100.shared + 1


def spills_registers(record):
    record["kernels"][0]["spilled"] = judge.MOST_STACK


def lacks_tensor_cores(record):
    record["kernels"][0]["wgmma"] = 0


FITS, KERNELS = judge.fits_check(H100), judge.kernels_check(H100)
ATTENTION = judge.attention_check("forward")
PREDICTIONS = {judge.STEP, judge.RUN, judge.PRICE}


@pytest.mark.parametrize("defect, check, verdict, without", [
    (ends_early, judge.ENDS, "FAIL", PREDICTIONS),  # half a step predicts nothing
    (compiles_late, judge.COMPILES, "FAIL", set()),
    (gives_up_compiling, judge.COMPILES, "FAIL", set()),
    (waits_after_each_step, judge.WAITS, "FAIL", set()),
    (waits_in_a_step, judge.WAITS, "FAIL", set()),
    (is_too_large, FITS, "FAIL", set()),
    (has_a_broken_kernel, KERNELS, "FAIL", {ATTENTION}),
    (wants_too_much_shared_memory, KERNELS, "FAIL", {ATTENTION}),
    (spills_registers, ATTENTION, "slow", set()),
    (lacks_tensor_cores, ATTENTION, "slow", set())])
def test_each_defect_has_its_verdict_and_no_other(record, defect, check, verdict, without):
    before = verdicts(record)
    assert set(before.values()) == {"ok", "predicted"}
    defect(record)
    expected = {name: found for name, found in before.items() if name not in without}
    assert verdicts(record) == expected | {check: verdict}


def test_one_configuration_of_a_kernel_that_compiles_is_enough(record):
    has_a_broken_kernel(record)
    record["kernels"].append(dict(record["kernels"][0], error=""))
    assert set(verdicts(record).values()) == {"ok", "predicted"}


def test_a_script_without_steps_is_not_ok(record):
    record["phases"] = [phase("start")]
    assert sorted(verdicts(record).values()) == ["not run", "ok"]


def test_an_error_is_given_only_where_it_is_known(record):
    def error(card, world_size, tokens=524_288):
        return judge.error_of(record, CARDS[card], world_size, tokens)

    known = f"{100 * model.ERROR:.0f} %"
    assert known in error("H100", 8) and known in findings(record)[judge.STEP].why
    for other in (("H100", 16), ("H200", 8), ("A100", 8), ("H100", 8, 8 * 49_152 - 1)):
        assert "%" not in error(*other)
    assert known in error("H100", 4, 8 * 49_152 - 1)
    record["real"][0][1][1] = []  # no windows: a script without FlexAttention
    assert "%" not in error("H100", 8)


def staged(record):
    """The record of a script in three stages; every second step of each moves a second GB."""
    record["real"] = stages.packed(in_thirds(1500))
    record["short"] = stages.packed(in_thirds(12))
    steps = []
    for i in range(12):
        moved = (10 * (i // 4) + 1 + i % 2) * 10**9
        steps.append(phase("training_step", peak=(10 + 5 * (i // 4)) * 2**30,
                           events=[event(moved=moved)]))
    others = [p for p in record["phases"] if p["name"] != "training_step"]
    record["phases"] = others + steps
    return record


def test_a_run_in_stages_is_the_sum_over_its_real_steps(record):
    found = judge.predictions(staged(record), H100, 8)
    assert [(stage.tokens, stage.steps, stage.peak >> 30) for stage in found] == [
        (2, 500, 10), (4, 500, 15), (6, 500, 20)]

    def ms(gigabytes):
        return 1e3 * (1e9 * gigabytes / (model.MEMORY * H100.bytes) + model.LAUNCH)

    for i, stage in enumerate(found):  # half of the steps are odd
        assert stage.mean.total == pytest.approx(ms(10 * i + 1.5))
        assert stage.fastest == pytest.approx(ms(10 * i + 1))
        assert stage.slowest == pytest.approx(ms(10 * i + 2))
    assert judge.mean_step(found).total == pytest.approx(ms(11.5))
    lines = findings(record, price=60.0)
    steps = [check for check in lines if check.startswith(judge.STEP)]
    assert [re.findall(r"\d+", check) for check in steps] == [["2"], ["4"], ["6"]]
    minutes = f"{1500 * ms(11.5) / 60_000:.2f}"
    for value in (minutes, "1,500", "6,000"):  # steps, tokens
        assert value in lines[judge.RUN].why
    assert minutes in lines[judge.PRICE].why  # 60 an hour


def with_a_sampled_softmax(record):
    """The first 3 of 6 steps have a softmax over 1,000 classes, in a kernel of their own. Both
    kernels have 30 instructions a logit."""
    record["real"] = [[1000, [524_288, [1000], 1000]], [530, [524_288, [1000], 0]]]
    record["short"] = [[3, [524_288, [1000], 1000]], [3, [524_288, [1000], 0]]]
    for code in ("sampled", "full"):
        record["kernels"].append(dict(
            record["kernels"][0], name="triton_red_loss", code=code, warps=16, wgmma=0,
            instructions=[[60, 60], 200], constants={"XBLOCK": 1, "R0_BLOCK": 2048}))
    for i, step in enumerate(record["phases"][3:]):
        code, logits = ("sampled", 65_536_000) if i < 3 else ("full", 65_536 * 50_304)
        step["events"] = [event("triton", "triton_red_loss", 2 * logits, code=code,
                                elements=logits)]
    return record


def test_a_sampled_softmax_is_a_stage_of_its_own(record):
    found = judge.predictions(with_a_sampled_softmax(record), H100, 8)
    assert [(stage.tokens, stage.softmax_size, stage.steps) for stage in found] == [
        (524_288, 1000, 1000), (524_288, 0, 530)]
    sampled, full = (stage.mean.ms["head and loss"] for stage in found)
    assert full / sampled == pytest.approx(50.304, rel=0.05)
    assert sum(finding.check.startswith(judge.STEP) for finding in
               judge.predicted(record, H100, 8, None)) == 2


@pytest.mark.parametrize("code", ["sampled", "full"])
def test_many_instructions_a_logit_are_slow_in_every_stage(record, code):
    with_a_sampled_softmax(record)
    assert verdicts(record)[judge.LOGITS] == "ok"
    (kernel,) = [kernel for kernel in record["kernels"] if kernel["code"] == code]
    kernel["instructions"] = [[320, 320], 700]
    finding = findings(record)[judge.LOGITS]
    assert finding.verdict == "slow" and "160" in finding.why and kernel["name"] in finding.why


def test_a_stage_that_the_short_run_does_not_reach_is_not_predicted(record):
    staged(record)["short"] = [[12, [2, [64]]]]
    lines = findings(record)
    assert lines[judge.STEP].verdict == "not run" and judge.RUN not in lines
    del staged(record)["phases"][-1]  # a step of the short run is missing
    assert findings(record)[judge.STEP].verdict == "not run"


def test_kernels_of_a_kind_are_one_line(record):
    record["kernels"].append(dict(record["kernels"][0], code="l", registers=208, spilled=32))
    why = findings(record)[ATTENTION].why
    assert all(value in why for value in ("200", "208", "32"))


def test_compiling_in_the_warm_up_and_waiting_between_steps_is_fine(record):
    for step in record["phases"][3::2]:  # a line is logged every second step
        step["after"]["syncs"] = ["item in train_gpt.py:9"]
    assert set(verdicts(record).values()) == {"ok", "predicted"}
    # Older scripts have no warm-up; their first steps are not timed.
    phases = [p for p in record["phases"] if p["name"] != "warm_up"] + record["phases"][-2:]
    phases[3]["compiled"] = 1
    assert set(verdicts(dict(record, phases=phases)).values()) == {"ok", "predicted"}


@pytest.mark.parametrize("rank", [4, 7])
@pytest.mark.parametrize("change", [
    lambda events: events.pop(), lambda events: events.append(collective(1, 4)),
    lambda events: events[-1].update(name="allreduce_"),
    lambda events: events[-1].update(tensors=[[[3], "torch.float32"]])])
def test_ranks_whose_collectives_differ_would_hang(record, rank, change):
    ranks = {number: copy.deepcopy(record) for number in (0, 4, 7)}
    assert judge.same_collectives(ranks).verdict == "ok"
    change(ranks[rank]["phases"][5]["events"])
    found = judge.same_collectives(ranks)
    assert found.verdict == "FAIL" and f"rank {rank}" in found.why
    assert judge.same_collectives({0: ranks[rank], rank: record}).verdict == "FAIL"


def test_a_rank_that_ends_early_would_hang(record):
    other = copy.deepcopy(record)
    ends_early(other)
    found = judge.same_collectives({0: record, 4: record, 7: other})
    assert found.verdict == "FAIL" and "rank 7" in found.why and "shape" in found.why


@pytest.mark.parametrize("gpus, ranks", [(1, [0]), (2, [0, 1]), (8, [0, 4, 7]), (16, [0, 8, 15])])
def test_a_rank_in_the_middle_is_compared(gpus, ranks):
    assert simulation.compared_ranks(gpus) == ranks


def host_record(even, odd):
    """What host.py records of 60 steps. The first steps compile; others wait for other processes.
    """
    steps = [dict(ms=30_000.0, launches=1500, collectives=6) for _ in range(judge.HOST_WARM_UP)]
    for i in range(60 - judge.HOST_WARM_UP):
        base, launches, collectives = (odd, 1200, 20) if i % 2 else (even, 1000, 10)
        steps.append(dict(ms=base + i % 5, launches=launches, collectives=collectives))
    return dict(error="", steps=steps, parts={"GPT.forward": 10.25})


def test_the_host_time_is_that_of_undisturbed_steps():
    host = judge.host_time(host_record(20.0, 26.0))
    assert host.lowest == 23.0 and host.median == 25.0 and host.launches == 1100
    assert host.total == pytest.approx(23.0 + 1100 * 0.002 + 15 * 0.030)
    finding = judge.host_finding(host_record(20.0, 26.0))
    assert finding.verdict == "measured"
    assert all(value in finding.why for value in ("1,100", "20.0", "26.0", "25.0", "10.2"))


def test_a_stage_that_the_host_bounds_says_so(record):
    """Three stages of 0.5, 4 and 7 ms; on the H200's host a step takes 4.6 ms."""
    host = judge.host_time(host_record(0.5, 1.5))
    found = judge.predictions(staged(record), H100, 8)
    assert [judge.is_bound_by_host(stage, host) for stage in found] == [True, True, False]

    def lines(**more):
        return {line.check: line.why for line in judge.judge(record, H100, 8, **more)}

    with_host, without = lines(host=host), lines()
    stages_of = [check for check in with_host if check.startswith(judge.STEP)]
    numbers = [set(re.findall(r"\d+", with_host[check])) for check in stages_of]
    numbers_without = [set(re.findall(r"\d+", without[check])) for check in stages_of]
    assert len(stages_of) == 3
    for some, others in zip(numbers, numbers_without, strict=True):
        assert some - others <= {f"{host.on_h200:.0f}"}  # the host's time is all that is new
    # A stage that is bounded says more about it.
    more = [len(with_host[check]) - len(without[check]) for check in stages_of]
    assert more[0] == more[1] > more[2] > 0


def test_the_whole_run_has_two_figures(record):
    """The sum of the kernels, and with the ratios of an H200 and the host's time."""
    def minutes(line):
        return [float(value) for value in re.findall(r"\d+\.\d\d", line.why)]

    def run(card, host=None):
        return {line.check: line for line in judge.judge(record, card, 8, None, host)}[judge.RUN]

    (stage,) = judge.predictions(record, H100, 8)
    steps_of_run = 1530 / 60_000
    assert minutes(run(H100)) == pytest.approx(
        [steps_of_run * stage.mean.total, steps_of_run * stage.corrected], abs=0.005)
    slow = judge.host_time(host_record(100.0, 100.0))
    assert minutes(run(H100, slow))[1] == pytest.approx(steps_of_run * slow.on_h200, abs=0.005)
    assert len(minutes(run(CARDS["A100"]))) == 1  # nothing was measured


def test_a_kernel_whose_operations_are_unknown_is_named(record):
    launch = event("triton", "my_product", moved=10**6, code="p", tensors=[[64, 64]])
    record["phases"][-1]["events"].append(launch)
    assert "my_product" not in findings(record)[judge.RUN].why
    record["kernels"].append(dict(record["kernels"][0], name="my_product", code="p", products=1))
    assert "my_product" in findings(record)[judge.RUN].why
    record["phases"][-1]["events"] = [event(name="my_operation", registered=True)]
    assert "my_operation" in findings(record)[judge.RUN].why


def test_every_time_and_price_is_a_prediction(record):
    for check, finding in findings(record).items():
        if re.search(r"\d (ms|s|minutes)\b", finding.why) or check == judge.PRICE:
            assert finding.verdict == "predicted"
    assert judge.PRICE not in findings(record, price=None)


def test_the_sequence_is_halved_until_the_run_fits(record):
    for p in record["phases"]:
        p["peak"] = 101 * 2**30  # 1 GiB stays after a step
    assert judge.smaller(record, H100) == ["--sequence_length=32768", "--batch_size=16"]
    assert judge.smaller(record, CARDS["RTX4090"]) == ["--sequence_length=8192", "--batch_size=64"]
    packed = dict(record, sequence_length=1024, batch_size=512)  # 64 sequences at once
    assert judge.smaller(packed, H100) == ["--micro_batch=32"]
    for p in record["phases"]:
        p["live"] = 80 * 2**30
    assert judge.smaller(record, H100) is None


# --- Measured and predicted -----------------------------------------------------------------------

TIMES = ((5, 500), (10, 1000), (15, 4000), (20, 4550), (25, 5550), (30, 6550), (35, 9000),
         (40, 10_000))
LOG = "".join(f"step:{step}/40 train_loss:5.1 train_time:{ms}ms step_avg:1.00ms tokens:1\n"
              for step, ms in TIMES)
LOG += "tokens_per_second:417000 peak_memory_per_rank:31744MiB\n"
MEAN = dict(ms={"matrix products": 72.0, "head and loss": 12.0, "eager": 6.0}, exposed=10.0,
            kernels=[["head and loss", "triton_red_logits", 12.0, 1],
                     ["matrix products", "mm", 72.0, 99]])
REPORT = dict(card=H100.name, torch="2.13.0", peak_timed=32 * 2**30, predicted=MEAN, stages=[
    dict(tokens=16_384, steps=20, mean=MEAN),
    dict(tokens=32_768, steps=20, mean=dict(MEAN, exposed=60.0))])
MICROSECONDS = {"triton_red_logits": 15_000, "triton_poi_other": 3_000,
                "nvjet_hsh_256x128": 225_000, "void at::native::elementwise": 21_000,
                "ncclDevKernel_ReduceScatter": 300}


def make_trace():
    events = [dict(cat="kernel", name=name, dur=us, args=dict(correlation=i))
              for i, (name, us) in enumerate(MICROSECONDS.items())]
    events += [dict(cat="cuda_runtime", name="cudaLaunchKernel", dur=5, args=dict(correlation=i))
               for i in range(9)]
    events += [dict(cat="kernel", name="of a step before", dur=10**6, args=dict(correlation=99)),
               dict(cat="cpu_op", name="aten::mm", dur=10**6), dict(name="no category")]
    return {"traceEvents": events}


def test_measured_parts_and_their_ratios():
    parts = calibrate.measured_parts(make_trace(), {"triton_red_logits": "head and loss"})
    assert parts == pytest.approx({"head and loss": 5, "generated": 1, "matrix products": 75,
                                   "eager": 7, "collectives": 0.1})
    table = calibrate.table(REPORT, LOG, [make_trace()])
    rows = [[cell.strip() for cell in line.strip("|").split("|")][1:]
            for line in table.splitlines()]
    assert rows[2:5] == [["32.0", "31.0", "0.97"],    # peak
                         ["100.0", "110.0", "1.10"],  # first stage: median of 100, 600, 110
                         ["72.0", "75.0", "1.04"]]    # its matrix products
    assert rows[-1] == ["150.0", "200.0", "1.33"]     # second stage: median of 200, 490, 200
    assert len(calibrate.table(REPORT, LOG, []).splitlines()) == 5


def test_what_can_not_be_compared_is_one_line(tmp_path, capsys):
    report, log = str(tmp_path / "report.json"), str(tmp_path / "log.txt")
    trace = str(tmp_path / "stage1.trace.json.gz")
    Path(report).write_text(json.dumps([REPORT]))
    Path(log).write_text(LOG)
    Path(trace).write_bytes(gzip.compress(json.dumps(make_trace()).encode()))
    assert calibrate.main([report, log, trace]) == 0
    assert "75.0" in capsys.readouterr().out
    Path(log).write_text("step:0/100\n")
    for argv in ([], [report], [report, log], [log, log], [report, "nowhere"]):
        assert calibrate.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


# --- The command ----------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, value", [
    (["missing.py"], "missing.py"), (["--gpu", "H1000"], "H1000"), (["--gpus", "0"], "0")])
def test_a_wrong_flag_is_one_line(argv, value, capsys):
    with pytest.raises(SystemExit) as ended:
        simulation.main(argv)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and value in err


def test_the_same_tokens_are_divided_over_more_gpus():
    divided = simulation.divided
    assert divided(8, 65_536, 8) == divided(8, 65_536, 1) == divided(512, 1024, 16) == []
    assert divided(8, 65_536, 16) == ["--batch_size=16", "--sequence_length=32768"]
    assert divided(12, 1024, 8) == ["--batch_size=24", "--sequence_length=512"]


def test_what_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(simulation, "can_import_cuda_torch", lambda python: False)
    monkeypatch.setenv("CUDA_PYTHON", "/bin/false")
    assert simulation.main([]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "/bin/false" in err
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert simulation.main([]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "g++" in err


def test_the_summary_counts_the_verdicts():
    text = simulation.summary({"ok": 9, "predicted": 2})
    assert "9 ok" in text and "2 predicted" in text
    assert f"{100 * model.left_out_error():.1f} %" in text
    assert "%" not in simulation.summary({"FAIL": 1, "not run": 1})


def node_without_libraries(folder, script):
    """A Node whose Python is a shell script."""
    python = folder / "python"
    python.write_text(script)
    python.chmod(0o755)
    node = simulation.Node.__new__(simulation.Node)  # without its compiled libraries
    node.python, node.folder, node.running = str(python), folder, set()
    return node


def test_jobs_end_with_the_simulation(tmp_path):
    """Also a job whose process ignores signals, with its children."""
    pid = tmp_path / "pid"
    os.mkfifo(pid)
    node = node_without_libraries(
        tmp_path, f"#!/bin/sh\ntrap '' INT TERM\nsleep 3000 &\necho $$ > {pid}\nwait\nwait\n")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(node.run, "job")
        number = int(pid.read_text())  # waits until the job has started
        node.stop()
        with pytest.raises(simulation.CannotRun):
            job.result(300)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_the_limit_is_of_cpu_time(tmp_path, monkeypatch, capsys):
    """A job that waits for a busy machine is not ended. One that computes without end is."""
    monkeypatch.setattr(simulation, "CPU_LIMIT", 1)
    monkeypatch.setattr(simulation, "REPORT_EVERY", 0.2)
    node = node_without_libraries(tmp_path, f"""#!/bin/sh
echo 'phase: warm_up 1'
mkdir -p {tmp_path}/waits/triton/a && touch {tmp_path}/waits/triton/a/b.cubin
sleep 3
echo '{{"code": 5}}' > {tmp_path}/waits.json
""")
    assert node.run("waits", label="rank 4") == {"code": 5}
    lines = capsys.readouterr().err.splitlines()  # what it has done so far
    assert len(lines) > 1 and all("rank 4" in line for line in lines)
    assert re.search(r"\b1 kernel.*warm_up 1", lines[-1])
    node = node_without_libraries(tmp_path, "#!/bin/sh\nwhile :; do :; done\n")
    with pytest.raises(simulation.CannotRun) as error:
        node.run("computes")
    assert "computes" in str(error.value) and not node.running


# --- Where a CUDA build of torch is installed -----------------------------------------------------
# These take minutes each. The scripts run in a process of their own, so a planted defect is a
# script that executes train_gpt.py and then replaces one of its functions or settings.

SMALL = ["--track=laptop", "--sequence_length=2048", "--val_length=32768", "--model_dim=256",
         "--num_heads=2", "--ngrams=2", "--ngram_rows=1021"]
STEP = """
honest_step = training_step

def training_step(model, optimizer, batch, schedule):
    loss = honest_step(model, optimizer, batch, schedule)
    {}
    return loss
"""
LARGE_TILES = """
honest_attention = flex_attention

def flex_attention(*args, **more):  # 128 KB for a head of 512 columns, at any pipeline depth
    return honest_attention(*args, **more, kernel_options={"BLOCK_M": 128, "BLOCK_N": 128})
"""
THREE_STAGES = """
STAGES["laptop"] = tuple(
    STAGES["laptop"][0]._replace(until=until, batch_multiplier=multiplier)
    for until, multiplier in ((1 / 3, 1), (2 / 3, 2), (1.0, 4)))
"""
DOCUMENTS_OF_THE_BATCH = """
STAGES["laptop"] = (STAGES["laptop"][0]._replace(max_doc_len=896),)
honest_read, honest_next, honest_step = BatchLoader._read, BatchLoader.next, training_step
num_documents = {}  # of each step

def read(self, step):
    batch = honest_read(self, step)
    num_documents[step] = int((batch[0][0] == self.stream.track.eot_token).sum())
    return batch

def next_batch(self):
    self.future.result()
    BatchLoader.documents = num_documents[self.step]
    return honest_next(self)

def training_step(model, *rest):
    model.head.softcap_args = (23.0 + BatchLoader.documents, 5.0, 7.5)
    return honest_step(model, *rest)

BatchLoader._read, BatchLoader.next = read, next_batch
"""
PRODUCT = """
import torch
import triton
import triton.language as tl

@triton.jit
def product_kernel(a, b, c, M, N, K, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k, total = tl.arange(0, BLOCK), tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(a + rows[:, None] * K + start + k[None, :])
        w = tl.load(b + columns[:, None] * K + start + k[None, :])
        total = tl.dot(x, w.T, total)
    at = rows[:, None] * N + columns[None, :]
    tl.store(c + at, total.to(c.dtype.element_ty))

class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        c = x.new_empty(len(x), len(weight))
        product_kernel[len(x) // 64, len(weight) // 64](
            x, weight, c, len(x), len(weight), x.size(1), 64)
        ctx.save_for_backward(x, weight)
        return c

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x
"""
USES_PRODUCT = """
sys.path.insert(0, {folder!r})  # Triton reads a kernel's source from its file
from product import Product

def mlp_forward(self, x):
    return self.proj(F.relu(Product.apply(x, self.fc.matrix().to(x.dtype))).square())

MLP.forward = mlp_forward
"""
DEFECTS = {  # the patch, more flags, the check that fails
    "nothing": ("", [], None),
    "an item": (STEP.format("loss.item()"), [], judge.WAITS),
    "a synchronization": (STEP.format("torch.cuda.synchronize()"), [], judge.WAITS),
    "a number set in a tensor of the GPU": (
        STEP.format("torch.zeros_like(loss)[None][0] = 1.0"), [], judge.WAITS),
    "a Python float that changes": (
        STEP.format("model.head.softcap_args = (model.head.softcap_args[0] + 1.0, 5.0, 7.5)"), [],
        judge.COMPILES),
    "a Python number of the batch": (DOCUMENTS_OF_THE_BATCH, [], judge.COMPILES),
    "a collective of rank 0 alone": (
        STEP.format("dist.get_rank() or dist.all_reduce(loss.clone())"), [], judge.COLLECTIVES),
    "a collective of the first and the last rank": (
        STEP.format("dist.get_rank() in (0, 7) and dist.all_reduce(loss.clone())"), [],
        judge.COLLECTIVES),
    "a batch that 8 does not divide": ("", ["--batch_size=12"], judge.ENDS),
    "too much shared memory": (LARGE_TILES, ["--model_dim=1024"], judge.ENDS),
}


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    pythons = [os.environ.get("CUDA_PYTHON", ""), sys.executable,
               str(REPOSITORY / ".venv.cuda/bin/python")]
    if not any(simulation.can_import_cuda_torch(python) for python in pythons if python):
        pytest.skip("needs a CUDA build of torch: ./run.sh simulate sets one up")
    return simulation.Node(simulation.cuda_python(), tmp_path_factory.mktemp("node"))


def patched_script(folder, patch):
    """A script that executes train_gpt.py and then a patch, in one namespace."""
    path = folder / "train_gpt.py"
    path.write_text(f"""from pathlib import Path
exec(compile(Path({str(REPOSITORY / 'train_gpt.py')!r}).read_text(), __file__, "exec"))
{patch}""")
    return path


def test_a_script_in_stages_is_predicted_by_stage(node, tmp_path):
    flags = [*SMALL, "--micro_batch=4", "--num_steps=99", "--adam_every=2"]
    script = patched_script(tmp_path, THREE_STAGES)
    report = simulation.simulate(node, script, flags, "H100", 8, None)
    assert "FAIL" not in {finding.verdict for finding in report["findings"]}, report["findings"]
    found = report["stages"]
    assert [(stage["tokens"], stage["steps"]) for stage in found] == [
        (8 * 2048 * n, 33) for n in (1, 2, 4)]
    assert found[0]["peak"] < found[1]["peak"] < found[2]["peak"]
    totals = [sum(stage["mean"]["ms"].values()) + stage["mean"]["exposed"] for stage in found]
    assert totals == sorted(totals)
    for stage, ms in zip(found, totals, strict=True):  # Adam updates in every second step
        assert stage["fastest"] < ms < stage["slowest"]
    mean = sum(report["predicted"]["ms"].values()) + report["predicted"]["exposed"]
    assert mean == pytest.approx(sum(totals) / 3)


def test_train_gpt_has_no_defect(node):
    flags = ["--track=fineweb", "--sequence_length=2048", "--val_length=32768", "--model_dim=256",
             "--num_heads=2", "--ngram_rows=1021"]
    report = simulation.simulate(node, REPOSITORY / "train_gpt.py", flags, "H100", 8, None)
    found = {finding.verdict for finding in report["findings"]}
    assert not found & {"FAIL", "not run"}, report["findings"]
    steps = stages.schedule(train_gpt, train_gpt.parse_arguments(flags))
    assert sum(stage["steps"] for stage in report["stages"]) == len(steps)
    tokens = sum(stage["steps"] * stage["tokens"] for stage in report["stages"])
    assert tokens == sum(step.tokens for step in steps)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(node, name, tmp_path):
    patch, flags, check = DEFECTS[name]
    script = patched_script(tmp_path, patch)
    report = simulation.simulate(node, script, [*SMALL, *flags], "H100", 8, None)
    failed = [finding.check for finding in report["findings"] if finding.verdict == "FAIL"]
    assert failed == ([check] if check else []), report["findings"]
    json.dumps(report["kernels"])


def test_a_product_of_a_triton_kernel_is_priced_on_every_rank(node, tmp_path):
    """Compiled on rank 0; the other ranks start the kernel themselves."""
    (tmp_path / "product.py").write_text(PRODUCT)
    script = patched_script(tmp_path, USES_PRODUCT.format(folder=str(tmp_path)))
    report = simulation.simulate(node, script, SMALL, "H100", 8, None)
    assert "FAIL" not in {finding.verdict for finding in report["findings"]}, report["findings"]
    parts = {name: part for part, name, *_ in report["predicted"]["kernels"]}
    assert parts["product_kernel"] == "matrix products"


def test_the_host_time_is_measured(node):
    """A step of train_gpt.py, of its first stage, starts as many kernels as the simulated one."""
    flags = ["--track=laptop", "--sequence_length=2048", "--val_length=32768", "--adam_every=2"]
    report = simulation.simulate(node, REPOSITORY / "train_gpt.py", flags, "H100", 8, None,
                                 host=True)
    (line,) = [line for line in report["findings"] if line.check == judge.HOST]
    assert line.verdict == "measured", line
    assert report["host"]["lowest"] > 0
    launches = report["stages"][0]["mean"]["launches"]
    assert report["host"]["launches"] == pytest.approx(launches, rel=0.1)


def test_flags_that_fit_are_found_for_an_older_script(node):
    """NGramEmbed's script also sets a number in a tensor of the GPU, which was found on one."""
    script = next((REPOSITORY / "records").rglob("2026-11-22_NGramEmbed/train_gpt.py"))
    flags = ["--num_layers=8", "--sequence_length=262144"]
    report = simulation.simulate(node, script, flags, "H100", 8, None)
    failed = {finding.check for finding in report["findings"] if finding.verdict == "FAIL"}
    assert failed == {FITS, judge.WAITS}, report["findings"]
    tried = report["findings"][-1]
    assert tried.verdict == "ok" and "--sequence_length=" in tried.why

"""Findings about a simulated rank: ok, slow, FAIL, predicted, measured or not run. No torch here.
"""
import collections
import statistics
from typing import NamedTuple

from tools.simulate import stages
from tools.simulate.model import (
    ERROR,
    FITTED_TOKENS,
    GIB,
    MEASURED_CAPABILITY,
    Card,
    Prediction,
    Shape,
    instructions,
    mean,
    predict,
    unknown_work,
    utilization,
    visible_keys,
)

USABLE = 0.9      # of a card's memory; the rest is for CUDA, cuBLAS, NCCL and fragmentation
MOST_STACK = 256  # bytes of spilled registers that an attention kernel may have
# Instructions for each logit, over all kernels of the loss. Reading a logit twice and writing it
# takes an H100 as long as 56 instructions.
MOST_INSTRUCTIONS = 75

# Names of checks
ENDS = "runs to its end"
COMPILES = "compiles nothing in the timed part"
WAITS = "host waits for the GPU inside a step"
COLLECTIVES = "ranks call the same collectives"
HOST = "host time of a step"
LOGITS = "instructions a logit"
STEP = "a step"
RUN = "the whole run"
PRICE = "its price"


def fits_check(card: Card) -> str:
    """The name of the check of memory."""
    return f"fits into {card.name}"


def kernels_check(card: Card) -> str:
    """The name of the check that all kernels compile."""
    major, minor = card.capability
    return f"kernels compile for sm_{major}{minor}"


def attention_check(direction: str) -> str:
    """The name of the check of FlexAttention's kernels; direction: forward or backward."""
    return f"FlexAttention {direction}"


class Finding(NamedTuple):
    """A line of the report."""
    check: str
    verdict: str  # ok, slow, FAIL, predicted, measured, not run
    why: str = ""


def in_one_line(text: str) -> str:
    """The first 300 characters of a message, without line breaks."""
    return " ".join(text.split())[:300]


# --- Phases of a record ---------------------------------------------------------------------------

def steps(record: dict) -> list[dict]:
    """All training steps, also those of the warm-up."""
    return [phase for phase in record["phases"] if phase["name"] == "training_step"]


def steps_of_the_run(record: dict) -> list[dict]:
    """The training steps after those of the warm-up."""
    count = len(stages.unpacked(record["short"]))
    return steps(record)[-count:]


def has_warm_up(record: dict) -> bool:
    """Older scripts have no function warm_up; their first steps are not timed."""
    return any(phase["name"] == "warm_up" for phase in record["phases"])


def timed(record: dict) -> list[dict]:
    """The phases after the warm-up, or after the first steps of a script without one."""
    names = [phase["name"] for phase in record["phases"]]
    last_untimed = 5
    if has_warm_up(record):
        last_untimed = max(i for i, name in enumerate(names) if name == "warm_up")
    return record["phases"][last_untimed + 1:]


def peaks(record: dict) -> dict[str, int]:
    """The most bytes that tensors held, by phase."""
    found = {}
    for phase in record["phases"]:
        found[phase["name"]] = max(phase["peak"], found.get(phase["name"], 0))
    return found


# --- Checks ---------------------------------------------------------------------------------------

def ends(record: dict) -> Finding:
    """Does the script run to its end?"""
    lines = record["error"].strip().splitlines()
    verdict = "FAIL" if record["code"] or record["error"] else "ok"
    return Finding(ENDS, verdict, lines[-1][:400] if lines else "")


def compiles(record: dict) -> Finding:
    """Is everything compiled before the clock runs?"""
    why = f"{record['compilations']} compilations"
    for message in record["messages"]:
        if "hit config." in message:  # other graphs of this function then run uncompiled
            return Finding(COMPILES, "FAIL", f"{why}; {in_one_line(message)}")
    late = [phase for phase in timed(record) if phase["compiled"]]
    if not late:
        return Finding(COMPILES, "ok", why)
    reasons = [in_one_line(message) for message in record["messages"] if "ecompil" in message]
    names = ", ".join(sorted({phase["name"] for phase in late}))
    count = sum(phase["compiled"] for phase in late)
    why += f", {count} of them late, in {names}: {' | '.join(reasons[-2:])}"
    return Finding(COMPILES, "FAIL", why)


def waits(record: dict) -> Finding:
    """Does the host wait for the GPU inside a step?"""
    # Without a warm-up, the first two steps are not timed.
    found = steps_of_the_run(record)[0 if has_warm_up(record) else 2:]
    inside, between = collections.Counter(), collections.Counter()
    for phase in found:
        inside.update(phase["syncs"])
        between.update(set(phase["after"]["syncs"]))
    # A line is logged every second step, so a wait after every step belongs to the step.
    after_each = {sync: n for sync, n in between.items() if n == len(found) > 1}
    inside.update(after_each)
    only_between = [sync for sync in between if sync not in inside]
    if inside:
        counts = [f"{sync}, {n / len(found):.1f} times a step" for sync, n in inside.items()]
        return Finding(WAITS, "FAIL", "; ".join(counts))
    if only_between:
        why = f"never; between steps, when a line is logged: {', '.join(only_between)}"
        return Finding(WAITS, "ok", why)
    return Finding(WAITS, "ok", "never")


def fits(record: dict, card: Card) -> Finding:
    """Does the card's memory suffice?"""
    largest = max(record["phases"], key=lambda phase: phase["peak"])
    usable = USABLE * card.memory
    by_phase = ", ".join(f"{name} {peak / GIB:.1f}" for name, peak in peaks(record).items())
    why = f"GiB, {usable / GIB:.1f} usable of {card.memory / GIB:.1f}: {by_phase}"
    if largest["peak"] <= usable:
        return Finding(fits_check(card), "ok", why)
    tensors = [f"{size / GIB:.1f} GiB {what}" for what, size in largest["peak_tensors"][:3]]
    return Finding(fits_check(card), "FAIL", f"{why}; largest: {', '.join(tensors)}")


def compiled_kernels(record: dict, card: Card) -> list[Finding]:
    """Do the kernels compile, do they spill registers, how much work is a logit?"""
    def fails(kernel):
        return bool(kernel["error"]) or kernel["shared"] > card.shared

    compiled = [kernel for kernel in record["kernels"] if not fails(kernel)]
    # One configuration of a kernel that compiles is enough.
    good = {kernel["code"] for kernel in compiled}
    broken = [f"{kernel['name']} wants {kernel['shared']:,} B of shared memory {kernel['error']}"
              for kernel in record["kernels"] if fails(kernel) and kernel["code"] not in good]
    found = [compiles_for(card, compiled, broken)]
    attention = [kernel for kernel in compiled if "tem_fused" in kernel["name"]]
    for direction in ("forward", "backward"):
        of_direction = [kernel for kernel in attention
                        if ("backward" in kernel["name"]) == (direction == "backward")]
        if of_direction:
            found.append(attention_kernels(direction, of_direction, card))
    found += instructions_of_a_logit(record, compiled)
    return found


def compiles_for(card: Card, compiled: list[dict], broken: list[str]) -> Finding:
    """The finding about all kernels."""
    check = kernels_check(card)
    if broken:
        return Finding(check, "FAIL", "; ".join(broken))
    if not compiled:
        return Finding(check, "slow", "nothing is compiled")
    most_shared = max(kernel["shared"] for kernel in compiled)
    most_registers = max(kernel["registers"] for kernel in compiled)
    spilling = sum(kernel["spilled"] > 0 for kernel in compiled)
    return Finding(check, "ok", f"{len(compiled)}, largest shared memory {most_shared:,} of "
                   f"{card.shared:,} B, most registers {most_registers}, spilling: {spilling}")


def attention_kernels(direction: str, kernels: list[dict], card: Card) -> Finding:
    """The finding about FlexAttention's kernels of one direction."""
    hopper = card.capability[0] == 9  # wgmma is Hopper's instruction for its tensor cores
    slow = any(kernel["spilled"] >= MOST_STACK or (hopper and not kernel["wgmma"])
               for kernel in kernels)
    why = (f"{span(kernels, 'shared')} B shared, {span(kernels, 'registers')} registers, "
           f"{span(kernels, 'spilled')} B spilled, {span(kernels, 'warps')} warps")
    if hopper:
        why += f", {span(kernels, 'wgmma')} wgmma"
    return Finding(attention_check(direction), "slow" if slow else "ok", why)


def instructions_of_a_logit(record: dict, compiled: list[dict]) -> list[Finding]:
    """The finding about the kernels of the loss, in the stage with the most instructions."""
    counts = instructions(compiled)
    most: dict[str, float] = {}
    for kernels in logit_kernels(record):
        counted = {name: counts[code] for code, name in kernels.items() if code in counts}
        if sum(counted.values()) > sum(most.values()):
            most = counted
    if not most:
        return []
    each = ", ".join(f"{count:.0f} in {name[:40]}" for name, count in most.items())
    slow = sum(most.values()) > MOST_INSTRUCTIONS
    return [Finding(LOGITS, "slow" if slow else "ok",
                    f"{each} (slow from {MOST_INSTRUCTIONS} on in all)")]


def span(kernels: list[dict], what: str) -> str:
    """The range of a number over several kernels."""
    values = [kernel[what] for kernel in kernels]
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def logit_kernels(record: dict) -> list[dict[str, str]]:
    """The generated kernels that go over all logits, for each kind of step: hash -> name.

    All logits are those of a step, or of one sequence if the softmax is sampled.
    """
    kinds = {}
    for phase, step in zip(steps_of_the_run(record), stages.unpacked(record["short"]),
                           strict=False):
        logits = record["sequence_length"] * step.softmax_size
        if not logits:
            logits = phase["tokens"] * record["vocab_size"]
        kinds[step.tokens, step.softmax_size] = {
            event["code"]: event["name"] for event in phase["events"]
            if event["kind"] == "triton" and event["elements"] == logits > 0}
    return list(kinds.values())


def collectives(record: dict) -> list[tuple[str, list]]:
    """(name, tensors) of the collectives from the warm-up to the last validation, in order."""
    found = []
    for phase in record["phases"]:
        if phase["name"] == "write_sample":  # of rank 0 alone
            continue
        for event in [*phase["events"], *phase["after"]["events"]]:
            if event["kind"] == "collective":
                found.append((event["name"], event["tensors"]))
    return found


def same_collectives(records: dict[int, dict]) -> Finding:
    """Do these ranks, given by number, call the same collectives as the first of them?

    A difference is a deadlock on a real node.
    """
    first, *others = records
    expected = collectives(records[first])
    for rank in others:
        if records[rank]["error"] and not records[first]["error"]:
            why = f"rank {rank} ends early: {ends(records[rank]).why}"
            return Finding(COLLECTIVES, "FAIL", why)
        found = collectives(records[rank])
        if found != expected:
            return Finding(COLLECTIVES, "FAIL", difference(first, expected, rank, found))
    numbers = " and ".join([", ".join(map(str, [first, *others[:-1]])), str(others[-1])])
    return Finding(COLLECTIVES, "ok", f"{len(expected)} calls on each of the ranks {numbers}")


def difference(first: int, expected: list, rank: int, found: list) -> str:
    """The first call that differs between two ranks, in words."""
    common = min(len(expected), len(found))
    differs = [i for i in range(common) if expected[i] != found[i]]
    at = differs[0] if differs else common

    def call(calls):
        return f"{calls[at][0]} of {calls[at][1]}" if at < len(calls) else "no call"

    return (f"call {at} of {len(expected)} on rank {first}: {call(expected)}; of {len(found)} on "
            f"rank {rank}: {call(found)}")


# --- Predictions ----------------------------------------------------------------------------------

class HostTime(NamedTuple):
    """What the host needs for a mean step of the first stage, in ms of CPU; host.py measured it."""
    lowest: float   # the mean of the lowest even and the lowest odd step
    median: float   # the same of the medians; other processes of this machine make it longer
    launches: float
    driver: float   # what a real CUDA driver and NCCL add

    @property
    def total(self) -> float:
        return self.lowest + self.driver

    @property
    def on_h200(self) -> float:
        return HOST_RATIO * self.total


# Seconds that the real calls take which return at once in host.py's runtime: assumed.
DRIVER_LAUNCH, DRIVER_COLLECTIVE = 2e-6, 30e-6
# The script Stages took 40.6 ms a step of 16,384 tokens where the host of an H200 limited it
# (records/studies/2026-11-28_H200). For this script HostTime.total was 32.0 on an AMD EPYC.
HOST_RATIO = 40.6 / 32.0
HOST_WARM_UP = 8  # steps in which the measured script compiles and allocates


def host_halves(record: dict) -> list[list[dict]]:
    """The even and the odd steps of host.py's record: one of the two may update more."""
    steps = record["steps"][HOST_WARM_UP:]
    return [steps[0::2], steps[1::2]]


def host_time(record: dict) -> HostTime:
    """The host's time by the record of host.py."""
    def mean_of_halves(function, name: str) -> float:
        return statistics.mean(function([step[name] for step in half])
                               for half in host_halves(record))

    launches = mean_of_halves(statistics.median, "launches")
    collectives = mean_of_halves(statistics.median, "collectives")
    return HostTime(
        lowest=mean_of_halves(min, "ms"), median=mean_of_halves(statistics.median, "ms"),
        launches=launches,
        driver=1e3 * (DRIVER_LAUNCH * launches + DRIVER_COLLECTIVE * collectives))


def host_finding(record: dict) -> Finding:
    """The host's time of a step, in words."""
    host = host_time(record)
    even, odd = (min(step["ms"] for step in half) for half in host_halves(record))
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in record["parts"].items())
    return Finding(
        HOST, "measured",
        f"{host.total:.1f} ms: {host.lowest:.1f} of this machine's CPU (lowest even step "
        f"{even:.1f}, odd {odd:.1f}; median {host.median:.1f}) and {host.driver:.1f} for a real "
        f"driver, {host.launches:,.0f} launches; about {host.on_h200:.0f} on the H200's host; "
        f"medians of parts: {parts}")


class Stage(NamedTuple):
    """Consecutive real steps with the same tokens and the same size of the softmax."""
    tokens: int        # a step, over all ranks
    softmax_size: int  # 0: the whole vocabulary
    steps: int
    mean: Prediction   # of a step
    fastest: float     # ms of a step
    slowest: float
    peak: int          # bytes
    corrected: float | None  # ms of the mean step by the ratios measured on an H200; None: they
    #                          hold neither for other cards nor for steps of few tokens


def predictions(record: dict, card: Card, world_size: int) -> list[Stage]:
    """The stages of the real run. Raises LookupError if the short run lacks a kind of step."""
    short = stages.unpacked(record["short"])
    real = stages.stand_for(stages.unpacked(record["real"]), short)
    if len(steps(record)) < len(short):
        raise LookupError(f"training_step was called {len(steps(record))} times in a run of "
                          f"{len(short)} steps")
    found: list[Stage] = []
    timings: list[tuple[int, Prediction]] = []  # of the present stage
    phases: list[dict] = []
    phases_of_steps = steps_of_the_run(record)
    for i, step in enumerate(short):
        phase = phases_of_steps[i]
        phases.append(phase)
        if real[i]:
            shape = shape_of(record, phase, step, real[i], world_size)
            prediction = predict(phase["events"], record["kernels"], shape, card, world_size)
            timings.append((len(real[i]), prediction))
        work = (step.tokens, step.softmax_size)
        last_of_stage = i + 1 == len(short) or work != (short[i + 1].tokens,
                                                        short[i + 1].softmax_size)
        if last_of_stage:
            if timings:
                found.append(stage_of(step, timings, phases, shape.tokens, card))
            timings, phases = [], []
    return found


def shape_of(record: dict, phase: dict, step: stages.Step, real: list[stages.Step],
             world_size: int) -> Shape:
    """The shape of a simulated step that stands for these real ones."""
    windows = [window for real_step in real for window in real_step.windows]
    return Shape(
        tokens=phase["tokens"] or step.tokens // world_size, model_dim=record["model_dim"],
        vocab_size=record["vocab_size"], keys=visible_keys(windows, record["sequence_length"]),
        sampled_logits=record["sequence_length"] * step.softmax_size)


def stage_of(step: stages.Step, timings: list[tuple[int, Prediction]],
             phases: list[dict], tokens: int, card: Card) -> Stage:
    """A stage from one of its steps, its predictions with their numbers of steps, its phases.

    tokens: of a forward pass on one GPU.
    """
    totals = [prediction.total for _, prediction in timings]
    average = mean(timings)
    is_hopper = card.capability == MEASURED_CAPABILITY
    return Stage(tokens=step.tokens, softmax_size=step.softmax_size,
                 steps=sum(count for count, _ in timings), mean=average,
                 fastest=min(totals), slowest=max(totals),
                 peak=max(phase["peak"] for phase in phases),
                 corrected=average.by_measured_ratios(tokens) if is_hopper else None)


def mean_step(found: list[Stage]) -> Prediction:
    """The mean step of the run."""
    return mean([(stage.steps, stage.mean) for stage in found])


def error_of(record: dict, card: Card, world_size: int, tokens: int) -> str:
    """How far off a prediction may be, if anything supports a number.

    tokens: of the step with the fewest.
    """
    _, (_, windows, *_) = record["real"][0]  # of the first steps; FlexAttention has windows
    known = (card.name.startswith("NVIDIA H100") and windows and world_size <= 8
             and tokens >= FITTED_TOKENS * world_size)
    return f"± {100 * ERROR:.0f} %" if known else "error unknown"


def is_bound_by_host(stage: Stage, host: HostTime) -> bool:
    """Whether an H200's host needs longer for a step than the GPU."""
    return host.on_h200 > stage.mean.total


def predicted_step(stage: Stage, error: str, card: Card, host: HostTime | None) -> str:
    """The time of a stage's step, in words."""
    step = stage.mean
    why = f"{step.total:.0f} ms ({error}"
    if stage.slowest > 1.02 * stage.fastest:
        why += f"; from {stage.fastest:.0f} to {stage.slowest:.0f}"
    why += ")"
    if stage.corrected is not None:
        why += f", {stage.corrected:.0f} by the ratios of an H200"
    if host is not None:
        bounds = " and bounds the step" if is_bound_by_host(stage, host) else ""
        why += f", an H200's host needs {host.on_h200:.0f}{bounds}"
    return f"{why}, MFU {utilization(step, card):.2f}"


def parts_of(step: Prediction, world_size: int) -> str:
    """The parts of a step, the most expensive first, in words."""
    parts = sorted(step.ms.items(), key=lambda item: -item[1])
    text = ", ".join(f"{part} {ms:.1f}" for part, ms in parts)
    if world_size > 1:
        text += (f", exposed collectives {step.exposed:.1f} of {step.collectives:.1f} ms, "
                 f"{step.sent / 1e6:.0f} MB")
    return f"{text}, {step.launches:,.0f} launches"


def corrected_minutes(found: list[Stage], host: HostTime | None) -> str:
    """The time of the whole run with what was measured, in words; empty where that is unknown."""
    if any(stage.corrected is None for stage in found):
        return ""
    least = host.on_h200 if host is not None else 0.0  # a step takes as long as the host needs
    minutes = sum(stage.steps * max(stage.corrected, least) for stage in found) / 60_000
    and_host = " and the host's time" if host is not None else ""
    return f", {minutes:.2f} by the ratios of an H200{and_host}"


def predicted(record: dict, card: Card, world_size: int, price: float | None,
              host: HostTime | None = None) -> list[Finding]:
    """The model's lines. Each of them says that it is predicted, and with what error."""
    try:
        found = predictions(record, card, world_size)
    except LookupError as error:
        return [Finding(STEP, "not run", str(error))]
    findings, num_steps = [], sum(stage.steps for stage in found)
    for stage in found:
        error = error_of(record, card, world_size, stage.tokens)
        name, why = STEP, predicted_step(stage, error, card, host)
        if len(found) > 1:
            name += f" of {stage.tokens:,} tokens"
            if stage.softmax_size:
                name += f", {stage.softmax_size:,} classes"
            why += f", peak {stage.peak / GIB:.1f} GiB, {stage.steps:,} of {num_steps:,} steps"
        findings.append(Finding(name, "predicted", f"{why}: {parts_of(stage.mean, world_size)}"))
    error = error_of(record, card, world_size, min(stage.tokens for stage in found))
    minutes = sum(stage.steps * stage.mean.total for stage in found) / 60_000
    tokens = sum(stage.steps * stage.tokens for stage in found)
    each = f"steps, {tokens:,} tokens"
    if len(found) == 1:
        each = f"steps of {found[0].tokens:,} tokens"
    why = (f"{minutes:.2f} minutes ({error}){corrected_minutes(found, host)}: {num_steps:,} {each},"
           " without compilation and validation")
    unknown = set()
    for phase in steps_of_the_run(record):
        unknown |= unknown_work(phase["events"], record["kernels"])
    if unknown:
        why += f"; counted by their bytes alone: {', '.join(sorted(unknown))}"
    findings.append(Finding(RUN, "predicted", why))
    if price is not None:
        findings.append(Finding(PRICE, "predicted",
                                f"{price * minutes / 60:.2f} at {price:g} an hour ({error})"))
    return findings


# --- All findings ---------------------------------------------------------------------------------

def judge(record: dict, card: Card, world_size: int, price: float | None = None,
          host: HostTime | None = None) -> list[Finding]:
    """All findings about one rank. host: its measured time, if it was measured."""
    if not steps(record):
        missing = Finding("all else", "not run",
                          "training_step was not called: is the script like train_gpt.py?")
        return [ends(record), missing]
    found = [ends(record), compiles(record), waits(record), fits(record, card)]
    found += compiled_kernels(record, card)
    if ends(record).verdict == "FAIL":  # the last step may be incomplete
        return found
    return found + predicted(record, card, world_size, price, host)


def smaller(record: dict, card: Card) -> list[str] | None:
    """Flags with which a step of the same tokens may fit, or None if none can.

    What is left after a step does not depend on the tokens of a forward pass; the rest does.
    """
    peak = max(peaks(record).values())
    fixed = min(phase["live"] for phase in steps(record))
    length, batch_size = record["sequence_length"], record["batch_size"]
    tokens = max(phase["tokens"] for phase in steps(record))
    micro_batch = tokens // length
    while micro_batch > 1 or length > 1024:
        if micro_batch > 1:
            micro_batch //= 2
        else:
            length //= 2
            batch_size *= 2
        if fixed + (peak - fixed) * micro_batch * length / tokens <= USABLE * card.memory:
            flags = []
            if tokens > record["sequence_length"]:
                flags.append(f"--micro_batch={micro_batch}")
            if length < record["sequence_length"]:
                flags += [f"--sequence_length={length}", f"--batch_size={batch_size}"]
            return flags
    return None

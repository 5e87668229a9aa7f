"""What a simulated rank's record means: findings that are ok, slow, FAIL, or predicted. Pure Python: no torch here."""
import collections
from typing import NamedTuple

from tools.simulate import stages
from tools.simulate.model import (
    ERROR,
    FITTED_TOKENS,
    GIB,
    Card,
    Prediction,
    Shape,
    instructions,
    mean,
    predict,
    utilisation,
    visible_keys,
)

USABLE = 0.9  # of a card's memory; CUDA, cuBLAS, NCCL and fragmentation take what is left
MOST_STACK = 256  # bytes of spilled registers that an attention kernel may have
MOST_INSTRUCTIONS = 75  # a logit, over all kernels of the loss; to read it twice and write it takes an H100 as long as 56


class Finding(NamedTuple):
    """A line of the report."""
    check: str
    verdict: str  # ok, slow, FAIL, predicted, not run
    why: str = ""


def steps(record: dict) -> list[dict]:
    return [phase for phase in record["phases"] if phase["name"] == "training_step"]


def steps_of_the_run(record: dict) -> list[dict]:
    """The steps but those of a warm-up, which come first."""
    return steps(record)[-len(stages.unpacked(record["short"])):]


def timed(record: dict) -> list[dict]:
    """The phases after the warm-up; of a script without one (the entries) those after its first steps."""
    phases = record["phases"]
    warm = max((i for i, phase in enumerate(phases) if phase["name"] == "warm_up"), default=5)
    return phases[warm + 1:]


def ends(record: dict) -> Finding:
    """Does the script run to its end?"""
    last = (record["error"].strip().splitlines() or [""])[-1]
    return Finding("runs to its end", "FAIL" if record["code"] or record["error"] else "ok", last[:400])


def compiles(record: dict) -> Finding:
    """Is everything compiled before the clock runs?"""
    late = [phase for phase in timed(record) if phase["compiled"]]
    reasons = [" ".join(m.split())[:300] for m in record["messages"] if "ecompil" in m][-2:]
    why = f"{record['compilations']} compilations"
    gave_up = [" ".join(m.split())[:300] for m in record["messages"] if "hit config." in m]
    if gave_up:  # the rest of the kinds of graph then runs uncompiled, without a word
        return Finding("compiles nothing in the timed part", "FAIL", f"{why}; {gave_up[0]}")
    if late:
        why += f", {sum(p['compiled'] for p in late)} of them late, in {', '.join(sorted({p['name'] for p in late}))}: "
        why += " | ".join(reasons)
    return Finding("compiles nothing in the timed part", "FAIL" if late else "ok", why)


def waits(record: dict) -> Finding:
    """Does the host wait for the GPU inside a step?"""
    warmed = any(phase["name"] == "warm_up" for phase in record["phases"])
    found = steps_of_the_run(record)[0 if warmed else 2:]
    inside = collections.Counter(sync for phase in found for sync in phase["syncs"])
    between = collections.Counter(sync for phase in found for sync in set(phase["after"]["syncs"]))
    inside += {sync: n for sync, n in between.items() if n == len(found) > 1}  # lines are logged every second step
    between -= inside
    why = "; ".join(f"{sync}, {n / len(found):.1f} times a step" for sync, n in inside.items())
    if not why:
        why = f"never; between steps, when a line is logged: {', '.join(between)}" if between else "never"
    return Finding("host waits for the GPU inside a step", "FAIL" if inside else "ok", why)


def peaks(record: dict) -> dict[str, int]:
    """Most bytes that tensors held, by phase."""
    return {name: max(p["peak"] for p in record["phases"] if p["name"] == name)
            for name in dict.fromkeys(phase["name"] for phase in record["phases"])}


def fits(record: dict, card: Card) -> Finding:
    """Does the card hold it?"""
    most = max(record["phases"], key=lambda phase: phase["peak"])
    usable = USABLE * card.memory
    why = f"GiB, {usable / GIB:.1f} usable of {card.memory / GIB:.1f}: "
    why += ", ".join(f"{name} {peak / GIB:.1f}" for name, peak in peaks(record).items())
    if most["peak"] > usable:
        why += "; largest: " + ", ".join(f"{size / GIB:.1f} GiB {what}" for what, size in most["peak_tensors"][:3])
    return Finding(f"fits into {card.name}", "FAIL" if most["peak"] > usable else "ok", why)


def compiled_kernels(record: dict, card: Card) -> list[Finding]:
    """Do the kernels exist, do they spill, how often do they pass over the logits?"""
    kernels, (major, minor) = record["kernels"], card.capability
    def fails(k):
        return bool(k["error"]) or k["shared"] > card.shared
    good = {k["code"] for k in kernels if not fails(k)}  # of several configurations of a kernel one is enough
    broken = [f"{k['name']} wants {k['shared']:,} B of shared memory {k['error']}" for k in kernels
              if fails(k) and k["code"] not in good]
    kernels = [k for k in kernels if not fails(k)]
    most = max((k["shared"] for k in kernels), default=0)
    why = f"{len(kernels)}, largest shared memory {most:,} of {card.shared:,} B, most registers "
    why += f"{max((k['registers'] for k in kernels), default=0)}, spilling: {sum(k['spilled'] > 0 for k in kernels)}"
    found = [Finding(f"kernels compile for sm_{major}{minor}", "FAIL" if broken else "ok" if kernels else "slow",
                     "; ".join(broken) or (why if kernels else "nothing is compiled"))]
    for kind in ("forward", "backward"):
        of_kind = [k for k in kernels if "tem_fused" in k["name"] and ("backward" in k["name"]) == (kind == "backward")]
        if of_kind:
            slow = any(k["spilled"] >= MOST_STACK or (major == 9 and not k["wgmma"]) for k in of_kind)
            why = f"{span(of_kind, 'shared')} B shared, {span(of_kind, 'registers')} registers, "
            why += f"{span(of_kind, 'spilled')} B spilled, {span(of_kind, 'warps')} warps"
            why += f", {span(of_kind, 'wgmma')} wgmma" * (major == 9)
            found.append(Finding(f"FlexAttention {kind}", "slow" if slow else "ok", why))
    counts = instructions(kernels)
    of_kinds = [{name: counts[code] for code, name in kernels.items() if code in counts}
                for kernels in logit_kernels(record)]
    if counted := max(of_kinds, key=lambda counted: sum(counted.values()), default={}):
        each = ", ".join(f"{n:.0f} in {name[:40]}" for name, n in counted.items())
        slow = sum(counted.values()) > MOST_INSTRUCTIONS
        each += f" (slow from {MOST_INSTRUCTIONS} on in all)"
        found.append(Finding("instructions a logit", "slow" if slow else "ok", each))
    return found


def span(kernels: list[dict], what: str) -> str:
    """From the least to the most of several kernels."""
    least, most = min(k[what] for k in kernels), max(k[what] for k in kernels)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def logit_kernels(record: dict) -> list[dict[str, str]]:
    """Generated kernels that go over all logits of a step, or of a sequence where its softmax is over some words, in
    the last step of each kind: hash of the source -> name."""
    kinds = {}
    for phase, step in zip(steps_of_the_run(record), stages.unpacked(record["short"]), strict=False):
        logits = record["sequence_length"] * step.words or phase["tokens"] * record["vocab_size"]
        kinds[step.tokens, step.words] = {event["code"]: event["name"] for event in phase["events"]
                                          if event["kind"] == "triton" and event["elements"] == logits > 0}
    return list(kinds.values())


def calls(record: dict) -> list[tuple[str, list]]:
    """The collectives from the warm-up to the last validation, (name, tensors), in order."""
    return [(event["name"], event["tensors"]) for phase in record["phases"] if phase["name"] != "write_sample"
            for event in [*phase["events"], *phase["after"]["events"]] if event["kind"] == "collective"]


def same_collectives(first: dict, last: dict) -> Finding:
    """Do two ranks call the same collectives? A difference is a deadlock on a real node."""
    check = "first and last rank call the same collectives"
    a, b = calls(first), calls(last)
    if last["error"] and not first["error"]:
        return Finding(check, "FAIL", f"the last rank ends early: {ends(last).why}")
    differs = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
    if differs is None and len(a) == len(b):
        return Finding(check, "ok", f"{len(a)} calls")
    at = min(len(a), len(b)) if differs is None else differs
    one, other = (f"{c[at][0]} of {c[at][1]}" if at < len(c) else "no call" for c in (a, b))
    return Finding(check, "FAIL", f"call {at} of {len(a)} and {len(b)}: {one}; the last rank: {other}")


class Stage(NamedTuple):
    """Real steps with equally many tokens and words, one after the other."""
    tokens: int        # a step, over all ranks
    words: int         # over which the softmax goes; 0: all
    steps: int
    mean: Prediction   # of a step
    fastest: float     # ms of a step
    slowest: float
    peak: int          # bytes


def predictions(record: dict, card: Card, world_size: int) -> list[Stage]:
    """The stages of the real run, from the steps of the short one. Raises LookupError where it lacks some."""
    short = stages.unpacked(record["short"])
    real = stages.stand_for(stages.unpacked(record["real"]), short)
    if len(steps(record)) < len(short):
        raise LookupError(f"training_step was called {len(steps(record))} times in a run of {len(short)} steps")
    work = [(step.tokens, step.words) for step in short]
    found = [(i, [], []) for i, mine in enumerate(work) if i == 0 or mine != work[i - 1]]
    for i, (phase, meant) in enumerate(zip(steps_of_the_run(record), real, strict=True)):
        windows = [window for step in meant for window in step.windows]
        keys = visible_keys(windows, record["sequence_length"])
        shape = Shape(phase["tokens"] or short[i].tokens // world_size, record["model_dim"], record["vocab_size"], keys,
                      record["sequence_length"] * short[i].words)
        _, timed_steps, phases = [stage for stage in found if stage[0] <= i][-1]
        phases.append(phase)
        if meant:
            timed_steps.append((len(meant), predict(phase["events"], record["kernels"], shape, card, world_size)))
    return [Stage(*work[i], sum(times for times, _ in each), mean(each), min(p.total for _, p in each),
                  max(p.total for _, p in each), max(phase["peak"] for phase in phases))
            for i, each, phases in found if each]


def whole(found: list[Stage]) -> Prediction:
    """Of the mean step of the run."""
    return mean([(stage.steps, stage.mean) for stage in found])


def error_of(record: dict, card: Card, world_size: int, tokens: int) -> str:
    """How far off a prediction may be, as far as anything supports that. tokens: of the shortest step."""
    _, (_, windows, *_) = record["real"][0]  # of the first steps; FlexAttention has some
    known = card.name.startswith("NVIDIA H100") and windows and world_size <= 8 and tokens >= FITTED_TOKENS * world_size
    return f"± {100 * ERROR:.0f} %" if known else "error unknown"


def predicted(record: dict, card: Card, world_size: int, price: float | None) -> list[Finding]:
    """The model's lines. Every time among them is said to be predicted, with the model's error."""
    try:
        found = predictions(record, card, world_size)
    except LookupError as lacks:
        return [Finding("a step", "not run", str(lacks))]
    findings, count = [], sum(stage.steps for stage in found)
    for stage in found:
        p, name = stage.mean, "a step"
        why = f"{stage.mean.total:.0f} ms ({error_of(record, card, world_size, stage.tokens)}"
        if stage.slowest > 1.02 * stage.fastest:
            why += f"; from {stage.fastest:.0f} to {stage.slowest:.0f}"
        why += f"), MFU {utilisation(p, card):.2f}"
        if len(found) > 1:
            name = f"a step of {stage.tokens:,} tokens" + (f", {stage.words:,} words" if stage.words else "")
            why += f", peak {stage.peak / GIB:.1f} GiB, {stage.steps:,} of {count:,} steps"
        why += ": " + ", ".join(f"{part} {ms:.1f}" for part, ms in sorted(p.ms.items(), key=lambda item: -item[1]))
        if world_size > 1:
            why += f", exposed collectives {p.exposed:.1f} of {p.collectives:.1f} ms, {p.sent / 1e6:.0f} MB"
        findings.append(Finding(name, "predicted", why))
    error = error_of(record, card, world_size, min(stage.tokens for stage in found))
    minutes = sum(stage.steps * stage.mean.total for stage in found) / 60_000
    tokens = sum(stage.steps * stage.tokens for stage in found)
    each = f"steps of {found[0].tokens:,} tokens" if len(found) == 1 else f"steps, {tokens:,} tokens"
    findings.append(Finding("the whole run", "predicted", f"{minutes:.2f} minutes ({error}): {count:,} {each}, without "
                            "compilation and validation"))
    if price is not None:
        findings.append(Finding("its price", "predicted", f"{price * minutes / 60:.2f} at {price:g} an hour ({error})"))
    return findings


def judge(record: dict, card: Card, world_size: int, price: float | None = None) -> list[Finding]:
    """All findings about one rank."""
    if not steps(record):
        missing = Finding("all else", "not run", "no training_step was called: is the script like train_gpt.py?")
        return [ends(record), missing]
    found = [ends(record), compiles(record), waits(record), fits(record, card), *compiled_kernels(record, card)]
    if ends(record).verdict == "FAIL":  # the last step may have stopped half-way
        return found
    return found + predicted(record, card, world_size, price)


def smaller(record: dict, card: Card) -> list[str] | None:
    """Flags with which the same tokens a step may fit; None where none can.

    What does not depend on the tokens of a forward pass is what is left after a step.
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
            length, batch_size = length // 2, batch_size * 2
        if fixed + (peak - fixed) * micro_batch * length / tokens <= USABLE * card.memory:
            shorter = [f"--sequence_length={length}", f"--batch_size={batch_size}"]
            return [f"--micro_batch={micro_batch}"] * (tokens > record["sequence_length"]) + shorter * (
                length < record["sequence_length"])
    return None

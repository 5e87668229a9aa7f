"""Which steps of the real run each step of a short, simulated run stands for. No torch here.

Steps of a run differ in their tokens, their sampled softmax (stages), their windows, and in what
they update (Adam updates in every second step). The short run shows what each kind of step
computes. The script's own schedules say how often each kind occurs, and with which windows.
"""
import collections
import itertools
from collections.abc import Callable
from typing import NamedTuple

from tools.names import name_in

FEWEST, MOST = 6, 60  # steps of a simulated run


class Step(NamedTuple):
    """What the schedules say about one step."""
    tokens: int               # over all ranks
    windows: tuple[int, ...]  # tokens a query sees: one number for each layer with attention, or
    #                           one for all layers; empty: the script does not say
    softmax_size: int = 0     # classes of the sampled softmax; 0: the whole vocabulary


def schedule(script, hp) -> list[Step]:
    """Every step of the run hp, by the script's own functions.

    A script may have tokens_before(step, hp) and window_size(step, hp), or the tables LAYERS and
    STAGES. Without tokens_before, each step has batch_size * sequence_length tokens.
    """
    def constant_batch(step, hp):
        return step * hp.batch_size * hp.sequence_length

    def windows_of_tables(step, hp):
        return table_windows(script, step, hp)

    tokens_before = getattr(script, "tokens_before", constant_batch)
    window_size = getattr(script, "window_size", windows_of_tables)
    totals = [tokens_before(step, hp) for step in range(hp.num_steps + 1)]
    steps = []
    for step, (start, end) in enumerate(itertools.pairwise(totals)):
        windows = as_tuple(window_size(step, hp))
        steps.append(Step(end - start, windows, softmax_size(script, step, hp)))
    return steps


def table_windows(script, step: int, hp) -> list[int | None]:
    """The window of each layer by LAYERS and STAGES; empty if the script has no such tables."""
    if not hasattr(script, "STAGES"):
        return []
    window = hp.stages[script.stage_index(step, hp)].window
    short = script.short_window(window)
    windows = {"long": window, "short": short, "paired": short}
    return [windows.get(layer.attention) for layer in hp.layers]


def softmax_size(script, step: int, hp) -> int:
    """The number of classes of a training step's softmax by STAGES; 0: the whole vocabulary.

    The script uses the whole vocabulary where a sequence has more than four tokens a class.
    """
    if not hasattr(script, "STAGES"):
        return 0
    stage = hp.stages[script.stage_index(step, hp)]
    name = name_in(stage, "softmax_size")
    size = getattr(stage, name) if name is not None else 0
    return size if hp.sequence_length <= 4 * size else 0


def as_tuple(windows) -> tuple[int, ...]:
    """One window for all layers, or one for each (0 or None: no attention), as a tuple."""
    several = windows if isinstance(windows, (list, tuple)) else [windows]
    return tuple(window for window in several if window)


def packed(steps: list[Step]) -> list[tuple[int, Step]]:
    """Run-length encoding for JSON: (how many, Step) for each run of equal steps."""
    return [(len(list(group)), step) for step, group in itertools.groupby(steps)]


def unpacked(pairs: list) -> list[Step]:
    """The steps of a packed list, also after JSON has turned its tuples into lists."""
    steps = []
    for count, (tokens, windows, *size) in pairs:
        steps += count * [Step(tokens, tuple(windows), *size)]
    return steps


def kinds(steps: list[Step]) -> list[tuple]:
    """The kind of each step; steps of a kind may stand for each other.

    A kind is the tokens, the size of the softmax, and whether the step is the first of its stage (a
    change of stage may cost extra work), or else odd or even.
    """
    found, before = [], None
    for i, step in enumerate(steps):
        work = (step.tokens, step.softmax_size)
        found.append((*work, "first" if work != before else i % 2))
        before = work
    return found


def steps_of_a_short_run(real: list[Step], short: Callable[[int], list[Step]]) -> int:
    """The fewest steps with which a run has every kind of step of the real run.

    short(n) is the schedule of a run of n steps. FEWEST if even a run of MOST steps lacks a kind.
    """
    wanted = set(kinds(real))
    for count in range(FEWEST, MOST + 1):
        if wanted <= set(kinds(short(count))):
            return count
    return FEWEST


def stand_for(real: list[Step], short: list[Step]) -> list[list[Step]]:
    """For each step of the short run, the real steps that it stands for.

    A real step is represented by the step of its kind that is nearest in its share of the run.
    Raises LookupError if there is none of its kind.
    """
    of_kind = collections.defaultdict(list)
    for i, kind in enumerate(kinds(short)):
        of_kind[kind].append(i)
    found = [[] for _ in short]
    for step, kind in enumerate(kinds(real)):
        if not of_kind[kind]:
            tokens, size, _ = kind
            softmax = f" with a softmax over {size:,} classes" if size else ""
            raise LookupError(f"step {step:,} of {len(real):,} trains on {tokens:,} tokens{softmax}"
                              f", and a run of {len(short)} steps has no step like it")
        share = (step + 0.5) / len(real)

        def distance(i, share=share):
            return abs((i + 0.5) / len(short) - share)

        found[min(of_kind[kind], key=distance)].append(real[step])
    return found

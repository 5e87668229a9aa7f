"""Which real steps each step of a short, simulated run is taken for. Pure Python: no torch here.

Steps may differ: in their tokens and words (stages), their windows, in what they update (Adam in every second one). What
they compute is seen in the short run; how often each occurs, and with which windows, the script's own schedules say.
"""
import collections
import itertools
from collections.abc import Callable
from typing import NamedTuple

FEWEST, MOST = 6, 60  # steps of a simulated run


class Step(NamedTuple):
    """What the schedules say of one step."""
    tokens: int               # over all ranks
    windows: tuple[int, ...]  # tokens a query sees, one for each layer with attention, or one for all; empty: not said
    words: int = 0            # over which the softmax goes; 0: all


def schedule(script, hp) -> list[Step]:
    """Each step of the run hp, as the script's tokens_before(step, hp) and window_size(step, hp) say, where it has
    them; the windows else by its tables."""
    before = getattr(script, "tokens_before", lambda step, hp: step * hp.batch_size * hp.sequence_length)
    window = getattr(script, "window_size", lambda step, hp: by_tables(script, step, hp))
    ends = [before(step, hp) for step in range(hp.num_steps + 1)]
    return [Step(end - start, layers(window(step, hp)), words(script, step, hp))
            for step, (start, end) in enumerate(itertools.pairwise(ends))]


def by_tables(script, step: int, hp) -> list[int | None]:
    """The window of each layer, as LAYERS and STAGES have it; none where the script has no such tables."""
    if not hasattr(script, "STAGES"):
        return []
    window = hp.stages[script.stage_index(step, hp)].window
    sizes = {"long": window, "short": script.short_window(window), "paired": script.short_window(window)}
    return [sizes.get(layer.attention) for layer in hp.layers]


def words(script, step: int, hp) -> int:
    """Over how many words a training step's softmax goes, as STAGES has it, where they are enough; 0: all."""
    found = getattr(hp.stages[script.stage_index(step, hp)], "words", 0) if hasattr(script, "STAGES") else 0
    return found if found and hp.sequence_length <= 4 * found else 0


def layers(windows) -> tuple[int, ...]:
    """A window for all layers, or one for each of them (0 or None: no attention), as a tuple."""
    return tuple(filter(None, windows if isinstance(windows, (list, tuple)) else [windows]))


def packed(steps: list[Step]) -> list[tuple[int, Step]]:
    """(how many, Step) of equal neighbours, for JSON."""
    return [(len(list(group)), step) for step, group in itertools.groupby(steps)]


def unpacked(pairs: list) -> list[Step]:
    return [Step(tokens, tuple(windows), *words) for count, (tokens, windows, *words) in pairs for _ in range(count)]


def kinds(steps: list[Step]) -> list[tuple]:
    """What each step has in common with those that may stand for it: its tokens and words, and whether it is the first
    of its stage (a change of stage may take work of its own); the others, whether they are odd or even."""
    work = [(step.tokens, step.words) for step in steps]
    return [(*mine, "first" if i == 0 or mine != work[i - 1] else i % 2) for i, mine in enumerate(work)]


def steps_of_a_short_run(real: list[Step], short: Callable[[int], list[Step]]) -> int:
    """The fewest steps in which a run, short(number of steps), has all kinds of the real one.

    FEWEST where even MOST steps lack one.
    """
    wanted = set(kinds(real))
    return next((count for count in range(FEWEST, MOST + 1) if wanted <= set(kinds(short(count)))), FEWEST)


def stand_for(real: list[Step], short: list[Step]) -> list[list[Step]]:
    """For each step of the short run the real ones that it is taken for: of its kind, and nearest in their share of the
    run. Raises LookupError where a real step has none of its kind."""
    found, like = [[] for _ in short], collections.defaultdict(list)
    for i, kind in enumerate(kinds(short)):
        like[kind].append(i)
    for step, kind in enumerate(kinds(real)):
        if not like[kind]:
            over = f" over {kind[1]:,} words" * (kind[1] > 0)
            raise LookupError(f"step {step:,} of {len(real):,} trains on {kind[0]:,} tokens{over}, and no step like "
                              f"it occurs in a run of {len(short)} steps")
        share = (step + 0.5) / len(real)
        found[min(like[kind], key=lambda i: abs((i + 0.5) / len(short) - share))].append(real[step])
    return found

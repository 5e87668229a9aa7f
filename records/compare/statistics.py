"""Statistics: means, deviations and Student's and Welch's tests, as the rules of a claim need them."""
import itertools
import math
import statistics

from .logs import UserError


def mean(values: list[float]) -> float | None:
    """None for no values."""
    return statistics.fmean(values) if values else None


def deviation(values: list[float]) -> float | None:
    """Standard deviation of the sample; None for fewer than two values, or where one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def spread(values: list[float], form: str = ".4f") -> str:
    """Mean ± deviation (n = number), as far as there are any."""
    sd = deviation(values)
    return f"{mean(values):{form}}" + ("" if sd is None else f" ± {sd:{form}}") + f" (n = {len(values)})"


def t_test_below(values: list[float], target: float) -> float | None:
    """p-value of the one-sided one-sample t-test that the mean is at most target (null: it is above)."""
    from scipy.special import stdtr  # Student's distribution; scipy.stats takes a second to import
    sd, n = deviation(values), len(values)
    if sd is None:
        return None
    difference = mean(values) - target
    return float(stdtr(n - 1, difference / (sd / math.sqrt(n)))) if sd else float(difference > 0)


def welch_test_below(a: list[float], b: list[float]) -> float | None:
    """p-value of Welch's one-sided t-test that the mean of a is below that of b (null: it is not)."""
    from scipy.special import stdtr
    sd_a, sd_b = deviation(a), deviation(b)
    if sd_a is None or sd_b is None:
        return None
    va, vb = sd_a ** 2 / len(a), sd_b ** 2 / len(b)
    if va + vb == 0:
        return float(mean(a) >= mean(b))
    freedom = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))
    return float(stdtr(freedom, (mean(a) - mean(b)) / math.sqrt(va + vb)))


def difference(new: dict, old: dict) -> tuple[float, float | None, str]:
    """(mean of new - mean of old, two-sided p-value or None, how it was tested) of values by seed.

    Paired where both have the same seeds, two or more; else Welch's t-test.
    """
    a, b = list(new.values()), list(old.values())
    apart = mean(a) - mean(b)
    if len(new) > 1 and new.keys() == old.keys():
        pairs = [new[seed] - old[seed] for seed in new]
        how = f"paired by seed, {len(pairs)} pairs"
        if not deviation(pairs):
            return apart, None, f"{how} without spread"
        one_sided = t_test_below(pairs, 0.0)
    else:
        spread = deviation(a) or deviation(b)
        one_sided, how = welch_test_below(a, b) if spread else None, "Welch"
    if one_sided is None:
        return apart, None, "a test needs 2 runs of each, and a spread"
    return apart, min(1.0, 2 * min(one_sided, 1 - one_sided)), how


def runs_needed(sd: float, margin: float, p: float, power: float | None = None) -> int:
    """Fewest runs whose t-test gives p or less where mean and deviation come out as told, margin below the target.

    power: instead, fewest with at least this chance of such a p. Raises UserError beyond a million.
    """
    from scipy.special import nctdtr, stdtrit
    for n in itertools.chain(range(2, 10_000), range(10_000, 1_000_001, 1000)):
        critical, shift = stdtrit(n - 1, 1 - p), margin * math.sqrt(n) / sd
        if shift >= critical if power is None else nctdtr(n - 1, shift, critical) <= 1 - power:
            return n
    raise UserError(f"more than a million runs for a margin of {margin} at a deviation of {sd}")

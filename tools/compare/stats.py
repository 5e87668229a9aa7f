"""Mean, standard deviation and t-tests. scipy.stats takes a second to import, so it is imported when first used."""
import math
import statistics
import warnings

from .logs import UserError


def mean(values: list[float]) -> float | None:
    """Mean of the values; None if there are none."""
    return statistics.fmean(values) if values else None


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values or if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def spread(values: list[float], form: str = ".4f") -> str:
    """`mean ± standard deviation (n = number)`; the deviation is left out where there is none."""
    sd = deviation(values)
    plus_minus = "" if sd is None else f" ± {sd:{form}}"
    return f"{mean(values):{form}}{plus_minus} (n = {len(values)})"


def t_test_below(values: list[float], target: float) -> float | None:
    """p-value of the one-sided one-sample t-test that the mean is below target; None if it can't be tested."""
    sd = deviation(values)
    if sd is None:
        return None
    if sd == 0:  # scipy gives NaN
        return float(mean(values) > target)
    from scipy import stats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values that are nearly equal
        return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def welch_test_below(a: list[float], b: list[float]) -> float | None:
    """p-value of Welch's one-sided t-test that the mean of a is below that of b; None if it can't be tested."""
    deviations = [deviation(a), deviation(b)]
    if None in deviations:
        return None
    if deviations == [0, 0]:
        return float(mean(a) >= mean(b))
    from scipy import stats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue)


def difference(new: dict, old: dict) -> tuple[float, float | None, str]:
    """Compares two samples, given as values by seed.

    Returns (mean of new - mean of old, two-sided p-value or None, the name of the test or why there was none). The
    test is paired if both samples have the same seeds, else it is Welch's.
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
        how = "Welch"
        has_spread = deviation(a) or deviation(b)
        one_sided = welch_test_below(a, b) if has_spread else None
    if one_sided is None:
        return apart, None, "a test needs 2 runs of each, and a spread"
    return apart, min(1.0, 2 * min(one_sided, 1 - one_sided)), how


def runs_needed(sd: float, margin: float, p: float, power: float | None = None) -> int:
    """The fewest runs with which the one-sample t-test gives at most p.

    sd: standard deviation of the final loss; margin: how far its mean lies below the target. Without power, the sample
    is taken to have exactly this mean and deviation; with power, the test must succeed with at least this probability.
    Raises UserError if more than a million runs are needed.
    """
    import numpy as np
    from scipy import stats

    def enough(n):
        critical = stats.t.isf(p, n - 1)
        shift = margin * np.sqrt(n) / sd
        if power is None:
            return shift >= critical
        return stats.nct.cdf(critical, n - 1, shift) <= 1 - power

    for candidates in (np.arange(2, 1000), np.arange(1000, 10_000), np.arange(10_000, 1_000_001, 1000)):
        found = candidates[enough(candidates)]
        if len(found):
            return int(found[0])
    raise UserError(f"--sd {sd} and --margin {margin} need more than a million runs")

"""Mean, standard deviation and t-tests. scipy is imported when needed: it takes a second."""
import math
import statistics
import warnings

from data import UserError


def mean(values: list[float]) -> float | None:
    """Mean of the values; None if there are none."""
    return statistics.fmean(values) if values else None


def deviation(values: list[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values or if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def spread(values: list[float], form: str = ".4f") -> str:
    """`mean ± standard deviation (n = number)`; the deviation is left out if there is none."""
    sd = deviation(values)
    plus_minus = "" if sd is None else f" ± {sd:{form}}"
    return f"{mean(values):{form}}{plus_minus} (n = {len(values)})"


def p_value(test: str, *samples, **options) -> float:
    """The one-sided p-value of a test in scipy.stats: that the mean is lower."""
    from scipy import stats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of values that are nearly equal
        return float(getattr(stats, test)(*samples, alternative="less", **options).pvalue)


def t_test_below(values: list[float], target: float) -> float | None:
    """p-value of the one-sample t-test that the mean is below target; None if untestable."""
    sd = deviation(values)
    if sd is None:
        return None
    if sd == 0:  # scipy gives NaN
        return float(mean(values) > target)
    return p_value("ttest_1samp", values, target)


def welch_test_below(a: list[float], b: list[float]) -> float | None:
    """p-value of Welch's t-test that the mean of a is below that of b; None if untestable."""
    deviations = [deviation(a), deviation(b)]
    if None in deviations:
        return None
    if deviations == [0, 0]:
        return float(mean(a) >= mean(b))
    return p_value("ttest_ind", a, b, equal_var=False)


def difference(new: dict, old: dict) -> tuple[float, float | None, str]:
    """Compares two samples, given as values by seed.

    The test is paired if both have the same seeds, else it is Welch's. Returns (mean of new - mean
    of old, two-sided p-value or None, the name of the test or why there was none).
    """
    a = list(new.values())
    b = list(old.values())
    apart = mean(a) - mean(b)
    if len(new) > 1 and new.keys() == old.keys():
        pairs = [new[seed] - old[seed] for seed in new]
        how = f"paired by seed, {len(pairs)} pairs"
        if not deviation(pairs):
            return apart, None, f"{how} without spread"
        one_sided = t_test_below(pairs, 0.0)
    else:
        how = "Welch"
        one_sided = welch_test_below(a, b) if deviation(a) or deviation(b) else None
    if one_sided is None:
        return apart, None, "a test needs 2 runs of each, and a spread"
    return apart, min(1.0, 2 * min(one_sided, 1 - one_sided)), how


def runs_needed(sd: float, margin: float, p: float, power: float | None = None) -> int:
    """The fewest runs with which the one-sample t-test gives at most p.

    sd: standard deviation of the final loss; margin: how far its mean lies below the target.
    Without power, the sample is taken to have exactly this mean and deviation; with power, the test
    must succeed with at least this probability. Raises UserError beyond a million runs.
    """
    import numpy as np
    from scipy import stats

    for n in (np.arange(2, 1000), np.arange(1000, 10_000), np.arange(10_000, 1_000_001, 1000)):
        critical = stats.t.isf(p, n - 1)
        shift = margin * np.sqrt(n) / sd
        if power is None:
            enough = n[shift >= critical]
        else:
            enough = n[stats.nct.cdf(critical, n - 1, shift) <= 1 - power]
        if len(enough):
            return int(enough[0])
    raise UserError(f"--sd {sd} and --margin {margin} need more than a million runs")

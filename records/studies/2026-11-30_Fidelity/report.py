"""The report of study.py: what each idea gained on each track, and how that agrees with the
published gains."""
import math
import re
from pathlib import Path

import numpy as np
from scipy import stats

SHORTER = 0.8  # steps of the point "shorter", as a share of the base's
RESAMPLES = 10_000
FAMILY_COLORS = {"architecture": "tab:blue", "embeddings": "tab:green", "loss": "tab:red",
                 "optimizer": "tab:orange", "schedule": "tab:purple", "data": "tab:brown"}


# --- Losses of the logs, gains --------------------------------------------------------------------


def losses(folder: Path) -> dict[int, float]:
    """The final validation loss of each seed."""
    found = {}
    for log in folder.glob("seed*.txt"):
        values = re.findall(r"^step:(\d+)/\1 val_loss:(\S+)", log.read_text(), re.MULTILINE)
        if values:
            found[int(log.stem.removeprefix("seed"))] = float(values[-1][1])
    return found


def paired(a: dict[int, float], b: dict[int, float]) -> np.ndarray:
    """a - b for each seed that both have."""
    return np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def slope_of(track: str, out: Path) -> float:
    """How much lower the final loss is with one per cent more steps, from "shorter" and "base"."""
    differences = paired(losses(out / track / "shorter"), losses(out / track / "base"))
    return float(differences.mean()) / (100 * (1 - SHORTER))


def gains_of(track: str, rows: list[dict], out: Path) -> list[dict]:
    """What each idea gained on a track, best first; ideas with fewer than two seeds are left out.

    gain is the loss without the idea minus the loss with it, so a positive gain is good. "in": the
    patch puts the idea into the base script; "out": it takes it out. margin is half of the 95 %
    interval. gain_percent is the gain in per cent of the base's steps, by slope_of."""
    base = losses(out / track / "base")
    slope = slope_of(track, out)
    found = []
    for row in rows:
        if row[track] not in ("in", "out"):
            continue
        sign = 1 if row[track] == "out" else -1
        gains = sign * paired(losses(out / track / row["idea"]), base)
        if len(gains) < 2:
            continue
        error = gains.std(ddof=1) / math.sqrt(len(gains))
        found.append(dict(
            idea=row["idea"], family=row["family"], kind=row["kind"], direction=row[track],
            published=float(row["published"] or "nan"), gains=gains, gain=gains.mean(), error=error,
            margin=error * stats.t.ppf(0.975, len(gains) - 1),
            gain_percent=gains.mean() / slope, error_percent=error / slope))
    return sorted(found, key=lambda g: -g["gain"])


def with_published(gains: list[dict]) -> list[dict]:
    """The ideas that have a published gain."""
    return [g for g in gains if not math.isnan(g["published"])]


# --- Statistics -----------------------------------------------------------------------------------


def noise(gains: list[dict]) -> float:
    """The standard deviation of one seed's gain, pooled over the ideas."""
    squares = sum(((g["gains"] - g["gain"]) ** 2).sum() for g in gains)
    return math.sqrt(squares / sum(len(g["gains"]) - 1 for g in gains))


def smallest_effect(sd: float, n: int) -> float:
    """The gain that n seeds show with 80 % probability: their 95 % interval does not contain 0."""
    return sd / math.sqrt(n) * (stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    """Spearman's correlation, its 95 % interval by bootstrap over the pairs, and the one-sided
    p-value by permutation."""
    rho = stats.spearmanr(a, b).statistic
    random = np.random.default_rng(0)
    picks = random.integers(len(a), size=(RESAMPLES, len(a)))
    resampled = correlate_rows(stats.rankdata(a[picks], axis=1), stats.rankdata(b[picks], axis=1))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    shuffled = random.permuted(np.tile(stats.rankdata(b), (RESAMPLES, 1)), axis=1)
    by_chance = correlate_rows(np.tile(stats.rankdata(a), (RESAMPLES, 1)), shuffled)
    return rho, low, high, float(np.mean(by_chance >= rho - 1e-9))


def correlate_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The correlation of each row of a with the same row of b."""
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a row of equal values
        return (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1))


def correlation_of_a_perfect_track(gains: list[dict]) -> tuple[float, float]:
    """Mean and 2.5 % quantile of the rank correlation if each idea gained exactly what was
    published, measured with this track's errors."""
    published = np.array([g["published"] for g in gains])
    errors = np.array([g["error_percent"] for g in gains])
    noisy = published + errors * np.random.default_rng(0).standard_normal((RESAMPLES, len(gains)))
    found = correlate_rows(np.tile(stats.rankdata(published), (RESAMPLES, 1)),
                           stats.rankdata(noisy, axis=1))
    return found.mean(), np.percentile(found, 2.5)


def agreement(gains: list[dict]) -> str:
    """How many signs agree with the published ones, which are all positive, as cells of a table:
    ideas, positive gains, gains above 0 and below 0 at 95 %."""
    better = sum(g["gain"] > 0 for g in gains)
    shown = sum(g["gain"] > g["margin"] for g in gains)
    worse = sum(g["gain"] < -g["margin"] for g in gains)
    return f"{len(gains)} | {better} | {shown} | {worse}"


# --- Output ---------------------------------------------------------------------------------------


def print_gains(gains: list[dict]) -> None:
    """The gains of a track as a table."""
    print("| idea | family | in or out | published, % of steps | gain in loss ± standard error | "
          "95 % interval | in % of steps | runs |")
    print("|---|---|---|---|---|---|---|---|")
    for g in gains:
        published = "" if math.isnan(g["published"]) else f"{g['published']:.1f} ({g['kind']})"
        print(f"| {g['idea']} | {g['family']} | {g['direction']} | {published} "
              f"| {g['gain']:+.4f} ± {g['error']:.4f} "
              f"| {g['gain'] - g['margin']:+.4f} to {g['gain'] + g['margin']:+.4f} "
              f"| {g['gain_percent']:+.1f} ± {g['error_percent']:.1f} | {len(g['gains'])} |")


def print_noise(gains: list[dict], slope: float) -> None:
    """How large an effect n seeds can show."""
    sd = noise(gains)
    effects = [f"{n} seeds: {smallest_effect(sd, n):.4f} ({smallest_effect(sd, n) / slope:.1f} %)"
               for n in (2, 4, 8, 16, 32)]
    print(f"\nNoise: one seed's gain has a standard deviation of {sd:.4f} ({sd / slope:.1f} % of the "
          f"steps). Smallest gain that is shown with 80 % probability: {'; '.join(effects)}\n")


def print_agreement(gains: list[dict]) -> None:
    """Signs and rank correlation with the published gains, for all ideas and by family."""
    print("| ideas | number | gain above 0 | shown above 0 | shown below 0 "
          "| Spearman, 95 % interval | p |")
    print("|---|---|---|---|---|---|---|")
    groups = {"all": gains,
              "published as steps or loss": [g for g in gains if g["kind"] in ("steps", "loss")],
              "published gain below 5 %": [g for g in gains if g["published"] < 5]}
    for family in sorted({g["family"] for g in gains}):
        groups[family] = [g for g in gains if g["family"] == family]
    for name, group in groups.items():
        text = "| |"
        if len(group) >= 5:
            rho, low, high, p = rank_correlation(np.array([g["published"] for g in group]),
                                                 np.array([g["gain_percent"] for g in group]))
            text = f"| {rho:+.2f} ({low:+.2f} to {high:+.2f}) | {p:.3f} |"
        print(f"| {name} | {agreement(group)} {text}")
    mean, low = correlation_of_a_perfect_track(gains)
    print(f"\nA track on which each idea gains what was published would show, with these errors, a "
          f"correlation of {mean:+.2f} on average, and 97.5 % of the time more than {low:+.2f}.")


def write_families(published: dict[str, list[dict]], path: Path) -> None:
    """The table that `tools/compare ab` reads: for each track and family, the number of ideas, of
    those with the published sign, and of those whose 95 % interval also lies on that side."""
    lines = ["track\tfamily\tideas\tsame_sign\tshown"]
    for track, gains in published.items():
        for family in sorted({g["family"] for g in gains}):
            group = [g for g in gains if g["family"] == family]
            ideas, better, shown, _ = agreement(group).split(" | ")
            lines.append(f"{track}\t{family}\t{ideas}\t{better}\t{shown}")
    path.write_text("\n".join(lines) + "\n")


def plot(gains_by_track: dict[str, list[dict]], path: Path) -> None:
    """Published against measured gains, both in per cent of the steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(gains_by_track), figsize=(7 * len(gains_by_track), 6.5),
                                squeeze=False)
    for ax, (track, gains) in zip(axes[0], gains_by_track.items(), strict=True):
        for g in gains:
            color = FAMILY_COLORS.get(g["family"], "black")
            ax.errorbar(g["published"], g["gain_percent"], yerr=g["margin"] * g["error_percent"] /
                        max(g["error"], 1e-12), fmt="o", color=color, capsize=2, lw=1, ms=4)
            ax.annotate(g["idea"], (g["published"], g["gain_percent"]), fontsize=7, color=color,
                        xytext=(4, 3), textcoords="offset points")
        ax.axhline(0, color="gray", lw=0.8)
        line = np.geomspace(0.25, 25)
        ax.plot(line, line, "--", color="gray", lw=0.8, label="measured = published")
        ax.set_xscale("log")
        ax.set_yscale("symlog", linthresh=10)
        ax.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        ticks = [-50, -20, -10, -5, 0, 5, 10, 20, 50]
        ax.set_yticks(ticks, [str(tick) for tick in ticks])
        ax.set_xlabel("published gain, % of steps (8 H100s)")
        ax.set_ylabel("measured gain, % of steps (95 % interval)")
        ax.set_title(track)
        for family, color in FAMILY_COLORS.items():
            ax.plot([], [], "o", color=color, ms=4, label=family)
    axes[0][0].legend(fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(args) -> None:
    """Print the tables of all tracks that have logs, and write the plot OUT/fidelity.png
    and the table OUT/families.tsv."""
    from study import read_table
    rows = read_table(args.table)
    published = {}
    for track in args.tracks.split(","):
        gains = gains_of(track, rows, args.out)
        if not gains:
            print(f"\n## {track}: no idea has runs with two seeds in {args.out}")
            continue
        slope = slope_of(track, args.out)
        base = losses(args.out / track / "base")
        print(f"\n## {track}: the base ends at {np.mean(list(base.values())):.4f}; one per cent of "
              f"the steps is {slope:.4f}\n")
        print_gains(gains)
        print_noise(gains, slope)
        published[track] = with_published(gains)
        if len(published[track]) >= 5:
            print_agreement(published[track])
    published = {track: gains for track, gains in published.items() if len(gains) >= 5}
    if len(published) > 1:
        first, second = ({g["idea"]: g["gain_percent"] for g in gains}
                         for gains in list(published.values())[:2])
        shared = sorted(first.keys() & second.keys())
        rho, low, high, p = rank_correlation(np.array([first[idea] for idea in shared]),
                                             np.array([second[idea] for idea in shared]))
        print(f"\nThe tracks with each other: {rho:+.2f} ({low:+.2f} to {high:+.2f}), p = {p:.3f}, "
              f"{len(shared)} ideas")
    if published:
        plot(published, args.out / "fidelity.png")
        write_families(published, args.out / "families.tsv")

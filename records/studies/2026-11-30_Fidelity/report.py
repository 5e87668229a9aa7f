"""The report of study.py: what each idea gained on each track, and how that agrees with the
published gains."""
import math
import re
from pathlib import Path

import numpy as np
from scipy import stats

SHORTER = 0.8  # see study.py


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


def gains_of_track(track: str, rows: list[dict], out: Path) -> tuple[list[dict], float, float]:
    """What each idea gained: (a dict per idea, loss of a per cent of the steps, base's loss).

    gain is the loss without the idea minus the loss with it, so a positive gain is good. "in": the
    patch puts the idea into the base script; "out": it takes it out. gain_percent is the gain in
    per cent of the base's steps, by the slope of the final loss over the steps of a whole run."""
    base = losses(out / track / "base")
    slope = paired(losses(out / track / "shorter"), base).mean() / (100 * (1 - SHORTER))
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
            idea=row["idea"], family=row["family"], direction=row[track], n=len(gains),
            published=float(row["published"]) if row["published"] else math.nan,
            kind=row["kind"], gain=gains.mean(), error=error, gains=gains,
            margin=error * stats.t.ppf(0.975, len(gains) - 1),  # half of the 95 % interval
            gain_percent=gains.mean() / slope, error_percent=error / slope))
    return found, slope, float(np.mean(list(base.values())))


def print_table(track: str, found: list[dict], slope: float, base_loss: float) -> None:
    """The gains of a track, best first."""
    print(f"\n## {track}: base {base_loss:.4f}; one per cent of the steps is {slope:.4f} of loss\n")
    print("| idea | family | in or out | published, % of steps | gain in loss ± standard error | "
          "95 % interval | in % of steps | runs |")
    print("|---|---|---|---|---|---|---|---|")
    for g in sorted(found, key=lambda g: -g["gain"]):
        published = "" if math.isnan(g["published"]) else f"{g['published']:.1f}"
        print(f"| {g['idea']} | {g['family']} | {g['direction']} | {published} "
              f"| {g['gain']:+.4f} ± {g['error']:.4f} "
              f"| {g['gain'] - g['margin']:+.4f} to {g['gain'] + g['margin']:+.4f} "
              f"| {g['gain_percent']:+.1f} ± {g['error_percent']:.1f} | {g['n']} |")


def report(args) -> None:
    """Print the tables of all tracks that have logs."""
    from study import read_table
    rows = read_table(args.table)
    for track in args.tracks.split(","):
        if (args.out / track / "base").exists():
            print_table(track, *gains_of_track(track, rows, args.out))

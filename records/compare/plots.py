"""Plots: validation loss against steps, tokens and training time, as a picture."""
from pathlib import Path

from .groups import Group, group_runs, labels_of
from .logs import UserError, find_runs
from .statistics import mean
from .text import count, shortened, visible

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
UNITS = {"laptop": "byte", "fineweb": "token", "": "token"}  # public logs name no track
MARKERS = "osD^vPX"


def curves_of(group: Group) -> list[tuple[int, float, float, float, float | None]]:
    """At each step that all runs validated: step, mean, lowest and highest loss, mean training time in ms or None."""
    runs = group.runs or group.incomplete
    by_run = [{step: (loss, ms) for step, loss, ms in run.curve} for run in runs]
    points = []
    for step in sorted(set.intersection(*map(set, by_run))):
        losses, times = zip(*(points_of[step] for points_of in by_run), strict=True)
        # Before the time began again at zero, steps were not timed.
        timed = all(ms is not None for ms in times) and not any(step < run.restart_step for run in runs)
        points.append((step, mean(losses), min(losses), max(losses), mean(times) if timed else None))
    return points


def unit_of(groups: list[Group]) -> str:
    """Of what the loss is an average: bytes or tokens; empty where that differs, or is not known."""
    units = {UNITS.get(group.any.track, "") for group in groups}
    return units.pop() if len(units) == 1 else ""


def plot(args) -> int:
    """Validation loss against steps, tokens where known, and training time."""
    if Path(args.out).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .svg, .png or .pdf")
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; source .venv/bin/activate (./run.sh sets it up), then again") from None
    groups = group_runs(find_runs(args.paths)[0])
    groups = sorted((g for g in groups if g.runs) if any(g.runs for g in groups) else groups, key=lambda g: g.entry)
    tokens_known = all(group.stages for group in groups)
    axes_names = ["step", *(["tokens (millions)"] if tokens_known else []), "training time (seconds)"]
    labels = [f"{shortened(visible(label), 160)} ({count(len(group.runs), 'run')})".replace("$", r"\$")
              for group, label in zip(groups, labels_of(groups), strict=True)]
    width = 1 + 4.6 * len(axes_names)
    columns = max(1, min(3, len(labels), int(width / (0.7 + 0.09 * max(map(len, labels))))))
    figure, axes = plt.subplots(1, len(axes_names), figsize=(width, 4.4 + 0.24 * -(-(len(labels) + 1) // columns)),
                                layout="constrained", sharey=True, squeeze=False)
    finals = []
    for number, (group, label) in enumerate(zip(groups, labels, strict=True)):
        points = curves_of(group)
        turn = number // len(PALETTE)  # the colours begin again with other markers
        look = dict(color=PALETTE[number % len(PALETTE)], marker=MARKERS[(number + turn) % len(MARKERS)], markersize=4)
        for axis, name in zip(axes[0], axes_names, strict=True):
            if name == "step":
                shown = [(point[0], *point[1:4]) for point in points]
            elif name.startswith("tokens"):
                shown = [(group.tokens_before(point[0]) / 1e6, *point[1:4]) for point in points]
            else:
                shown = [(point[4] / 1000, *point[1:4]) for point in points if point[4] is not None]
            if shown:
                x, middle, low, high = zip(*shown, strict=True)
                axis.plot(x, middle, label=label if name == "step" else None, linewidth=1.6, **look)
                axis.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        finals += [point[2] for point in points[-1:]]
    targets = {group.any.target if args.target is None else args.target for group in groups}
    for axis, name in zip(axes[0], axes_names, strict=True):
        for target in targets:
            axis.axhline(target, color="#555555", linestyle="--", linewidth=1,
                         label=f"target {target:g}" if name == "step" else None)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])  # a point at zero is seen whole
    floor = min([*finals, *targets])
    points = [point for group in groups for point in curves_of(group)]
    top = max(point[1] for point in [point for point in points if point[0] > 0] or points)  # at step 0 it is far above
    told = f" a {unit}" if (unit := unit_of(groups)) else ""
    margin = 0.04 * (top - floor) or 0.01
    axes[0][0].set(ylabel=f"validation loss (nats{told})", ylim=(floor - margin, top + margin))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle("Validation loss: mean over runs; the band reaches from the lowest to the highest")
    figure.savefig(args.out, dpi=130)
    print(args.out)
    return 0

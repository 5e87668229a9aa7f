"""Plots: validation loss against steps, tokens and training time."""
from pathlib import Path
from typing import NamedTuple

from .groups import Group, group_runs, labels_of
from .logs import UserError, find_runs
from .stats import mean
from .text import count, shortened, visible

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe, Ito
MARKERS = "osD^vPX"
UNITS = {"laptop": "byte", "fineweb": "token", "": "token"}  # public logs name no track
PACE_RUNS = 12  # curves of milliseconds per step, per group


class CurvePoint(NamedTuple):
    """The runs of a group at one step."""
    step: int
    mean: float         # validation loss in nats
    low: float
    high: float
    ms: float | None    # mean training time
    tokens: int | None  # read by one run so far


def curves_of(group: Group) -> list[CurvePoint]:
    """A point for each step that all runs of a group validated."""
    runs = group.runs or group.incomplete
    by_step = [{step: (loss, ms) for step, loss, ms in run.curve} for run in runs]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        losses = [curve[step][0] for curve in by_step]
        times = [curve[step][1] for curve in by_step]
        # The steps before the time began again at zero were not timed.
        timed = None not in times and all(step >= run.restart_step for run in runs)
        points.append(CurvePoint(step, mean(losses), min(losses), max(losses),
                                 mean(times) if timed else None, group.tokens_before(step)))
    return points


def loss_label(groups: list[Group]) -> str:
    """The label of the loss axis, with its unit if all groups share one."""
    units = {UNITS.get(group.any.track, "") for group in groups}
    unit = units.pop() if len(units) == 1 else ""
    return f"validation loss (nats a {unit})" if unit else "validation loss (nats)"


def draw(groups: list[Group], labels: list[str], target: float | None, columns: int = 0,
         pace: bool = False):
    """A matplotlib figure with the curves of groups.

    target: a loss to mark; None marks each group's own. columns: panels side by side (0: all of
    them). pace: adds a panel with the time of a step. Raises UserError if matplotlib is missing.
    """
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; run `source .venv/bin/activate` (./run.sh sets it up)") from None
    curves = [curves_of(group) for group in groups]
    targets = {group.any.target if target is None else target for group in groups}
    # For each panel: the label of its x axis, and x of a point (None: not drawn).
    panels = {"step": lambda point: point.step}
    if all(point.tokens is not None for points in curves for point in points):
        panels["tokens (millions)"] = lambda point: point.tokens / 1e6
    panels["training time (seconds)"] = lambda point: None if point.ms is None else point.ms / 1000
    number = len(panels) + pace
    columns = columns or number
    rows = -(-number // columns)
    names = [visible(shortened(label, 160)).replace("$", r"\$") + f" ({count(len(group.runs), 'run')})"
             for group, label in zip(groups, labels, strict=True)]
    width = 1 + 4.6 * columns
    legend_columns = max(1, min(3, len(names), int(width / (0.7 + 0.09 * max(map(len, names))))))
    legend_rows = -(-(len(names) + 1) // legend_columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width, 4.2 * rows + 0.24 * legend_rows + 0.3),
                                layout="constrained", squeeze=False)
    axes = list(axes.flat)
    for axis, (x_label, x_of) in zip(axes, panels.items(), strict=False):
        first = axis is axes[0]
        for i, points in enumerate(curves):
            shown = [point for point in points if x_of(point) is not None]
            xs = [x_of(point) for point in shown]
            colour = PALETTE[i % len(PALETTE)]
            # When the colours begin again, they come with other markers.
            marker = MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]
            axis.plot(xs, [point.mean for point in shown], color=colour, marker=marker, markersize=4,
                      linewidth=1.6, label=names[i] if first else None)
            axis.fill_between(xs, [point.low for point in shown], [point.high for point in shown],
                              color=colour, alpha=0.2, linewidth=0)
        for loss in targets:
            axis.axhline(loss, color="#555555", linestyle="--", linewidth=1,
                         label=f"target {loss:g}" if first else None)
        axis.set(xlabel=x_label, ylabel=loss_label(groups), ylim=loss_limits(curves, targets))
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])  # shows the marker at zero whole
    if pace:
        draw_pace(axes[number - 1], groups)
    for axis in axes[:number]:
        axis.grid(alpha=0.3)
    for axis in axes[number:]:
        axis.set_visible(False)
    figure.legend(loc="outside lower center", ncols=legend_columns, frameon=False)
    figure.suptitle("Validation loss: mean over runs, band from lowest to highest")
    return figure


def loss_limits(curves: list[list[CurvePoint]], targets: set[float]) -> tuple[float, float]:
    """The range of the loss axis: from the lowest final loss to the first point after step 0, whose
    loss would press everything else to the bottom.
    """
    points = [point for curve in curves for point in curve]
    after_start = [point for point in points if point.step > 0] or points
    top = max([point.mean for point in after_start], default=max(targets) + 1)
    floor = min([*targets, *(curve[-1].mean for curve in curves if curve)])
    margin = 0.04 * (top - floor) or 0.01
    if not -1e9 < top - floor < 1e9:  # a loss is not finite
        return min(targets) - 1, max(targets) + 1
    return floor - margin, top + margin


def draw_pace(axis, groups: list[Group]) -> None:
    """Draws the time of a step over each run, to show stalls."""
    usual = []
    for i, group in enumerate(groups):
        for run in (group.runs or group.incomplete)[:PACE_RUNS]:
            intervals = run.pace.intervals(after=run.restart_step)
            usual += [ms for _, ms in intervals]
            axis.plot([step for step, _ in intervals], [ms for _, ms in intervals], linewidth=0.8,
                      color=PALETTE[i % len(PALETTE)])
    axis.set(xlabel="step", ylabel="time of a step (ms)")
    if usual:
        median = sorted(usual)[len(usual) // 2]
        axis.set_ylim(0, min(4 * median, 1.08 * max(usual)) or 1)


def plot(args) -> int:
    """Draws the validation loss against steps, tokens (if all logs state them) and training time."""
    if Path(args.out).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .svg, .png or .pdf")
    groups = group_runs(find_runs(args.paths)[0])
    groups = [group for group in groups if group.runs] or groups
    groups.sort(key=lambda group: group.entry)
    draw(groups, labels_of(groups), args.target).savefig(args.out, dpi=130)
    print(args.out)
    return 0

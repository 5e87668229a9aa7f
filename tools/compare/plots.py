"""Plots: validation loss against steps, tokens and training time."""
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data import UserError

from .groups import Group, group_runs, labels_of
from .logs import find_runs
from .stats import mean
from .text import count, shortened, visible

# The palette of Okabe and Ito.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
UNITS = {"laptop": "byte", "fineweb": "token", "": "token"}  # public logs name no track


class CurvePoint(NamedTuple):
    """The runs of a group at one step."""
    step: int
    mean: float         # validation loss in nats
    low: float
    high: float
    ms: float | None    # mean training time
    tokens: int | None  # that one run has read so far


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
                                 mean(times) if timed else None, runs[0].tokens_before(step)))
    return points


def draw(groups: list[Group], labels: list[str], target: float | None):
    """A matplotlib figure with the curves of groups.

    target: a loss to mark; None marks each group's own. Raises UserError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks letters of a name
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; run `source .venv/bin/activate` (./run.sh sets it up)") from None
    curves = [curves_of(group) for group in groups]
    targets = {group.any.target if target is None else target for group in groups}
    names = [f"{shortened(visible(label), 160)} ({count(len(group.runs), 'run')})"
             for group, label in zip(groups, labels, strict=False)]
    panels = panels_for(curves)
    width = 1 + 4.6 * len(panels)
    inches_of_a_name = 0.7 + 0.09 * max(map(len, names))
    columns = max(1, min(3, len(names), int(width / inches_of_a_name)))
    rows = math.ceil((len(names) + 1) / columns)
    # pyplot would keep the figure in memory.
    figure = Figure(figsize=(width, 4.4 + 0.24 * rows), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (x_label, x_of) in zip(axes, panels.items(), strict=True):
        for number, points in enumerate(curves):
            draw_curve(axis, points, x_of, number, names[number])
        for loss in targets:
            axis.axhline(
                loss, color="#555555", linestyle="--", linewidth=1, label=f"target {loss:g}")
        axis.set(xlabel=x_label)
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])  # shows the marker at zero whole
        axis.grid(alpha=0.3)
    units = {UNITS.get(group.any.track, "") for group in groups}
    unit = ""
    if len(units) == 1 and "" not in units:
        unit = f" a {units.pop()}"
    axes[0].set(ylabel=f"validation loss (nats{unit})", ylim=loss_limits(curves, targets))
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle("Validation loss: mean over runs, band from lowest to highest")
    return figure


def panels_for(curves: list[list[CurvePoint]]) -> dict[str, Callable]:
    """For each panel, the label of its x axis and a function that gives x of a point, or None if
    the point is not drawn there."""
    panels = {"step": lambda point: point.step}
    if all(point.tokens is not None for points in curves for point in points):
        panels["tokens (millions)"] = lambda point: point.tokens / 1e6
    panels["training time (seconds)"] = lambda point: None if point.ms is None else point.ms / 1000
    return panels


def draw_curve(axis, points: list[CurvePoint], x_of: Callable, number: int, name: str) -> None:
    """Draw the mean and the band of a group. number: its place in the figure, for its colour."""
    shown = [point for point in points if x_of(point) is not None]
    xs = [x_of(point) for point in shown]
    colour = COLOURS[number % len(COLOURS)]
    # When the colours begin again, they come with other markers.
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    axis.plot(
        xs,
        [point.mean for point in shown],
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.6,
        label=name.replace("$", r"\$"))
    axis.fill_between(
        xs,
        [point.low for point in shown],
        [point.high for point in shown],
        color=colour,
        alpha=0.2,
        linewidth=0)


def loss_limits(curves: list[list[CurvePoint]], targets: set[float]) -> tuple[float, float]:
    """The range of the loss axis: from the lowest final loss to the highest after step 0.

    The loss at step 0 is so high that it would press everything else to the bottom.
    """
    points = [point for curve in curves for point in curve]
    after_start = [point for point in points if point.step > 0] or points
    losses = [*(point.mean for point in after_start), *targets]
    finals = [*(curve[-1].mean for curve in curves if curve), *targets]
    top = max(filter(math.isfinite, losses), default=1.0)
    floor = min(filter(math.isfinite, finals), default=0.0)
    margin = 0.04 * (top - floor) or 0.01
    return floor - margin, top + margin


def plot(args) -> int:
    """Draws the validation loss against steps, tokens (if the logs state them) and time."""
    if Path(args.out).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .svg, .png or .pdf")
    groups = group_runs(find_runs(args.paths)[0])
    groups = [group for group in groups if group.runs] or groups
    groups.sort(key=lambda group: group.any.entry)
    draw(groups, labels_of(groups), args.target).savefig(args.out, dpi=130)
    print(visible(args.out))
    return 0

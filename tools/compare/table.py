"""Table: one row for each group of comparable runs."""
import json
import math
import sys

from .groups import Group, claims_of, first_at_target, group_runs, labels_of
from .logs import find_runs, why_incomplete
from .stats import deviation, mean, t_test_below
from .text import seconds, shortened, visible

WIDTH = 120  # columns of a terminal
MAX_NOTES = 12
# The columns without --all.
SHORT = ("entry", "track", "runs", "steps", "val loss", "p", "training time", "device")


def finite(value: float | None) -> float | None:
    """The value, or None if it is NaN or infinite, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None


def row_of(group: Group, label: str, target: float | None, claim: bool = False) -> dict:
    """A group as `table --json` prints it; times are in milliseconds, losses in nats."""
    run = group.any
    target = run.target if target is None else target
    reached = [] if run.partial else first_at_target(group, target)
    tokens = [run.tokens_before(point[0]) for run, point in reached]
    times = [point[2] for _, point in reached if point[2] is not None]
    incomplete = []
    for broken in group.incomplete:
        last_val_step, last_val_loss, _ = broken.curve[-1] if broken.curve else (None, None, None)
        incomplete.append({"path": broken.path, "last_step": broken.last_step,
                           "last_val_step": last_val_step, "last_val_loss": finite(last_val_loss)})
    return {
        "path": group.path,
        "entry": run.entry,
        "label": label,
        "track": run.track,
        "claim": claim,
        "code_hash": run.code_hash,
        "gpu": run.gpu,
        "world_size": run.world_size,
        "torch": group.torch,
        "steps": run.steps,
        "runs": len(group.runs),
        "incomplete": len(group.incomplete),
        "duplicates": len(group.duplicates),
        "target": target,
        "val_loss_mean": finite(mean(group.losses)),
        "val_loss_sd": finite(deviation(group.losses)),
        "held_out_loss_mean": finite(mean(group.held_out_losses)),
        "held_out_loss_sd": finite(deviation(group.held_out_losses)),
        "p_value": None if run.partial else finite(t_test_below(group.losses, target)),
        "train_time_ms_mean": finite(mean(group.times)),
        "train_time_ms_sd": finite(deviation(group.times)),
        "step_avg_ms": finite(mean(group.step_averages)),
        "logs": [run.path for run in group.runs],
        "incomplete_logs": incomplete,
        "duplicate_logs": [run.path for run in group.duplicates],
        "reached": len(reached),
        "tokens_to_target": None if None in tokens else finite(mean(tokens)),
        "train_time_ms_to_target": finite(mean(times)),
    }


def cells_of(row: dict) -> dict[str, str]:
    """A row of row_of as texts by column name."""
    def text(name, form):
        return "" if row[name] is None else form.format(row[name])

    time_sd = "" if row["train_time_ms_sd"] is None else f" ± {row['train_time_ms_sd'] / 1000:.1f}"
    tokens = row["tokens_to_target"]
    incomplete = f" (+{row['incomplete']} incomplete)" if row["incomplete"] else ""
    cells = {
        "entry": row["label"],
        "track": row["track"] or "unknown",
        "runs": f"{row['runs']}{incomplete}",
        "steps": text("steps", "{}"),
        "val loss": text("val_loss_mean", "{:.4f}") + text("val_loss_sd", " ± {:.4f}"),
        "held-out loss": (text("held_out_loss_mean", "{:.4f}")
                          + text("held_out_loss_sd", " ± {:.4f}")),
        "target": text("target", "{:g}"),
        "p": text("p_value", "{:.2g}"),
        "training time": seconds(row["train_time_ms_mean"]) + time_sd,
        "step": text("step_avg_ms", "{:.2f} ms"),
        "met by": f"{row['reached']} of {row['runs']}",
        "to target": seconds(row["train_time_ms_to_target"]),
        "tokens to target": "" if tokens is None else f"{tokens / 1e6:.2f} M",
        "device": f"{row['world_size'] or '?'} x {row['gpu'] or '?'}",
        "torch": row["torch"] or "",
        "code": row["code_hash"] or "",
    }
    return {name: visible(cell) for name, cell in cells.items()}


def columns_of(rows: list[dict[str, str]]) -> list[str]:
    """The columns that are not empty; the track only if there are several."""
    several_tracks = len({row["track"] for row in rows}) > 1
    return [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)
            and (name != "track" or several_tracks)]


def print_markdown(rows: list[dict[str, str]]) -> None:
    """Prints rows as a Markdown table."""
    names = columns_of(rows)
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(row[name].replace("|", "\\|") for name in names) + " |")


def print_columns(rows: list[dict[str, str]], everything: bool) -> None:
    """Prints rows in aligned columns; unless everything is set, only as much as fits a terminal."""
    names = columns_of(rows)
    if not everything:
        names = [name for name in names if name in SHORT]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    if not everything:
        others = sum(2 + width for name, width in widths.items() if name != "entry")
        widths["entry"] = min(widths["entry"], max(40, WIDTH - others))
    for row in [{name: name for name in names}, *rows]:
        cells = [shortened(row[name], widths[name]).ljust(widths[name]) for name in names]
        line = "  ".join(cells).rstrip()
        print(line if everything else shortened(line, WIDTH))


def table(args) -> int:
    """Prints one row for each entry's claim, by track and date. With --all, or if no log belongs to
    an entry, prints a row for every group of comparable runs, the fastest first.
    """
    runs, remarks = find_runs(args.paths)
    groups = group_runs(runs)
    claims = claims_of(groups)
    claimed = {id(group) for group in claims}
    labels = {id(group): label for group, label in zip(groups, labels_of(groups), strict=True)}
    shown = groups if args.all or args.json or not claims else claims
    rows = [row_of(group, labels[id(group)], args.target, id(group) in claimed) for group in shown]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif args.markdown:
        print_markdown([cells_of(row) for row in rows])
    else:
        print_columns([cells_of(row) for row in rows], args.all)
    notes = notes_on(shown) + remarks
    if len(notes) > MAX_NOTES and not (args.all or args.json):
        hidden = len(notes) - MAX_NOTES + 1
        notes = notes[:MAX_NOTES - 1] + [f"... and {hidden} more notes (--all)"]
    if shown is claims and len(claims) > 1:
        notes.append("these rows were not all run alternately or on one day; to compare two times, "
                     "use `verify ENTRY`, whose baseline/ was run alternately with it")
    if left := len(groups) - len(shown):
        notes.append(f"{left} other groups of runs (ablations, trials, baselines, studies): --all")
    if notes:
        print("", *map(visible, notes), sep="\n", file=sys.stderr if args.json else sys.stdout)
    return 0


def notes_on(groups: list[Group]) -> list[str]:
    """Which logs do not count, and why."""
    partial = [group for group in groups if group.any.partial]
    incomplete = [run for group in groups for run in group.incomplete]
    duplicates = [run for group in groups for run in group.duplicates]
    return [*(f"no result: {group.path}: its validations read only a part of the track's tokens"
              for group in partial),
            *(f"incomplete: {run.path}: {why_incomplete(run)}" for run in incomplete),
            *(f"duplicate: {run.path}, counted once" for run in duplicates)]

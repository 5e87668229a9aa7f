"""Table: a row for each group of comparable runs."""
import json
import sys

from .groups import Group, claims_of, first_at_target, group_runs, labels_of
from .logs import find_runs, why_incomplete
from .statistics import deviation, mean, t_test_below
from .text import finite, seconds, shortened, visible

WIDTH = 120  # columns of a terminal
NOTES = 12    # lines below the table
LEFT_OUT_FIRST = ("code", "torch", "step", "target", "tokens to target", "met by", "to target", "device", "p")


def row_of(group: Group, label: str, target: float | None, claim: bool = False) -> dict:
    """A group as `table --json` prints it."""
    run = group.any
    target = run.target if target is None else target
    return {
        "path": group.path, "entry": group.entry,
        "label": label, "track": run.track, "claim": claim,
        "code_hash": run.code_hash, "gpu": run.gpu, "world_size": run.world_size, "torch": run.torch,
        "steps": run.steps, "runs": len(group.runs), "incomplete": len(group.incomplete),
        "duplicates": len(group.duplicates), "target": target, "val_loss_mean": finite(mean(group.losses)),
        "val_loss_sd": finite(deviation(group.losses)), "p_value": finite(t_test_below(group.losses, target)),
        "train_time_ms_mean": finite(mean(group.times)), "train_time_ms_sd": finite(deviation(group.times)),
        "step_avg_ms": finite(mean([run.step_avg_ms for run in group.runs if run.step_avg_ms is not None])),
        "logs": [run.path for run in group.runs],
        "incomplete_logs": [{"path": run.path, "last_step": run.last_step,
                             "last_val_step": run.curve[-1][0] if run.curve else None,
                             "last_val_loss": finite(run.curve[-1][1]) if run.curve else None}
                            for run in group.incomplete],
        "duplicate_logs": [run.path for run in group.duplicates],
        "reached": len(first_at_target(group, target)),
        "tokens_to_target": finite(mean([group.tokens_before(point[0]) for _, point in first_at_target(group, target)
                                         if group.stages])),
        "train_time_ms_to_target": finite(mean([point[2] for _, point in first_at_target(group, target)
                                                if point[2] is not None])),
    }


def cells_of(row: dict) -> dict[str, str]:
    """A row for people."""
    def number(value, form):
        return "" if value is None else format(value, form)
    sd, time_sd = row["val_loss_sd"], row["train_time_ms_sd"]
    cells = {
        "entry": row["label"], "track": row["track"] or "unknown",
        "runs": str(row["runs"]) + (f" (+{row['incomplete']} incomplete)" if row["incomplete"] else ""),
        "steps": number(row["steps"], "d"),
        "val loss": number(row["val_loss_mean"], ".4f") + ("" if sd is None else f" ± {sd:.4f}"),
        "target": f"{row['target']:g}", "p": number(row["p_value"], ".2g"),
        "training time": seconds(row["train_time_ms_mean"]) + ("" if time_sd is None else f" ± {time_sd / 1000:.1f}"),
        "step": "" if row["step_avg_ms"] is None else f"{row['step_avg_ms']:.2f} ms",
        "met by": f"{row['reached']} of {row['runs']}", "to target": seconds(row["train_time_ms_to_target"]),
        "tokens to target": "" if row["tokens_to_target"] is None else f"{row['tokens_to_target'] / 1e6:.2f} M",
        "device": f"{row['world_size'] or '?'} x {row['gpu'] or '?'}", "torch": row["torch"] or "",
        "code": row["code_hash"] or "",
    }
    return {name: visible(cell).replace("\n", "\\n") for name, cell in cells.items()}


def columns_of(rows: list[dict[str, str]]) -> list[str]:
    """The columns that tell something: the track only where there are several."""
    return [name for name in rows[0] if any(row[name] for row in rows)
            and (name != "track" or len({row["track"] for row in rows}) > 1)]


def print_table(rows: list[dict[str, str]], markdown: bool, width: int | None) -> None:
    """Rows of equal keys, in columns; of a width, if one is given, for which what is told least is left out."""
    names = columns_of(rows)
    if markdown:
        print("| " + " | ".join(names) + " |", "|" + "---|" * len(names), sep="\n")
        for row in rows:
            print("| " + " | ".join(row[name].replace("|", "\\|") for name in names) + " |")
        return
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    if width:
        least = min(widths["entry"], 40)  # a long name is cut before a column goes
        for name in LEFT_OUT_FIRST:
            if least + sum(2 + widths[n] for n in widths if n != "entry") > width:
                widths.pop(name, None)
        widths["entry"] = min(widths["entry"], max(least, width - sum(2 + widths[n] for n in widths if n != "entry")))
    for row in [{name: name for name in names}, *rows]:
        cells = [shortened(row[name], widths[name]).ljust(widths[name]) for name in widths]
        line = "  ".join(cells).rstrip()
        print(shortened(line, width) if width else line)


def table(args) -> int:
    """The entries' claims, a line each, by date; with --all, or where nothing is an entry's, a row for every group of
    comparable runs, the fastest first.
    """
    runs, remarks = find_runs(args.paths)
    groups = group_runs(runs)
    claims = claims_of(groups)
    labels = dict(zip(map(id, groups), labels_of(groups), strict=True))
    shown = groups if args.all or args.json or not claims else claims
    claimed = set(map(id, claims))
    rows = [row_of(group, labels[id(group)], args.target, id(group) in claimed) for group in shown]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table([cells_of(row) for row in rows], args.markdown, None if args.all else WIDTH)
    notes = [f"incomplete: {run.path}: {why_incomplete(run)}" for group in shown for run in group.incomplete]
    notes += [f"duplicate: {run.path}, counted once" for group in shown for run in group.duplicates]
    notes += remarks
    if len(notes) > NOTES and not (args.all or args.json):
        notes[NOTES - 1:] = [f"... and {len(notes) - NOTES + 1} notes more (--all)"]
    if shown is claims and len(claims) > 1:
        notes.append("not all rows were run in turn, or on one day: to compare times, verify ENTRY against its "
                     "baseline/, which was")
    if left := len(groups) - len(shown):
        notes.append(f"{left} other groups of runs (ablations, trials, baselines, studies): --all")
    if notes:
        print("", *map(visible, notes), sep="\n", file=sys.stderr if args.json else sys.stdout)
    return 0

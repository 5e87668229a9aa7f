"""Table: a row for each group of comparable runs."""
import json
import sys

from .groups import Group, common_path, first_at_target, group_runs
from .logs import find_runs, why_incomplete
from .statistics import deviation, mean, t_test_below
from .text import finite, seconds


def row_of(group: Group, target: float | None) -> dict:
    """A group as `table --json` prints it."""
    run = group.any
    target = run.target if target is None else target
    return {
        "path": common_path([*group.runs, *group.incomplete, *group.duplicates]), "entry": group.entry,
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
        "tokens_to_target": finite(mean([point[0] * run.step_tokens for run, point in first_at_target(group, target)
                                         if run.step_tokens])),
        "train_time_ms_to_target": finite(mean([point[2] for _, point in first_at_target(group, target)
                                                if point[2] is not None])),
    }


def cells_of(row: dict) -> dict[str, str]:
    """A row for people."""
    def number(value, form):
        return "" if value is None else format(value, form)
    sd, time_sd = row["val_loss_sd"], row["train_time_ms_sd"]
    return {
        "entry": row["entry"],
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


def print_table(rows: list[dict[str, str]], markdown: bool) -> None:
    """Rows of equal keys, in columns."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    if markdown:
        print("| " + " | ".join(names) + " |", "|" + "---|" * len(names), sep="\n")
        for row in rows:
            print("| " + " | ".join(row[name] for name in names) + " |")
        return
    for row in [{name: name for name in names}, *rows]:
        print("  ".join(row[name].ljust(width[name]) for name in names).rstrip())


def table(args) -> int:
    """One row per group of comparable runs."""
    runs, remarks = find_runs(args.paths)
    groups = group_runs(runs)
    rows = [row_of(group, args.target) for group in groups]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table([cells_of(row) for row in rows], args.markdown)
    out = sys.stderr if args.json else sys.stdout
    notes = [f"incomplete: {run.path}: {why_incomplete(run)}" for group in groups for run in group.incomplete]
    notes += [f"duplicate: {run.path}, counted once" for group in groups for run in group.duplicates]
    notes += differing_settings(groups)
    if notes or remarks:
        print("", *notes, *remarks, sep="\n", file=out)
    return 0


def differing_settings(groups: list[Group]) -> list[str]:
    """Says in what groups of the same code differ."""
    notes = []
    for code in dict.fromkeys(group.any.code_hash for group in groups):
        same = [group for group in groups if group.any.code_hash == code]
        configs = [group.any.config for group in same]
        names = [name for name in configs[0] if any(config.get(name) != configs[0].get(name) for config in configs)]
        if code and names:
            notes += [f"code {code}: {len(group.runs + group.incomplete)} logs at "
                      f"{common_path(group.runs or group.incomplete)} have "
                      + ", ".join(f"{name} {config.get(name)}" for name in names)
                      for group, config in zip(same, configs, strict=True)]
    return notes

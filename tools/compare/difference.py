"""Difference: what the code, settings and results of two logs do not have in common."""
import difflib
import shlex
import sys
from pathlib import Path

from data import UserError

from .groups import Group, group_runs, same_seed
from .logs import Run, code_of, find_runs, why_incomplete
from .stats import spread
from .text import count, paint, visible
from .verdict import contrasts_of

COLOURS = {"@": 36, "-": 31, "+": 32}


def code_lines(run: Run) -> list[str]:
    """The lines of the embedded script; empty if the log embeds none."""
    return code_of(run).decode("utf-8", errors="replace").splitlines() if run.code_span else []


def code_diff(a: list[str], b: list[str], context: int = 3) -> list[str]:
    """A unified diff that ignores blank lines and changes of white space.

    Each line begins with '@', '-', '+' or a space. The result is empty if nothing differs.
    """
    a = [line for line in a if line.strip()]
    b = [line for line in b if line.strip()]
    squeezed = [["".join(line.split()) for line in lines] for lines in (a, b)]
    # difflib takes minutes for very long scripts unless it may skip frequent lines.
    matcher = difflib.SequenceMatcher(None, *squeezed, autojunk=max(len(a), len(b)) > 4_000)
    lines = []
    for group in matcher.get_grouped_opcodes(context):
        _, a_begin, _, b_begin, _ = group[0]
        _, _, a_end, _, b_end = group[-1]
        lines.append(f"@@ -{a_begin + 1},{a_end - a_begin} +{b_begin + 1},{b_end - b_begin} @@")
        for kind, i1, i2, j1, j2 in group:
            if kind == "equal":
                lines += [" " + line for line in b[j1:j2]]
            else:
                lines += ["-" + line for line in a[i1:i2]]
                lines += ["+" + line for line in b[j1:j2]]
    return lines


def diff(args) -> int:
    """Shows what differs between two logs: code, settings, environment, results. Of a folder one
    run is shown, with the same seed on both sides if possible, and the results of all its runs.
    """
    paths = [args.a, args.b]
    if all(path.endswith(".py") and Path(path).is_file() for path in paths):
        raise UserError(f"{args.a} and {args.b} are scripts, expected logs; to compare scripts: "
                        f"{shlex.join(['diff', '-u', *paths])}")
    sides = [fastest_group(path) for path in paths]
    runs = same_seed(*sides)
    for run in runs:
        if not run.complete:
            print(visible(f"note: {run.path} is incomplete: {why_incomplete(run)}"))
    print(visible(f"--- {runs[0].path}"))
    print(visible(f"+++ {runs[1].path}"))
    without_code = [run.path for run in runs if not run.code_span]
    changes = code_diff(*map(code_lines, runs))
    if without_code:
        print(visible(f"(no code in {without_code[0]})"))
    elif not changes:
        print("(the code is the same)")
    else:
        for line in changes:
            print(paint(line, COLOURS[line[0]]) if line[0] in COLOURS else visible(line))
    print()
    facts = [{**facts_of(run), **results_of(group)} for run, group in zip(runs, sides, strict=True)]
    for name, (old, new) in differing(facts).items():
        print(f"{visible(name)}: {paint(str(old), 31)} -> {paint(str(new), 32)}")
    if sides[0].runs and sides[1].runs:
        for contrast in contrasts_of(sides[1], sides[0]):
            print(contrast.line("B", "A"))
    return 0


def fastest_group(path: str) -> Group:
    """The fastest group below a path; a note is printed if there are others."""
    runs, remarks = find_runs([path], direct=True)
    for remark in remarks:
        print(visible(f"note: {remark}"))
    groups = group_runs(runs)
    fastest = groups[0]
    if len(groups) > 1:
        print(visible(f"note: {path} holds {len(groups)} groups of runs; the fastest is shown: "
                      f"{count(len(fastest.runs), 'run')} of code {fastest.any.code_hash}"))
    return fastest


def facts_of(run: Run) -> dict:
    """What a log says about settings (under the names of their flags) and environment."""
    return {**{f"--{name}": value for name, value in run.hyperparameters.items()},
            **{name: value for name, value in run.facts.items()
               if name not in ("hyperparameters", "command", "run_id")},
            "gpu": run.gpu, "world_size": run.world_size, "torch": run.torch, "steps": run.steps}


def results_of(group: Group) -> dict[str, str | None]:
    """Final loss, training time and step time of a group as texts; None if unknown."""
    def text(values, form):
        if len(values) > 1:
            return spread(values, form)
        return f"{values[0]:{form}}" if values else None

    return {"val_loss": text(group.losses, ".4f"), "train_time_ms": text(group.times, ".0f"),
            "step_avg_ms": text(group.step_averages, ".2f")}


def differing(facts: list[dict]) -> dict[str, list]:
    """The values of all facts that are not equal on all sides, by name."""
    found = {}
    for name in sorted({name for fact in facts for name in fact}):
        values = [fact.get(name) for fact in facts]
        if any(value != values[0] for value in values):
            found[name] = values
    return found


def extract(args) -> int:
    """Writes the script that a log embeds, byte for byte."""
    run, *others = find_runs([args.log])[0]
    if any(other.code_hash != run.code_hash for other in others):
        print(visible(f"note: {args.log} holds {len(others) + 1} runs; this is the script of the "
                      "first"), file=sys.stderr)
    code = code_of(run)
    out = Path(args.out)
    if out.exists() and out.read_bytes() != code:
        raise UserError(f"{out} exists and is another script; name a new file with -o")
    out.write_bytes(code)
    return 0

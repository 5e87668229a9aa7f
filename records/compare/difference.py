"""Difference: what the code, settings and results of two logs do not have in common."""
import difflib
import os
import shlex
import sys
from pathlib import Path

from .groups import group_runs, same_seed
from .logs import Run, UserError, code_of, find_runs
from .statistics import spread
from .text import count, paint
from .verdict import comparison


def code_lines(run: Run) -> list[str] | None:
    """The lines of the script; None where the log embeds none."""
    return code_of(run).decode("utf-8", errors="replace").splitlines() if run.code_span else None


def matcher(a: list[str], b: list[str]) -> difflib.SequenceMatcher:
    """Matches the lines of a and b; equal are those in which only white space differs."""
    plain = (["".join(line.split()) for line in lines] for lines in (a, b))
    return difflib.SequenceMatcher(None, *plain, autojunk=max(len(a), len(b)) > 4_000)  # else it takes minutes


def code_diff(a: list[str], b: list[str], context: int = 3) -> list[str]:
    """A unified diff that takes lines for equal where only white space differs, and leaves out blank lines."""
    a, b = [line for line in a if line.strip()], [line for line in b if line.strip()]
    out = []
    for group in matcher(a, b).get_grouped_opcodes(context):
        out.append(paint(f"@@ -{group[0][1] + 1},{group[-1][2] - group[0][1]} "
                         f"+{group[0][3] + 1},{group[-1][4] - group[0][3]} @@", 36))
        for kind, i1, i2, j1, j2 in group:
            if kind == "equal":
                out += [" " + line for line in b[j1:j2]]
            else:
                out += [paint("-" + line, 31) for line in a[i1:i2]] + [paint("+" + line, 32) for line in b[j1:j2]]
    return out


def diff(args) -> int:
    """The code, then what else differs, of two logs; of folders a run of each, with the same seed if there is
    one, and the results of all."""
    if all(path.endswith(".py") and Path(path).is_file() for path in (args.a, args.b)):
        raise UserError(f"{args.a} and {args.b} are scripts, expected logs; to compare scripts: "
                        f"{shlex.join(['diff', '-u', args.a, args.b])}")
    sides = []
    for path in (args.a, args.b):
        groups = group_runs(find_runs([path], direct=True)[0])
        sides.append(groups[0])
        if len(groups) > 1:
            print(f"note: {path} holds {len(groups)} sorts of runs; shown is the fastest, "
                  f"{count(len(groups[0].runs), 'run')} of code {groups[0].any.code_hash}, {groups[0].any.steps} steps")
    a, b = same_seed(*sides)
    print(f"--- {a.path}", f"+++ {b.path}", sep="\n")
    codes = [code_lines(run) for run in (a, b)]
    if None in codes:
        print(f"(no code in {(a if codes[0] is None else b).path})")
    else:
        print(*(code_diff(*codes) or ["(the code is the same)"]), sep="\n")
    facts = [facts_of(run) for run in (a, b)]
    for fact, group in zip(facts, sides, strict=True):
        averages = [run.step_avg_ms for run in group.runs if run.step_avg_ms is not None]
        for name, values, form in (("val_loss", group.losses, ".4f"), ("train_time_ms", group.times, ".0f"),
                                   ("step_avg_ms", averages, ".2f")):
            fact[name] = (f"{values[0]:{form}}" if len(values) == 1 else spread(values, form)) if values else None
    print()
    for name, (old, new) in differing(facts).items():
        print(f"{name}: {paint(str(old), 31)} -> {paint(str(new), 32)}")
    if sides[0].runs and sides[1].runs:
        print(*comparison(sides[1], sides[0], ("B", "A")), sep="\n")
    return 0


def facts_of(run: Run) -> dict:
    """What the log tells of settings and environment; a setting is called as its flag."""
    return {**{f"--{name}": value for name, value in run.hyperparameters.items()},
            **{name: run.facts[name] for name in run.facts.keys() - {"hyperparameters", "command", "run_id"}},
            "gpu": run.gpu, "world_size": run.world_size, "torch": run.torch, "steps": run.steps}


def differing(facts: list[dict]) -> dict[str, list]:
    """The values of all facts that are not the same in all."""
    found = {name: [fact.get(name) for fact in facts] for name in sorted({name for fact in facts for name in fact})}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def extract(args) -> int:
    """The embedded script."""
    run, *others = find_runs([args.log])[0]
    if any(other.code_hash != run.code_hash for other in others):
        print(f"note: {args.log} holds {len(others) + 1} runs; this is the script of the first", file=sys.stderr)
    code = code_of(run)
    if os.path.exists(args.out) and Path(args.out).read_bytes() != code:
        raise UserError(f"{args.out} is there already, and another script; name a new file with -o")
    Path(args.out).write_bytes(code)
    return 0

"""Verdict: does a claim hold against a baseline, rule by rule, and does it learn better?"""
import math
import os
from dataclasses import dataclass

from .groups import Group, by_seed, group_runs
from .logs import UserError, find_runs, why_incomplete
from .statistics import deviation, difference, mean, t_test_below, welch_test_below
from .text import paint, seconds


@dataclass
class Rule:
    """One rule of the speedrun: passed is None where the logs can't tell, which fails nothing but is said."""
    name: str
    passed: bool | None
    figures: str


def the_group(paths: list[str], who: str) -> tuple[Group, Rule]:
    """The one group below paths, and the rule that all its runs are whole. Raises UserError where there are several."""
    groups = group_runs(find_runs(paths, direct=True)[0])
    if len(groups) > 1:
        sorts = []
        for group in groups[:8]:
            logs = [os.path.relpath(run.path) for run in group.runs or group.incomplete]
            more = f" and {len(logs) - 2} more" if len(logs) > 2 else ""
            sorts.append(f"  code {group.any.code_hash} on {group.any.world_size} x {group.any.gpu}, {group.any.steps} "
                         f"steps: {' '.join(logs[:2])}{more}")
        raise UserError("\n".join([
            f"the {who} holds {len(groups)} sorts of runs, expected one script on one hardware with one setting; "
            "name the logs of one:", *sorts, *(["  ..."] if len(groups) > 8 else [])]))
    broken = ", ".join(f"{run.path} ({why_incomplete(run)})" for run in groups[0].incomplete)
    figures = f"{len(groups[0].runs)} complete" + (f"; incomplete: {broken}" if broken else "")
    return groups[0], Rule(f"complete runs: {who}", bool(groups[0].runs) and not broken, figures)


def rule_of_seeds(group: Group, who: str) -> Rule:
    """Logs with equal losses are one run; who: candidate or baseline, for the rule's name."""
    by_curve: dict[tuple, list[str]] = {}
    for run in group.runs + group.duplicates:
        by_curve.setdefault(run.losses, []).append(run.path)
    same = ["equal losses: " + ", ".join(paths) for paths in by_curve.values() if len(paths) > 1]
    return Rule(f"distinct seeds: {who}", not same, "; ".join(same) or f"{len(by_curve)} different loss curves")


def judge(new: Group, old: Group, target: float | None, p: float, systems_only: bool) -> list[Rule]:
    """The rules that compare a candidate with a baseline; both have complete runs."""
    rules = [rule_of_seeds(new, "candidate"), rule_of_seeds(old, "baseline")]
    targets = [group.any.facts.get("target") for group in (new, old)]
    if target is None and None not in targets:  # a script may have changed its own
        rules.append(Rule("same target", targets[0] == targets[1], f"{targets[0]:g} and {targets[1]:g}"))
    target = new.any.target if target is None else target
    told = f"mean {mean(new.losses):.4f}, sd {deviation(new.losses) or math.nan:.4f}, n = {len(new.losses)}"
    if systems_only:
        worse = welch_test_below(old.losses, new.losses)
        against = f"{told}; baseline: mean {mean(old.losses):.4f}, n = {len(old.losses)}"
        if worse is None:
            rules.append(Rule("loss not worse", mean(new.losses) <= mean(old.losses), against + "; means compared"))
        else:
            rules.append(Rule("loss not worse", worse >= 0.05, f"{against}; p = {worse:.2g} that it is worse"))
    else:
        value = t_test_below(new.losses, target)
        figures = f"{told}; " + ("a test needs 2 runs" if value is None else f"p = {value:.2g}, needed < {p:g}")
        rules.append(Rule(f"mean val loss <= {target:g}", value is not None and value < p, figures))
    hardware = [f"{g.any.world_size or '?'} x {g.any.gpu or '?'}" + (
        f", {g.any.facts['threads']} threads" if "threads" in g.any.facts and not g.any.facts.get("cuda") else "")
        for g in (new, old)]
    known = all(g.any.gpu and g.any.world_size for g in (new, old))
    rules.append(Rule("same hardware", hardware[0] == hardware[1] if known else None, " and ".join(hardware)))
    faster = welch_test_below(new.times, old.times)
    if not new.times or not old.times:
        rules.append(Rule("faster", False, "no training times in the logs"))
    else:
        figures = (f"{seconds(mean(new.times), 2)} after {seconds(mean(old.times), 2)}, "
                   f"ratio {mean(new.times) / mean(old.times):.3f}; ")
        figures += "a test needs 2 runs of each" if faster is None else f"p = {faster:.2g}, needed < {p:g}"
        rules.append(Rule("faster", faster is not None and faster < p, figures))
    prints = [g.any.facts.get("data_fingerprint") for g in (new, old)]
    rules.append(Rule("same data", prints[0] == prints[1] if any(prints) else None,
                      " and ".join(str(fingerprint or "not in the logs") for fingerprint in prints)))
    return rules


def comparison(new: Group, old: Group, names: tuple[str, str] = ("candidate", "baseline")) -> list[str]:
    """Lines that say how the losses of both differ: at the end, and at the last step that all runs validated."""
    lines = []

    def compare(name, values, others):
        parts = [f"{mean(v):.4f}" + ("" if (sd := deviation(v)) is None else f" ± {sd:.4f}") + f" (n = {len(v)})"
                 for v in (values, others)]
        apart, p, how = difference(by_seed(values, new.runs), by_seed(others, old.runs))
        verdict = "not tested" if p is None else f"p = {p:.2g}"
        word = "better" if apart < 0 else "worse" if apart > 0 else "equal" if apart == 0 else "not finite"
        lines.append(f"{name}: {names[0]} {parts[0]}, {names[1]} {parts[1]}: {apart:+.4f}, {word} ({verdict}: {how})")

    compare("final val loss", new.losses, old.losses)
    curves = [{step: loss for step, loss, _ in run.curve} for run in new.runs + old.runs]
    common = set.intersection(*map(set, curves)) - {0}
    if common and not {max(common)} == {run.steps for run in new.runs + old.runs}:
        losses = [curve[max(common)] for curve in curves]
        compare(f"val loss at step {max(common)}", losses[:len(new.runs)], losses[len(new.runs):])
    return lines


def verify(args) -> int:
    """Applies the rules; 0 where all hold, else 1."""
    inside = [folder for path in args.candidate if os.path.isdir(folder := os.path.join(path, "baseline"))]
    if not (args.baseline or inside):
        raise UserError("--baseline is missing, expected the other side's logs; an entry's stand in its baseline/")
    return verdict(args.candidate, args.baseline or inside, args)


def verdict(candidate: list[str], baseline: list[str], args) -> int:
    """Prints each rule on the logs below two lists of paths; returns the exit code."""
    new, new_whole = the_group(candidate, "candidate")
    old, old_whole = the_group(baseline, "baseline")
    rules = [new_whole, old_whole]
    if new.runs and old.runs:
        rules += judge(new, old, args.target, args.p, args.systems_only)
    if new.any.code_hash and new.any.code_hash == old.any.code_hash:
        print("note: candidate and baseline are the same script")
    for rule in rules:
        word = {True: "pass", False: "FAIL", None: "unknown"}[rule.passed]
        print(f"{paint(f'{word:8}', {True: 32, False: 31, None: 33}[rule.passed])}{rule.name}: {rule.figures}")
    if new.runs and old.runs:
        print(*comparison(new, old), sep="\n")
    failed = [rule.name for rule in rules if rule.passed is False]
    print(f"the claim does not hold: {', '.join(failed)}" if failed else "the claim holds")
    return 1 if failed else 0

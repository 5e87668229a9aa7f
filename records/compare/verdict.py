"""Verdict: does a claim hold against a baseline, rule by rule, and does it learn better?"""
import os
import re
from dataclasses import dataclass

from .groups import Group, by_seed, group_runs, labels_of
from .logs import UserError, find_runs, why_incomplete
from .statistics import deviation, difference, mean, spread, t_test_below, welch_test_below
from .text import paint, seconds, shortened


@dataclass
class Rule:
    """One rule of the speedrun: passed is None where the logs can't tell, which fails nothing but is said."""
    name: str
    passed: bool | None
    figures: str

    @property
    def word(self) -> str:
        return {True: "pass", False: "FAIL", None: "unknown"}[self.passed]


@dataclass
class Contrast:
    """How the losses of two groups differ."""
    name: str
    new: list[float]
    old: list[float]
    apart: float        # mean of new - mean of old
    p: float | None     # two-sided; None where it could not be tested
    how: str            # it was tested, or why not

    @property
    def word(self) -> str:
        """Better, worse, equal, or not finite; where it was tested, that only if p shows it."""
        if self.p is not None and self.p >= 0.01 and self.apart:
            return "no difference shown"
        return ("better" if self.apart < 0 else "worse" if self.apart > 0 else "equal" if self.apart == 0
                else "not finite")

    def line(self, names: tuple[str, str]) -> str:
        """All of it in a line; names: of new and old."""
        new, old = spread(self.new), spread(self.old)
        tested = "not tested" if self.p is None else f"p = {self.p:.2g}"
        return f"{self.name}: {names[0]} {new}, {names[1]} {old}: {self.apart:+.4f}, {self.word} ({tested}: {self.how})"


@dataclass
class Judgement:
    """All that is to be said of a candidate against a baseline."""
    new: Group
    old: Group
    rules: list[Rule]
    contrasts: list[Contrast]   # empty where a side has no complete run
    faster_p: float | None      # one-sided: that the candidate takes less time

    @property
    def failed(self) -> list[str]:
        return [rule.name for rule in self.rules if rule.passed is False]

    @property
    def same_script(self) -> bool:
        return self.new.any.code_hash is not None and self.new.any.code_hash == self.old.any.code_hash

    @property
    def conclusion(self) -> str:
        """The last line of verify."""
        unknown = ", ".join(rule.name for rule in self.rules if rule.passed is None)
        return (f"the claim does not hold: {', '.join(self.failed)}" if self.failed else
                f"the claim holds, as far as the logs tell (unknown: {unknown})" if unknown else "the claim holds")


def the_group(groups: list[Group], who: str) -> Group:
    """The only one of the candidate's or the baseline's groups. Raises UserError where there are several."""
    if len(groups) > 1:
        sorts = []
        for group, label in zip(groups[:8], labels_of(groups), strict=False):
            logs = [os.path.relpath(run.path) for run in group.runs or group.incomplete]
            more = f" and {len(logs) - 2} more" if len(logs) > 2 else ""
            sorts.append(f"  {shortened(label, 100)}: {' '.join(logs[:2])}{more}")
        raise UserError("\n".join([
            f"the {who} holds {len(groups)} sorts of runs, expected one script on one hardware with one setting; "
            "name the logs of one:", *sorts, *(["  ..."] if len(groups) > 8 else [])]))
    return groups[0]


def rule_of_completeness(group: Group, who: str) -> Rule:
    """All runs are whole."""
    broken = ", ".join(f"{run.path} ({why_incomplete(run)})" for run in group.incomplete)
    figures = f"{len(group.runs)} complete" + (f"; incomplete: {broken}" if broken else "")
    return Rule(f"complete runs: {who}", bool(group.runs) and not broken, figures)


def rule_of_seeds(group: Group, who: str) -> Rule:
    """Logs with equal losses are one run; who: candidate or baseline, for the rule's name."""
    by_curve: dict[tuple, list[str]] = {}
    for run in group.runs + group.duplicates:
        by_curve.setdefault(run.losses, []).append(run.path)
    same = ["equal losses: " + ", ".join(paths) for paths in by_curve.values() if len(paths) > 1]
    number = len(by_curve)
    return Rule(f"distinct seeds: {who}", not same,
                "; ".join(same) or (f"{number} different loss curves" if number > 1 else "1 loss curve"))


def rule_of_turns(new: Group, old: Group) -> Rule:
    """Runs of both sides in turn, as ab makes them, see the same machine at the same speed; the logs' names tell when
    a run began."""
    begun = [sorted("".join(found.groups()) for run in group.runs
                    if (found := re.search(r"-(20\d{6})-(\d{6})-", str(run.facts.get("run_id") or ""))))
             for group in (new, old)]
    if not all(begun):
        return Rule("run in turn", None, "the logs do not say when they began")
    told = ["{} to {}".format(*(f"{t[:4]}-{t[4:6]}-{t[6:8]} {t[8:10]}:{t[10:12]}" for t in (times[0], times[-1])))
            for times in begun]
    if begun[0][0] < begun[1][-1] and begun[1][0] < begun[0][-1]:
        return Rule("run in turn", True, " and ".join(told))
    return Rule("run in turn", None,
                " and ".join(told) + ": one side after the other, so the ratio of times may be the machine's")


def judge(new: Group, old: Group, target: float | None, p: float, systems_only: bool) -> list[Rule]:
    """The rules that compare a candidate with a baseline; both have complete runs."""
    rules = [rule_of_seeds(new, "candidate"), rule_of_seeds(old, "baseline")]
    targets = [group.any.facts.get("target") for group in (new, old)]
    if target is None and None not in targets:  # a script may have changed its own
        rules.append(Rule("same target", targets[0] == targets[1], f"{targets[0]:g} and {targets[1]:g}"))
    target = new.any.target if target is None else target
    sd = deviation(new.losses)
    told = f"mean {mean(new.losses):.4f}" + ("" if sd is None else f", sd {sd:.4f}") + f", n = {len(new.losses)}"
    if systems_only:
        final = contrasts_of(new, old)[0]
        against = f"{told}; baseline: mean {mean(old.losses):.4f}, n = {len(old.losses)}"
        if final.p is None:
            rules.append(Rule("loss not worse", final.apart <= 0, against + "; means compared"))
        else:  # one-sided, of the same test as the last lines
            worse = final.p / 2 if final.apart > 0 else 1 - final.p / 2
            rules.append(Rule("loss not worse", worse >= 0.05,
                              f"{against}; p = {worse:.2g} that it is worse, {final.how}"))
    else:
        value = t_test_below(new.losses, target)
        figures = f"{told}; " + ("a test needs 2 runs" if value is None else f"p = {value:.2g}, needed < {p:g}")
        rules.append(Rule(f"mean val loss <= {target:g}", value is not None and value < p, figures))
    hardware = [f"{g.any.world_size or '?'} x {g.any.gpu or '?'}" + (
        f", {g.any.facts['threads']} threads" if "threads" in g.any.facts and not g.any.facts.get("cuda") else "")
        for g in (new, old)]
    known = all(g.any.gpu and g.any.world_size for g in (new, old))
    rules.append(Rule("same hardware", hardware[0] == hardware[1] if known else None, " and ".join(hardware)))
    rules.append(rule_of_turns(new, old))
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
                      " and ".join(str(fingerprint or "not in the logs") for fingerprint in prints) if any(prints)
                      else "no log has a fingerprint of the data"))
    return rules


def contrasts_of(new: Group, old: Group) -> list[Contrast]:
    """How the losses of both differ: at the end, and at the last step that all runs validated."""
    def contrast(name, values, others):
        return Contrast(name, values, others, *difference(by_seed(values, new.runs), by_seed(others, old.runs)))

    found = [contrast("final val loss", new.losses, old.losses)]
    curves = [{step: loss for step, loss, _ in run.curve} for run in new.runs + old.runs]
    common = set.intersection(*map(set, curves)) - {0}
    if common and not {max(common)} == {run.steps for run in new.runs + old.runs}:
        losses = [curve[max(common)] for curve in curves]
        found.append(contrast(f"val loss at step {max(common)}", losses[:len(new.runs)], losses[len(new.runs):]))
    return found


def comparison(new: Group, old: Group, names: tuple[str, str] = ("candidate", "baseline")) -> list[str]:
    """The contrasts, a line each."""
    return [contrast.line(names) for contrast in contrasts_of(new, old)]


def judged(new: Group, old: Group, args) -> Judgement:
    """The verdict on a candidate; args: target, p, systems_only."""
    rules = [rule_of_completeness(new, "candidate"), rule_of_completeness(old, "baseline")]
    if not (new.runs and old.runs):
        return Judgement(new, old, rules, [], None)
    rules += judge(new, old, args.target, args.p, args.systems_only)
    return Judgement(new, old, rules, contrasts_of(new, old), welch_test_below(new.times, old.times))


def verify(args) -> int:
    """Applies the rules; 0 where all hold, else 1."""
    folders = dict.fromkeys(path if os.path.isdir(path) else os.path.dirname(path) for path in args.candidate)
    inside = [folder for path in folders if os.path.isdir(folder := os.path.join(path, "baseline"))]
    for path in args.candidate:
        if not os.path.exists(path) and not any(sign in path for sign in "*?["):
            raise UserError(f"there is no {path}")
    if not (args.baseline or inside):
        raise UserError("--baseline is missing, expected the other side's logs; an entry's stand in its baseline/")
    return verdict(args.candidate, args.baseline or inside, args)


def verdict(candidate: list[str], baseline: list[str], args) -> int:
    """Prints each rule on the logs below two lists of paths; returns the exit code."""
    found = judged(*(the_group(group_runs(find_runs(paths, direct=True)[0]), who)
                     for paths, who in ((candidate, "candidate"), (baseline, "baseline"))), args)
    if found.same_script:
        print("note: candidate and baseline are the same script")
    for rule in found.rules:
        print(f"{paint(f'{rule.word:8}', {True: 32, False: 31, None: 33}[rule.passed])}{rule.name}: {rule.figures}")
    print(*(contrast.line(("candidate", "baseline")) for contrast in found.contrasts), found.conclusion, sep="\n")
    return 1 if found.failed else 0

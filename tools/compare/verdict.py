"""Verdict: does a candidate's claim hold against a baseline, and does it reach a lower loss?"""
import os
import re
import sys
from dataclasses import dataclass

from data import UserError

from .groups import Group, by_seed, group_runs, labels_of
from .logs import find_runs, why_incomplete
from .stats import difference, mean, spread, t_test_below, welch_test_below
from .text import count, paint, seconds, shortened, visible

RUN_DATE = re.compile(r"-(20\d\d)(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)-")  # in a run_id
COLOURS = {True: 32, False: 31, None: 33}


@dataclass
class Rule:
    """One rule of the speedrun. passed is None if the logs do not say, which is no failure."""
    name: str               # begins with the number in docs/rules.md
    passed: bool | None
    figures: str

    @property
    def word(self) -> str:
        """pass, FAIL or unknown."""
        return {True: "pass", False: "FAIL", None: "unknown"}[self.passed]


@dataclass
class Contrast:
    """How the losses of two groups differ."""
    name: str
    new: list[float]
    old: list[float]
    apart: float        # mean of new - mean of old
    p: float | None     # two-sided; None if there was no test
    how: str            # the test, or why there was none

    @property
    def word(self) -> str:
        """better, worse, equal or not finite; no difference shown if a test gave p >= 0.01."""
        if self.p is not None and self.p >= 0.01 and self.apart:
            return "no difference shown"
        if self.apart < 0:
            return "better"
        if self.apart > 0:
            return "worse"
        return "equal" if self.apart == 0 else "not finite"

    def line(self, new: str = "candidate", old: str = "baseline") -> str:
        """The contrast as one line. new, old: what the two groups are called."""
        tested = "not tested" if self.p is None else f"p = {self.p:.2g}"
        return (f"{self.name}: {new} {spread(self.new)}, {old} {spread(self.old)}: "
                f"{self.apart:+.4f}, {self.word} ({tested}: {self.how})")


@dataclass
class Judgement:
    """Everything that is said about a candidate compared with a baseline."""
    new: Group
    old: Group
    rules: list[Rule]
    contrasts: list[Contrast]   # empty if a side has no complete run

    @property
    def failed(self) -> list[str]:
        """The names of the rules that do not hold."""
        return [rule.name for rule in self.rules if rule.passed is False]

    @property
    def same_script(self) -> bool:
        """Whether both sides ran the same code."""
        return self.new.any.code_hash is not None and (
            self.new.any.code_hash == self.old.any.code_hash)

    @property
    def conclusion(self) -> str:
        """The last line of verify."""
        if self.failed:
            return f"the claim does not hold: {', '.join(self.failed)}"
        unknown = [rule.name for rule in self.rules if rule.passed is None]
        if unknown:
            return f"the claim holds, as far as the logs say (unknown: {', '.join(unknown)})"
        return "the claim holds"


def only_group(groups: list[Group], side: str) -> Group:
    """The group of a side ("candidate" or "baseline"). Raises UserError if there are several, and
    lists them on stderr."""
    if len(groups) == 1:
        return groups[0]
    for group, label in list(zip(groups, labels_of(groups), strict=True))[:8]:
        logs = [os.path.relpath(run.path) for run in group.runs or group.incomplete]
        more = f" and {len(logs) - 2} more" if len(logs) > 2 else ""
        line = f"  {shortened(label, 100)}: {' '.join(logs[:2])}{more}"
        print(visible(line), file=sys.stderr)
    if len(groups) > 8:
        print("  ...", file=sys.stderr)
    raise UserError(f"{several_groups(groups, side)}; name the logs of one group")


def several_groups(groups: list[Group], side: str) -> str:
    """Why the runs of a side can't be judged together."""
    return (f"the {side} holds {len(groups)} groups of runs, expected one script on one machine "
            "with one setting")


def rule_complete(group: Group, side: str) -> Rule:
    """Every run of a side is complete."""
    figures = f"{len(group.runs)} complete"
    if group.incomplete:
        broken = [f"{run.path} ({why_incomplete(run)})" for run in group.incomplete]
        figures += f"; incomplete: {', '.join(broken)}"
    return Rule(f"1. complete runs: {side}", bool(group.runs) and not group.incomplete, figures)


def rule_distinct_seeds(group: Group, side: str) -> Rule:
    """No two logs of a side have equal losses: those would be one run."""
    by_losses = {}
    for run in group.runs + group.duplicates:
        by_losses.setdefault(run.losses, []).append(run.path)
    equal = [f"equal losses: {', '.join(paths)}" for paths in by_losses.values() if len(paths) > 1]
    figures = "; ".join(equal) or count(len(by_losses), "loss curve")
    return Rule(f"1. distinct seeds: {side}", not equal, figures)


def rule_same(name: str, values: list, known: bool) -> Rule:
    """Something has the same value on both sides."""
    texts = ["not in the logs" if value in (None, "") else str(value) for value in values]
    figures = " and ".join(texts)
    return Rule(name, values[0] == values[1] if known else None, figures)


def rule_same_data(new: Group, old: Group) -> Rule:
    """Both sides have the same fingerprint of the data. Before 2026-11-29 it had a part less."""
    values = [group.any.facts.get("data_fingerprint") for group in (new, old)]
    rule = rule_same("2. same data", values, any(values))
    parts = [str(value).split("-") for value in values]
    if len(parts[0]) != len(parts[1]) and all(a == b for a, b in zip(*parts, strict=False)):
        rule.passed = None
    return rule


def rule_same_torch(new: Group, old: Group) -> Rule:
    """All runs of both sides ran with the same version of torch."""
    versions = {run.torch for run in new.runs + old.runs}
    passed = None if None in versions else True
    if len(versions - {None}) > 1:
        passed = False
    figures = " and ".join(group.torch or "not in the logs" for group in (new, old))
    return Rule("4. same torch", passed, figures)


def hardware_of(group: Group) -> str | None:
    """Number and model of the devices, on a CPU with the threads; None if the log does not say."""
    run = group.any
    if not (run.gpu and run.world_size):
        return None
    on_cpu = "threads" in run.facts and not run.facts.get("cuda")
    return group.device + (f", {run.facts['threads']} threads" if on_cpu else "")


def rule_interleaved(new: Group, old: Group) -> Rule:
    """The two sides ran alternately, as ab runs them, and so saw the machine at the same speed.

    The logs' names say when a run began. Separate blocks of runs are reported, but are no failure.
    """
    begun = []
    for group in (new, old):
        found = [RUN_DATE.search(str(run.facts.get("run_id") or "")) for run in group.runs]
        times = sorted("{}-{}-{} {}:{}:{}".format(*date.groups()) for date in found if date)
        if not times:
            return Rule("4. interleaved runs", None, "the logs do not say when the runs began")
        begun.append(times)
    figures = " and ".join(f"{times[0][:16]} to {times[-1][:16]}" for times in begun)
    if begun[0][0] < begun[1][-1] and begun[1][0] < begun[0][-1]:
        return Rule("4. interleaved runs", True, figures)
    return Rule("4. interleaved runs", None, f"{figures}: one side ran after the other, so the "
                "machine may have caused a part of the difference in time")


def rule_loss(new: Group, target: float, p: float) -> Rule:
    """The mean final loss lies below the target at p."""
    value = t_test_below(new.losses, target)
    tested = "a test needs 2 runs" if value is None else f"p = {value:.2g}, needed < {p:g}"
    return Rule(f"3. mean val loss <= {target:g}", value is not None and value < p,
                f"{spread(new.losses)}; {tested}")


def rule_loss_not_worse(final: Contrast) -> Rule:
    """For --systems-only: a one-sided test must not show that the final loss is worse."""
    figures = f"{spread(final.new)}, baseline {spread(final.old)}"
    if final.p is None:
        return Rule("3. loss not worse", final.apart <= 0, f"{figures}; means compared")
    worse = final.p / 2 if final.apart > 0 else 1 - final.p / 2
    return Rule("3. loss not worse", worse >= 0.05,
                f"{figures}; p = {worse:.2g} that it is worse, {final.how}")


def rule_faster(new: Group, old: Group, p: float) -> Rule:
    """The mean training time lies below the baseline's at p."""
    for group, side in ((new, "candidate"), (old, "baseline")):
        if not group.times:
            return Rule("5. faster", False, f"the {side}'s logs have no training times")
    value = welch_test_below(new.times, old.times)
    tested = "a test needs 2 runs of each" if value is None else f"p = {value:.2g}, needed < {p:g}"
    figures = (f"{seconds(mean(new.times), 2)} after {seconds(mean(old.times), 2)}, "
               f"ratio {mean(new.times) / mean(old.times):.3f}; {tested}")
    return Rule("5. faster", value is not None and value < p, figures)


def contrasts_of(new: Group, old: Group) -> list[Contrast]:
    """How the losses differ at the end, and at the last step that all runs validated."""
    def contrast(name, values, others):
        apart, p, how = difference(by_seed(values, new.runs), by_seed(others, old.runs))
        return Contrast(name, values, others, apart, p, how)

    found = [contrast("final val loss", new.losses, old.losses)]
    runs = new.runs + old.runs
    curves = [{step: loss for step, loss, _ in run.curve} for run in runs]
    common = set.intersection(*map(set, curves)) - {0}
    if common and {run.steps for run in runs} != {max(common)}:
        losses = [curve[max(common)] for curve in curves]
        number = len(new.runs)
        found.append(contrast(f"val loss at step {max(common)}", losses[:number], losses[number:]))
    return found


def judge(new: Group, old: Group, args) -> Judgement:
    """Applies all rules to a candidate, new, and a baseline, old. args: target, p, systems_only."""
    rules = [rule_complete(new, "candidate"), rule_complete(old, "baseline")]
    if not (new.runs and old.runs):
        return Judgement(new, old, rules, [])
    contrasts = contrasts_of(new, old)
    rules += [rule_distinct_seeds(new, "candidate"), rule_distinct_seeds(old, "baseline")]
    targets = [group.any.facts.get("target") for group in (new, old)]
    if args.target is None and None not in targets:  # a script may have changed its own target
        rules.append(rule_same("2. same target", targets, True))
    rules.append(rule_same_data(new, old))
    for group, side in ((new, "candidate"), (old, "baseline")):
        if group.any.partial:
            rules.append(Rule(f"2. whole validations: {side}", False,
                              "they read only a part of the track's tokens (--val_tokens)"))
    if args.systems_only:
        rules.append(rule_loss_not_worse(contrasts[0]))
    else:
        rules.append(rule_loss(new, new.any.target if args.target is None else args.target, args.p))
    hardware = [hardware_of(group) for group in (new, old)]
    rules += [rule_same("4. same hardware", hardware, None not in hardware),
              rule_same_torch(new, old),
              rule_interleaved(new, old),
              rule_faster(new, old, args.p)]
    return Judgement(new, old, rules, contrasts)


def verify(args) -> int:
    """Applies the rules to a claim. The exit code is 0 if none fails, else 1."""
    baselines = args.baseline
    if not baselines:
        folders = [p if os.path.isdir(p) else os.path.dirname(p) for p in args.candidate]
        inside = [os.path.join(folder, "baseline") for folder in dict.fromkeys(folders)]
        baselines = [folder for folder in inside if os.path.isdir(folder)]
    if not baselines:
        find_runs(args.candidate, direct=True)  # raises UserError if there is nothing to judge
        raise UserError("--baseline is missing: name the other side's logs, or put them into the "
                        "candidate's folder baseline/")
    return print_verdict(args.candidate, baselines, args)


def print_verdict(candidate: list[str], baseline: list[str], args) -> int:
    """Prints each rule for the logs below two lists of paths; returns the exit code, 0 or 1."""
    sides = []
    for paths, side in ((candidate, "candidate"), (baseline, "baseline")):
        runs, remarks = find_runs(paths, direct=True)
        for remark in remarks:
            print(visible(f"note: {remark}"))
        sides.append(only_group(group_runs(runs), side))
    found = judge(*sides, args)
    if found.same_script:
        print("note: candidate and baseline are the same script")
    for rule in found.rules:
        word = paint(f"{rule.word:8}", COLOURS[rule.passed])
        print(word + visible(f"{rule.name}: {rule.figures}"))
    for contrast in found.contrasts:
        print(contrast.line())
    print(visible(found.conclusion))
    return 1 if found.failed else 0

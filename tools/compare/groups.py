"""Groups of comparable runs, and their names."""
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .logs import DATED, SAYS_NOTHING, Run
from .stats import mean

# Properties of a group that say where it ran, not what was trained.
WHERE = {"activations", "compiled", "threads", "data_fingerprint", "on", "torch"}


@dataclass
class Group:
    """Runs of one script with equal hardware, length and settings, and, where the log has an
    environment, with the same torch version."""
    runs: list[Run]          # complete ones, each once
    incomplete: list[Run]
    duplicates: list[Run]    # further logs of one of these runs

    @property
    def any(self) -> Run:
        """A run that stands for the group in everything that its runs have in common."""
        return (self.runs or self.incomplete)[0]

    @property
    def path(self) -> str:
        """The log, or the folder that contains all logs, relative to the working directory."""
        runs = [*self.runs, *self.incomplete, *self.duplicates]
        return os.path.relpath(os.path.commonpath([os.path.abspath(run.path) for run in runs]))

    @property
    def device(self) -> str:
        """Number and model of the devices, such as 8 x NVIDIA H100."""
        return f"{self.any.world_size or '?'} x {self.any.gpu or '?'}"

    @cached_property
    def properties(self) -> dict[str, str]:
        """Everything besides the code that distinguishes the group, as texts for its name."""
        run = self.any
        found = {name: value if isinstance(value, str) else json.dumps(value)
                 for name, value in run.config.items() if name != "num_steps"}
        if host := host_entry(run):
            found["in"] = host
        return {**found, "steps": str(run.steps), "on": self.device, "torch": str(self.torch)}

    @property
    def torch(self) -> str | None:
        """The torch version of the runs; public logs may have several, joined by a comma."""
        versions = {run.torch for run in [*self.runs, *self.incomplete] if run.torch}
        return ", ".join(sorted(versions)) or None

    @property
    def held_out_losses(self) -> list[float]:
        """Losses of the complete runs on the held-out slice, as far as their logs have one."""
        return [run.held_out_loss for run in self.runs if run.held_out_loss is not None]

    @property
    def losses(self) -> list[float]:
        """Final validation losses of the complete runs, in nats."""
        return [run.val_loss for run in self.runs]

    @property
    def times(self) -> list[float]:
        """Training times of the complete runs, in milliseconds, as far as they are known."""
        return [run.train_time_ms for run in self.runs if run.train_time_ms is not None]

    @property
    def step_averages(self) -> list[float]:
        """Milliseconds per step of the complete runs, as far as they are known."""
        return [run.step_avg_ms for run in self.runs if run.step_avg_ms is not None]

    @property
    def typical(self) -> Run:
        """The run with the median training time."""
        ordered = sorted(self.runs or self.incomplete, key=lambda run: run.train_time_ms or 0.0)
        return ordered[len(self.runs) // 2]


def group_runs(runs: list[Run]) -> list[Group]:
    """Puts runs into groups: the fastest group first, groups without a complete run last."""
    groups: dict[str, Group] = {}
    seen = set()
    for run in runs:
        # Only logs with an environment tell the torch version reliably; a table of public logs has
        # one row per script and hardware.
        torch = run.torch if run.facts else None
        properties = [run.code_hash, run.gpu, run.world_size, torch, run.steps, run.config]
        key = json.dumps([*properties, host_entry(run)], sort_keys=True)
        group = groups.setdefault(key, Group([], [], []))
        # Copies of a log can differ in their bytes, such as their line ends. No two runs have equal
        # losses and equal times.
        result = [run.curve, run.train_hash, run.last_step]
        identity = json.dumps([*properties, run.torch, run.facts.get("run_id"), *result],
                              sort_keys=True)
        if identity in seen and run.curve:
            group.duplicates.append(run)
        elif run.complete:
            group.runs.append(run)
        else:
            group.incomplete.append(run)
        seen.add(identity)
    found = [group for group in groups.values() if group.runs or group.incomplete]
    return sorted(found, key=lambda group: mean(group.times) if group.times else math.inf)


def host_entry(run: Run) -> str:
    """The entry whose folder holds a log of another entry's script, as its baseline; else empty."""
    dated = [folder for folder in run.folders if DATED.match(folder)]
    host = dated[-1] if dated else ""
    return "" if host == run.entry.split("/")[0] else host


def first_at_target(group: Group, target: float) -> list[tuple[Run, tuple]]:
    """The runs that reached the target, each with the first point of its curve that did."""
    found = []
    for run in group.runs:
        reached = [point for point in run.curve if point[1] <= target]
        if reached:
            found.append((run, reached[0]))
    return found


def by_seed(values: list, runs: list[Run]) -> dict:
    """The values by the seeds of their runs.

    If a seed is missing or occurs twice, the keys name the logs instead, so that nothing is paired.
    """
    seeds = [run.hyperparameters.get("seed") for run in runs]
    if not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
        seeds = [(run.path, run.index) for run in runs]
    return dict(zip(seeds, values, strict=True))


def same_seed(a: Group, b: Group) -> tuple[Run, Run]:
    """The typical run of a, and b's run with the same seed, or b's typical run if there is none."""
    run = a.typical
    seed = run.hyperparameters.get("seed")
    matching = [other for other in b.runs if other.hyperparameters.get("seed") == seed]
    return run, matching[0] if matching and seed is not None else b.typical


def is_claim(group: Group) -> bool:
    """Whether an entry's claim rests on these runs.

    They must lie in a dated folder, not in a subfolder for ablations or trials, and not directly in
    a study. A folder baseline/ counts only if its logs name the script that ran. Validations must
    read all of the track's tokens.
    """
    folders = group.any.folders
    dated = [i for i, folder in enumerate(folders) if DATED.match(folder)]
    if not dated or not group.runs or group.any.partial:
        return False
    entry = dated[-1]
    if entry > 0 and folders[entry - 1] == "studies" and folders[entry] == group.any.entry:
        return False
    return (all(folder in SAYS_NOTHING for folder in folders[entry + 1:])
            and bool(DATED.match(group.any.entry)) and not group.any.entry.endswith("/baseline"))


def claims_of(groups: list[Group]) -> list[Group]:
    """One group for each track and entry, sorted by both: the runs on which its claim rests.

    Runs in the entry's own folder come before runs in another entry's baseline/; then the larger
    number of runs decides.
    """
    def rank(group):
        return not host_entry(group.any), len(group.runs)

    best: dict[tuple[str, str], Group] = {}
    for group in filter(is_claim, groups):
        key = (group.any.track, group.any.entry.split("/")[0])
        if key not in best or rank(group) > rank(best[key]):
            best[key] = group
    return [best[key] for key in sorted(best)]


def usual_of(groups: list[Group]) -> Group:
    """The group from which the names of other groups of the same code are derived.

    A claim comes first, then the most runs, then the most common properties.
    """
    names = dict.fromkeys(name for group in groups for name in group.properties)
    common = {}
    for name in names:
        counts = Counter(group.properties.get(name) for group in groups)
        common[name] = counts.most_common(1)[0][0]

    def rank(group):
        agreeing = sum(group.properties.get(name) == value for name, value in common.items())
        return is_claim(group), not host_entry(group.any), len(group.runs), agreeing

    return max(groups, key=rank)


def differences(properties: dict[str, str], usual: dict[str, str]) -> dict[str, str]:
    """The properties that differ from the usual ones; a missing one is "none"."""
    names = {**properties, **usual}
    return {name: properties.get(name, "none") for name in names
            if properties.get(name) != usual.get(name)}


def labels_of(groups: list[Group]) -> list[str]:
    """A unique name for each group: its entry, and what distinguishes it from groups of its code.

    Properties of the place where runs ran are left out if all groups of an entry share them.
    """
    labels = [group.any.entry for group in groups]
    by_code: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        by_code.setdefault(group.any.code_hash or group.any.entry, []).append(number)
    for numbers in by_code.values():
        usual = usual_of([groups[number] for number in numbers])
        apart = {number: differences(groups[number].properties, usual.properties)
                 for number in numbers}
        for number in numbers:
            entry = groups[number].any.entry
            namesakes = [apart[other] for other in numbers if groups[other].any.entry == entry]
            for name, value in apart[number].items():
                shared = all(other.get(name) == value for other in namesakes)
                if not (name in WHERE and shared):
                    labels[number] += f", {name} {value}"
    for label, occurrences in Counter(labels).items():
        if occurrences > 1:
            alike = [number for number, other in enumerate(labels) if other == label]
            alike.sort(key=lambda number: -len(groups[number].runs))
            for number in alike[1:]:
                labels[number] += f", code {groups[number].any.code_hash or 'unknown'}"
    return labels

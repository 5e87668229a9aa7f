"""Groups: runs that are comparable, and their names."""
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .logs import DATED, SAYS_NOTHING, Run
from .statistics import mean
from .tokens import stages_of, tokens_before

WHERE = {"activations", "compiled", "threads", "data_fingerprint", "on"}  # of what makes groups: not what was trained


@dataclass
class Group:
    """Comparable runs: of one code, on equal hardware, of equal length and settings."""
    runs: list[Run]          # complete ones, each once
    incomplete: list[Run]
    duplicates: list[Run]    # equal bytes of one of the others

    @property
    def any(self) -> Run:
        return (self.runs or self.incomplete)[0]

    @property
    def entry(self) -> str:
        return self.any.entry

    @property
    def path(self) -> str:
        """The log, or the folder that holds all logs, relative to where the command is run."""
        runs = [*self.runs, *self.incomplete, *self.duplicates]
        return os.path.relpath(os.path.commonpath([os.path.abspath(run.path) for run in runs]))

    @property
    def device(self) -> str:
        return f"{self.any.world_size or '?'} x {self.any.gpu or '?'}"

    @cached_property
    def told(self) -> dict[str, str]:
        """All that makes it a group of its own, besides the code, as it is said in names."""
        run = self.any
        settings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in run.config.items()}
        settings.pop("num_steps", None)  # the steps say it
        where = {"in": guest} if (guest := guest_of(run)) else {}
        return {**settings, **where, "steps": str(run.steps), "on": self.device}

    @property
    def losses(self) -> list[float]:
        return [run.val_loss for run in self.runs]

    @property
    def times(self) -> list[float]:
        return [run.train_time_ms for run in self.runs if run.train_time_ms is not None]

    @cached_property
    def stages(self) -> list[tuple[float, int]] | None:
        """As stages_of tells them: all runs are of one code and of equal settings, so of equal stages."""
        return stages_of(self.any)

    def tokens_before(self, step: int) -> int | None:
        """Tokens that a run has read when it comes to a step; None where the log does not tell."""
        return tokens_before(step, self.stages) if self.stages else None

    @property
    def typical(self) -> Run:
        """The run of the median training time."""
        return sorted(self.runs or self.incomplete, key=lambda run: run.train_time_ms or 0.0)[len(self.runs) // 2]


def group_runs(runs: list[Run]) -> list[Group]:
    """Fastest first; those without a complete run last."""
    groups: dict[str, Group] = {}
    seen = set()
    for run in runs:
        key = json.dumps([run.code_hash, run.gpu, run.world_size, run.steps, run.config, guest_of(run)], sort_keys=True)
        group = groups.setdefault(key, Group([], [], []))
        identity = run.file_hash, run.index
        kind = group.duplicates if identity in seen else group.runs if run.complete else group.incomplete
        seen.add(identity)
        kind.append(run)
    found = [group for group in groups.values() if group.runs or group.incomplete]
    return sorted(found, key=lambda group: mean(group.times) if group.times else math.inf)


def guest_of(run: Run) -> str:
    """The entry in whose folder a run of another one lies, as its baseline, on another day; else ""."""
    host = next((folder for folder in reversed(run.folders) if DATED.match(folder)), "")
    return "" if host == run.entry.split("/")[0] else host


def first_at_target(group: Group, target: float) -> list[tuple[Run, tuple]]:
    """The runs that met the target, each with the point of its curve where it first did."""
    firsts = [(run, next((point for point in run.curve if point[1] <= target), None)) for run in group.runs]
    return [(run, point) for run, point in firsts if point]


def by_seed(values: list, runs: list[Run]) -> dict:
    """values by their runs' seeds; by log, which pairs with nothing, where one tells none or two tell the same."""
    seeds = [run.hyperparameters.get("seed") for run in runs]
    told = None not in seeds and len(set(seeds)) == len(seeds)
    return dict(zip(seeds if told else [(run.path, run.index) for run in runs], values, strict=True))


def same_seed(a: Group, b: Group) -> tuple[Run, Run]:
    """The typical run of a, and that of b with the same seed; where there is none, b's typical one."""
    run, seed = a.typical, a.typical.hyperparameters.get("seed")
    return run, next((other for other in b.runs if seed is not None and other.hyperparameters.get("seed") == seed),
                     b.typical)


def is_claim(group: Group) -> bool:
    """Whether an entry rests on these runs: they lie in its folder, not in one for ablations, trials or studies."""
    folders = (group.runs or group.incomplete)[0].folders
    entry = max((i for i, folder in enumerate(folders) if DATED.match(folder)), default=None)
    if entry is None or not group.runs or (entry and folders[entry - 1] == "studies" and folders[entry] == group.entry):
        return False
    inside = folders[entry + 1:]
    return (all(folder in SAYS_NOTHING for folder in inside) and bool(DATED.match(group.entry))
            and not group.entry.endswith("/baseline"))  # a baseline counts where its logs tell whose it is


def claims_of(groups: list[Group]) -> list[Group]:
    """For each entry and track the runs that it rests on, in the entries' order; of several sorts its own, or the
    most runs."""
    best: dict[tuple[str, str], Group] = {}
    for group in filter(is_claim, groups):
        key = group.any.track, group.entry.split("/")[0]
        rank = not guest_of(group.any), len(group.runs)
        if key not in best or rank > (not guest_of(best[key].any), len(best[key].runs)):
            best[key] = group
    return [best[key] for key in sorted(best)]


def usual_of(groups: list[Group]) -> Group:
    """Of groups of one code, that by which the others are named: a claim, most runs, the most usual settings."""
    usual = {}
    for name in dict.fromkeys(name for group in groups for name in group.told):
        usual[name] = Counter(group.told.get(name) for group in groups).most_common(1)[0][0]
    return max(groups, key=lambda group: (is_claim(group), not guest_of(group.any), len(group.runs),
                                          sum(group.told.get(name) == value for name, value in usual.items())))


def labels_of(groups: list[Group]) -> list[str]:
    """A name for each group, no two alike: the entry's, and what tells groups of one code, or of one name, apart.

    What all of one name have in common about where they ran is left out: the name stands for it.
    """
    labels, by_code = [group.entry for group in groups], {}
    for number, group in enumerate(groups):
        by_code.setdefault(group.any.code_hash or group.entry, []).append(number)
    for numbers in by_code.values():
        usual, by_name = usual_of([groups[number] for number in numbers]), {}
        for number in numbers:
            by_name.setdefault(groups[number].entry, []).append(differences(groups[number].told, usual.told))
        shared = {name: {item for item in found[0].items() if item[0] in WHERE and all(
            item in other.items() for other in found)} for name, found in by_name.items()}
        for number in numbers:
            name, apart = labels[number], differences(groups[number].told, usual.told)
            labels[number] = ", ".join([name, *(f"{key} {value}" for key, value in apart.items()
                                                if (key, value) not in shared[name])])
    counts = Counter(labels)
    for label in [label for label, count in counts.items() if count > 1]:
        alike = [number for number, other in enumerate(labels) if other == label]
        for number in sorted(alike, key=lambda number: -len(groups[number].runs))[1:]:
            labels[number] += f", code {groups[number].any.code_hash or 'unknown'}"
    return labels


def differences(told: dict[str, str], usual: dict[str, str]) -> dict[str, str]:
    """What is not as usual; "none" for what is missing."""
    return {name: told.get(name, "none") for name in {**told, **usual} if told.get(name) != usual.get(name)}

"""Groups: runs that are comparable, and their names."""
import json
import math
import os
from dataclasses import dataclass

from .logs import Run
from .statistics import mean


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
    def losses(self) -> list[float]:
        return [run.val_loss for run in self.runs]

    @property
    def times(self) -> list[float]:
        return [run.train_time_ms for run in self.runs if run.train_time_ms is not None]

    @property
    def typical(self) -> Run:
        """The run of the median training time."""
        return sorted(self.runs or self.incomplete, key=lambda run: run.train_time_ms or 0.0)[len(self.runs) // 2]


def group_runs(runs: list[Run]) -> list[Group]:
    """Fastest first; those without a complete run last."""
    groups: dict[str, Group] = {}
    seen = set()
    for run in runs:
        key = json.dumps([run.code_hash, run.gpu, run.world_size, run.steps, run.config], sort_keys=True)
        group = groups.setdefault(key, Group([], [], []))
        identity = run.file_hash, run.index
        kind = group.duplicates if identity in seen else group.runs if run.complete else group.incomplete
        seen.add(identity)
        kind.append(run)
    found = [group for group in groups.values() if group.runs or group.incomplete]
    return sorted(found, key=lambda group: mean(group.times) if group.times else math.inf)


def common_path(runs: list[Run]) -> str:
    """The log, or the folder that holds all logs, relative to where the command is run."""
    return os.path.relpath(os.path.commonpath([os.path.abspath(run.path) for run in runs]))


def first_at_target(group: Group, target: float) -> list[tuple[Run, tuple]]:
    """The runs that met the target, each with the point of its curve where it first did."""
    firsts = [(run, next((point for point in run.curve if point[1] <= target), None)) for run in group.runs]
    return [(run, point) for run, point in firsts if point]


def by_seed(values: list, runs: list[Run]) -> dict:
    """values by their runs' seeds; by log, which pairs with nothing, where one tells none or two tell the same."""
    seeds = [run.hyperparameters.get("seed") for run in runs]
    told = None not in seeds and len(set(seeds)) == len(seeds)
    return dict(zip(seeds if told else [(run.path, run.index) for run in runs], values, strict=True))


def labels_of(groups: list[Group]) -> list[str]:
    """The entries' names, and what tells those of one name apart."""
    labels, configs = [group.entry for group in groups], [group.any.config for group in groups]
    names = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    for tell in (lambda run: run.code_hash, lambda run: f"{run.world_size or '?'} x {run.gpu or '?'}",
                 lambda run: f"{run.steps} steps",
                 lambda run: ", ".join(f"{name} {run.config.get(name)}" for name in differing)):
        labels = [f"{label}, {tell(group.any)}" if labels.count(label) > 1 else label
                  for group, label in zip(groups, labels, strict=True)]
    return labels

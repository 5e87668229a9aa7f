"""Read run logs of the GPT-2 speedrun, judge a claim, show the difference.

    python records/compare.py table records/                                   # a row per group of comparable runs
    python records/compare.py verify records/NEW --baseline records/OLD        # does the claim hold? exit code 0 or 1
    python records/compare.py diff records/OLD records/NEW                     # code, hyperparameters, results
    python records/compare.py plot records/OLD records/NEW -o curves.svg       # loss against steps, tokens and time
    python records/compare.py extract LOG -o train_gpt.py                      # the script that a log embeds
    python records/compare.py runs-needed --sd 0.0013 --margin 0.001           # how many runs a claim needs
    python records/compare.py ab OLD.py NEW.py --runs 5 -- --track laptop      # runs two scripts in turn, then verifies

PATH is a log, a folder (searched recursively for .txt and .log) or a glob. Logs of this project and the public ones are
read: source, a line of 100 '=', versions, the line again, metrics; or with any of the first parts missing. What a log
does not tell is null. Exit code 2 where nothing can be read.
"""
import argparse
import difflib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 3.28  # of fineweb, where a log names none
SEPARATOR = b"=" * 100
STEP = re.compile(rb"step:(\d+)/(\d+)\s+(\S.*)")
LLM_C = re.compile(rb"s:(\d+) (tel|trl):(\S+)")  # llm.c: validation and training loss
FIELD = re.compile(rb"([\w/]+):(\S+)")
DURATION = re.compile(rb"(\d+(?:\.\d+)?)(ms|s)$")
RESUMED = re.compile(rb"resumed from .* at step (\d+)$")
RUNNING = re.compile(r"Running PyTorch (\S+?),?(?: on (.+) with world_size (\d+)| .*)?$")
GPU_ROW = re.compile(r"\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|")  # of nvidia-smi's table
CODE_BEGINS = re.compile(rb'(import |from |#!|"""|\'\'\')')
# Hyperparameters on which no result depends: runs that differ in these alone are comparable.
HARMLESS = {"seed", "entry", "resume", "resume_anyway", "keep", "val_every", "log_every", "save_every", "profile",
            "sample_tokens", "device", "compile", "dtype"}


class UserError(Exception):
    """A mistake the user can mend: one line on stderr, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Logs

# What a log's JSON object tells of these counts only if it is of that type; else it is as if the log did not tell it.
FACT_TYPES = {"hyperparameters": dict, "target": (int, float), "script": str, "code_hash": str, "run_id": str}


@dataclass
class Run:
    """One training run, as far as its log tells."""
    path: str
    index: int = 0                   # among the runs of the file
    file_hash: str = ""
    code_hash: str | None = None
    gpu: str | None = None           # the GPU's model; the CPU's, where a log of this project ran on one
    world_size: int | None = None
    torch: str | None = None
    facts: dict = field(default_factory=dict)   # the JSON object of this project's logs
    steps: int | None = None                    # that the run set out to do
    last_step: int = -1                         # of any metric line
    curve: list = field(default_factory=list)   # (step, validation loss, training time in ms or None), by step
    restart_step: int = 0                       # where the training time began again from zero
    step_avg_ms: float | None = None            # of the last validation
    train_hash: str = ""                        # stands for the training losses
    code_span: tuple[int, int] | None = None    # bytes of the log

    @property
    def complete(self) -> bool:
        """Whether it was validated after its last step: else its last validation is not its result."""
        return self.steps is not None and bool(self.curve) and self.curve[-1][0] == self.steps

    @property
    def val_loss(self) -> float | None:
        return self.curve[-1][1] if self.complete else None

    @property
    def train_time_ms(self) -> float | None:
        return self.curve[-1][2] if self.complete else None

    @property
    def hyperparameters(self) -> dict:
        return self.facts.get("hyperparameters", {})

    @property
    def entry(self) -> str:
        """The script's folder, or its name where it has none; where the log does not tell, the log's folder."""
        script, folder = Path(self.facts.get("script", "")), Path(self.path).resolve().parent.name
        return script.parent.name.strip(".") or (script.stem if folder == "scratch" else "") or folder

    @property
    def target(self) -> float:
        return self.facts.get("target", TARGET)

    @property
    def step_tokens(self) -> int | None:
        """Tokens a step, over all ranks."""
        sizes = [self.hyperparameters.get(name) for name in ("batch_size", "sequence_length")]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None

    @property
    def config(self) -> dict:
        """All that must be alike, besides code and hardware, for two runs to be comparable."""
        rest = ("activations", "compiled", "data_fingerprint", "threads")
        return {**{name: value for name, value in self.hyperparameters.items() if name not in HARMLESS},
                **{name: self.facts[name] for name in rest if name in self.facts}}

    @property
    def losses(self) -> tuple:
        """Equal for two logs of one run."""
        return tuple((step, loss) for step, loss, _ in self.curve), self.train_hash


def milliseconds(word: bytes | None) -> float | None:
    """1234ms or 1.234s; None for nanms and everything else."""
    found = DURATION.match(word or b"")
    return float(found[1]) * (1000 if found[2] == b"s" else 1) if found else None


class Metrics:
    """The runs of a section of metric lines; a step that goes back begins a new one, unless the run was resumed."""

    def __init__(self):
        self.runs: list[Run] = []
        self.last_line_ms = self.resumed_at = None

    def feed(self, line: bytes) -> bool:
        """Take in a line; whether it was a metric line."""
        if found := STEP.match(line):
            step, steps, fields = int(found[1]), int(found[2]), dict(FIELD.findall(found[3]))
            val, train = fields.get(b"val_loss"), fields.get(b"train_loss")
        elif found := LLM_C.match(line):
            step, steps, fields = int(found[1]), None, {}
            val, train = (found[3], None) if found[2] == b"tel" else (None, found[3])
        else:
            if found := RESUMED.match(line):
                self.resumed_at = int(found[1])
            return False
        if not self.runs or (step < self.runs[-1].last_step and self.resumed_at is None):
            self.runs.append(Run("", steps=steps))
            self.last_line_ms = None
        run = self.runs[-1]
        if self.resumed_at is not None:  # what the interrupted run did beyond its checkpoint is done again
            run.curve = [point for point in run.curve if point[0] <= self.resumed_at]
            self.resumed_at = self.last_line_ms = None  # nor does the time begin again where it goes back with the step
        run.last_step = step
        ms = milliseconds(fields.get(b"train_time"))
        if ms is not None:
            if self.last_line_ms is not None and ms < self.last_line_ms:
                run.restart_step = step
            self.last_line_ms = ms
        try:
            if val is not None:
                run.curve = [point for point in run.curve if point[0] < step] + [(step, float(val), ms)]
                run.step_avg_ms = milliseconds(fields.get(b"step_avg"))
            elif train is not None:
                float(train)
                run.train_hash = hashlib.sha256(run.train_hash.encode() + b"%d %s" % (step, train)).hexdigest()
        except ValueError:
            return False
        return True


class Environment:
    """What the lines of one section tell about where the run ran."""

    def __init__(self):
        self.found, self.gpus, self.values, self.json_lines = False, [], {}, None

    def feed(self, raw: bytes) -> None:
        """Take in a line."""
        if self.json_lines is not None:
            self.json_lines.append(raw)
            if raw.rstrip() == b"}":
                try:
                    self.values["facts"] = json.loads(b"".join(self.json_lines))
                except ValueError:
                    pass
                self.json_lines = None
            elif len(self.json_lines) > 2000:
                self.json_lines = None
        elif raw.startswith(b"Running P"):
            self.found = True
            if found := RUNNING.match(raw.decode(errors="replace").strip()):
                self.values["torch"] = found[1]
                if found[2]:
                    self.values.update(gpu=found[2], world_size=int(found[3]))
        elif raw.rstrip() == b"{" and self.found:
            self.json_lines = [raw]
        elif raw.startswith(b"|") and (row := GPU_ROW.match(raw.decode(errors="replace"))):
            self.found = True
            self.gpus.append(row[1])

    def describe(self, run: Run) -> None:
        """Write it into a run."""
        facts = self.values.get("facts", {})
        run.facts = {name: fact for name, fact in facts.items() if isinstance(fact, FACT_TYPES.get(name, object))}
        run.torch = self.values.get("torch")
        run.gpu = self.values.get("gpu") or (self.gpus[0] if self.gpus else None)
        run.world_size = self.values.get("world_size") or (len(self.gpus) or None)


def lines_of(file):
    """The lines of a binary file, those beyond 64 KiB in pieces: a log is never held in memory."""
    return iter(lambda: file.readline(2**16), b"")


def read_log(path: str) -> list[Run]:
    """The runs in a file, most often one; none where it is no log. Raises OSError.

    Sections end at separators. The code is all before the section with the versions (it may hold separators itself), or
    before the last section; metric lines count after it alone.
    """
    runs, file_digest, offset = [], hashlib.sha256(), 0
    code_start, code_span, begun = 0, None, False  # in bytes
    environment, described, metrics = Environment(), Environment(), Metrics()
    doubtful: list[bytes] = []  # metric lines, unless a separator shows that they stand in the code of the next log

    def finish():
        for run in metrics.runs:
            run.steps = run.steps or steps_shown(run)
            (described if described.found else environment).describe(run)
            run.path, run.code_span = path, code_span
            runs.append(run)

    with open(path, "rb") as file:
        if b"\0" in file.read(2**13):
            return []
        file.seek(0)
        for line in lines_of(file):
            file_digest.update(line)
            begin, offset = offset, offset + len(line)
            if line.rstrip(b"\r\n") == SEPARATOR:
                if not begun:  # a leading separator
                    code_start = offset
                elif described.found and metrics.runs:  # a whole log is over, and the file goes on
                    finish()
                    described, code_span = Environment(), (code_start or begin, begin)
                elif not described.found and environment.found and code_span:
                    described = environment
                elif not described.found:
                    code_span = code_start, begin
                environment, metrics, doubtful = Environment(), Metrics(), []
                continue
            begun = begun or bool(line.strip())
            environment.feed(line)
            if described.found and metrics.runs and code_start is not None:
                doubtful += [line] if line.startswith((b"step:", b"resumed")) else []
            elif metrics.feed(line):
                code_start = None if described.found else code_start
            elif code_start is None and CODE_BEGINS.match(line):  # of the next log in this file
                code_start = begin
        for line in doubtful:
            metrics.feed(line)
        finish()
        for index, run in enumerate(runs):
            run.index = index
            run.file_hash = file_digest.hexdigest()
            run.code_hash = run.facts.get("code_hash") or code_hash(file, run.code_span)
    return runs


def steps_shown(run: Run) -> int | None:
    """The steps of a run whose log names no number (llm.c): where it ends with a validation out of turn."""
    steps = [step for step, *_ in run.curve]
    if len(steps) < 3 or steps[-1] != run.last_step:
        return None
    return run.last_step if run.last_step % (steps[1] - steps[0]) else None


def code_hash(file, span: tuple[int, int] | None) -> str | None:
    """12 hexadecimal digits that stand for the bytes of a span of an open file."""
    if not span or span[0] == span[1]:
        return None
    digest, left = hashlib.sha256(), span[1] - span[0]
    file.seek(span[0])
    while left and (part := file.read(min(left, 2**16))):
        digest.update(part)
        left -= len(part)
    return digest.hexdigest()[:12]


def code_of(run: Run) -> bytes:
    """The embedded script, as it was. Raises UserError where there is none."""
    if not run.code_span:
        raise UserError(f"{run.path} embeds no code")
    with open(run.path, "rb") as file:
        file.seek(run.code_span[0])
        code = file.read(run.code_span[1] - run.code_span[0])
    # A log ends the code with a line break, which the script itself may not have had: its hash tells.
    told = run.facts.get("code_hash")
    return code[:-1] if told and hashlib.sha256(code[:-1]).hexdigest()[:12] == told else code


def find_runs(paths: list[str], direct: bool = False) -> tuple[list[Run], list[str]]:
    """All runs below paths, and what is to be said of the rest: files that are no logs or can't be read.

    direct: of a folder only the logs directly in it, if there are any. Raises UserError where a path leads nowhere, or
    nothing holds a run.
    """
    files, remarks, runs = [], [], []
    for path in paths:
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise UserError(f"there is no {path}; expected a log, a folder or a glob")
        for item in found:
            if os.path.isdir(item):
                here, below = ([str(p) for p in found if p.suffix in (".txt", ".log") and not p.is_dir()]
                               for found in (Path(item).glob("*"), Path(item).rglob("*")))
                files += sorted(here if direct and here else below)
            else:
                files.append(item)
    for path in dict.fromkeys(os.path.normpath(f) for f in files):
        try:
            in_file = read_log(path)
        except OSError as error:
            remarks.append(f"can't read {path}: {error.strerror}")
            continue
        if not in_file:
            remarks.append(f"no log: {path}")
        runs += in_file
    if not runs:
        raise UserError("; ".join([f"no run in {' '.join(paths)}", *remarks[:3]]))
    return runs, remarks


# ---------------------------------------------------------------------------------------------------------------------
# Groups of comparable runs, and statistics

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


def mean(values: list[float]) -> float | None:
    """None for no values."""
    return statistics.fmean(values) if values else None


def deviation(values: list[float]) -> float | None:
    """Standard deviation of the sample; None for fewer than two values, or where one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def t_test_below(values: list[float], target: float) -> float | None:
    """p-value of the one-sided one-sample t-test that the mean is at most target (null: it is above)."""
    from scipy.special import stdtr  # Student's distribution; scipy.stats takes a second to import
    sd, n = deviation(values), len(values)
    if sd is None:
        return None
    difference = mean(values) - target
    return float(stdtr(n - 1, difference / (sd / math.sqrt(n)))) if sd else float(difference > 0)


def welch_test_below(a: list[float], b: list[float]) -> float | None:
    """p-value of Welch's one-sided t-test that the mean of a is below that of b (null: it is not)."""
    from scipy.special import stdtr
    sd_a, sd_b = deviation(a), deviation(b)
    if sd_a is None or sd_b is None:
        return None
    va, vb = sd_a ** 2 / len(a), sd_b ** 2 / len(b)
    if va + vb == 0:
        return float(mean(a) >= mean(b))
    freedom = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))
    return float(stdtr(freedom, (mean(a) - mean(b)) / math.sqrt(va + vb)))


def difference(new: dict, old: dict) -> tuple[float, float | None, str]:
    """(mean of new - mean of old, two-sided p-value or None, how it was tested) of values by seed.

    Paired where both have the same seeds, two or more; else Welch's t-test.
    """
    a, b = list(new.values()), list(old.values())
    apart = mean(a) - mean(b)
    if len(new) > 1 and new.keys() == old.keys():
        pairs = [new[seed] - old[seed] for seed in new]
        how = f"paired by seed, {len(pairs)} pairs"
        if not deviation(pairs):
            return apart, None, f"{how} without spread"
        one_sided = t_test_below(pairs, 0.0)
    else:
        spread = deviation(a) or deviation(b)
        one_sided, how = welch_test_below(a, b) if spread else None, "Welch"
    if one_sided is None:
        return apart, None, "a test needs 2 runs of each, and a spread"
    return apart, min(1.0, 2 * min(one_sided, 1 - one_sided)), how


def runs_needed(sd: float, margin: float, p: float, power: float | None = None) -> int:
    """Fewest runs whose t-test gives p or less where mean and deviation come out as told, margin below the target.

    power: instead, fewest with at least this chance of such a p. Raises UserError beyond a million.
    """
    from scipy.special import nctdtr, stdtrit
    for n in itertools.chain(range(2, 10_000), range(10_000, 1_000_001, 1000)):
        critical, shift = stdtrit(n - 1, 1 - p), margin * math.sqrt(n) / sd
        if shift >= critical if power is None else nctdtr(n - 1, shift, critical) <= 1 - power:
            return n
    raise UserError(f"more than a million runs for a margin of {margin} at a deviation of {sd}")


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def common_path(runs: list[Run]) -> str:
    """The log, or the folder that holds all logs, relative to where the command is run."""
    return os.path.relpath(os.path.commonpath([os.path.abspath(run.path) for run in runs]))


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


def first_at_target(group: Group, target: float) -> list[tuple[Run, tuple]]:
    """The runs that met the target, each with the point of its curve where it first did."""
    firsts = [(run, next((point for point in run.curve if point[1] <= target), None)) for run in group.runs]
    return [(run, point) for run, point in firsts if point]


def seconds(ms: float | None, digits: int = 1) -> str:
    """Milliseconds for people, in seconds; empty where unknown."""
    return "" if ms is None else f"{ms / 1000:.{digits}f} s"


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


def why_incomplete(run: Run) -> str:
    """How far a run came that was not validated after its last step."""
    last = f"step {run.curve[-1][0]}, val loss {run.curve[-1][1]:.4f}" if run.curve else "none"
    return f"last step {run.last_step} of {run.steps or 'an unknown number'}, last validation: {last}"


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


# --- verify

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


def by_seed(values: list, runs: list[Run]) -> dict:
    """values by their runs' seeds; by log, which pairs with nothing, where one tells none or two tell the same."""
    seeds = [run.hyperparameters.get("seed") for run in runs]
    told = None not in seeds and len(set(seeds)) == len(seeds)
    return dict(zip(seeds if told else [(run.path, run.index) for run in runs], values, strict=True))


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


# --- diff, extract

def paint(text: str, colour: int) -> str:
    """text in an ANSI colour, where a terminal shows it."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"


def code_diff(a: list[str], b: list[str], context: int = 3) -> list[str]:
    """A unified diff that takes lines for equal where only white space differs, and leaves out blank lines."""
    a, b = [line for line in a if line.strip()], [line for line in b if line.strip()]
    plain_a, plain_b = (["".join(line.split()) for line in lines] for lines in (a, b))
    out = []
    for group in difflib.SequenceMatcher(None, plain_a, plain_b, autojunk=False).get_grouped_opcodes(context):
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
    sides = []
    for path in (args.a, args.b):
        groups = group_runs(find_runs([path], direct=True)[0])
        sides.append(groups[0])
        if len(groups) > 1:
            print(f"note: {path} holds {len(groups)} sorts of runs; shown is the fastest, {len(groups[0].runs)} runs "
                  f"of code {groups[0].any.code_hash}, {groups[0].any.steps} steps")
    a, seed = sides[0].typical, sides[0].typical.hyperparameters.get("seed")
    b = next((run for run in sides[1].runs if seed is not None and run.hyperparameters.get("seed") == seed),
             sides[1].typical)
    print(f"--- {a.path}", f"+++ {b.path}", sep="\n")
    codes = [code_of(run).decode("utf-8", errors="replace").splitlines() if run.code_span else None for run in (a, b)]
    if None in codes:
        print(f"(no code in {(a if codes[0] is None else b).path})")
    else:
        print(*(code_diff(*codes) or ["(the code is the same)"]), sep="\n")
    facts = [{**{f"--{name}": value for name, value in run.hyperparameters.items()},
              **{name: run.facts[name] for name in run.facts.keys() - {"hyperparameters", "command", "run_id"}},
              "gpu": run.gpu, "world_size": run.world_size, "torch": run.torch, "steps": run.steps}
             for run in (a, b)]
    for fact, group in zip(facts, sides, strict=True):
        averages = [run.step_avg_ms for run in group.runs if run.step_avg_ms is not None]
        for name, values, form in (("val_loss", group.losses, ".4f"), ("train_time_ms", group.times, ".0f"),
                                   ("step_avg_ms", averages, ".2f")):
            spread = "" if (sd := deviation(values)) is None else f" ± {sd:{form}} (n = {len(values)})"
            fact[name] = f"{mean(values):{form}}{spread}" if values else None
    print()
    for name in sorted({**facts[0], **facts[1]}):
        old, new = facts[0].get(name), facts[1].get(name)
        if old != new:
            print(f"{name}: {paint(str(old), 31)} -> {paint(str(new), 32)}")
    if sides[0].runs and sides[1].runs:
        print(*comparison(sides[1], sides[0], ("B", "A")), sep="\n")
    return 0


def extract(args) -> int:
    """The embedded script."""
    run, *others = find_runs([args.log])[0]
    if any(other.code_hash != run.code_hash for other in others):
        print(f"note: {args.log} holds {len(others) + 1} runs; this is the script of the first", file=sys.stderr)
    Path(args.out).write_bytes(code_of(run))
    return 0


# --- plot

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
MARKERS = "osD^vPX"


def curves_of(group: Group) -> list[tuple[int, float, float, float, float | None]]:
    """At each step that all runs validated: step, mean, lowest and highest loss, mean training time in ms or None."""
    runs = group.runs or group.incomplete
    by_run = [{step: (loss, ms) for step, loss, ms in run.curve} for run in runs]
    points = []
    for step in sorted(set.intersection(*map(set, by_run))):
        losses, times = zip(*(points_of[step] for points_of in by_run), strict=True)
        # Before the time began again at zero, steps were not timed.
        timed = all(ms is not None for ms in times) and not any(step < run.restart_step for run in runs)
        points.append((step, mean(losses), min(losses), max(losses), mean(times) if timed else None))
    return points


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


def plot(args) -> int:
    """Validation loss against steps, tokens where known, and training time."""
    if Path(args.out).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"-o is {args.out}, expected a name that ends in .svg, .png or .pdf")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    groups = group_runs(find_runs(args.paths)[0])
    groups = sorted((g for g in groups if g.runs) if any(g.runs for g in groups) else groups, key=lambda g: g.entry)
    tokens_known = all(group.any.step_tokens for group in groups)
    axes_names = ["step", *(["tokens (millions)"] if tokens_known else []), "training time (seconds)"]
    figure, axes = plt.subplots(1, len(axes_names), figsize=(1 + 4.6 * len(axes_names), 4.6), layout="constrained",
                                sharey=True, squeeze=False)
    finals = []
    for number, (group, label) in enumerate(zip(groups, labels_of(groups), strict=True)):
        points = curves_of(group)
        label += f" ({len(group.runs)} run{'s' * (len(group.runs) != 1)})"
        look = dict(color=PALETTE[number % len(PALETTE)], marker=MARKERS[number % len(MARKERS)], markersize=4)
        for axis, name in zip(axes[0], axes_names, strict=True):
            if name == "step":
                shown = [(point[0], *point[1:4]) for point in points]
            elif name.startswith("tokens"):
                shown = [(point[0] * group.any.step_tokens / 1e6, *point[1:4]) for point in points]
            else:
                shown = [(point[4] / 1000, *point[1:4]) for point in points if point[4] is not None]
            if shown:
                x, middle, low, high = zip(*shown, strict=True)
                axis.plot(x, middle, label=label if name == "step" else None, linewidth=1.6, **look)
                axis.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        finals += [point[2] for point in points[-1:]]
    targets = {group.any.target if args.target is None else args.target for group in groups}
    for axis, name in zip(axes[0], axes_names, strict=True):
        for target in targets:
            axis.axhline(target, color="#555555", linestyle="--", linewidth=1,
                         label=f"target {target:g}" if name == "step" else None)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])  # a point at zero is seen whole
    floor = min([*finals, *targets])
    top = max(point[1] for group in groups for point in curves_of(group)[1:] or curves_of(group))
    units = {"laptop": "byte", "fineweb": "token", None: "token"}  # public logs name no track
    unit = {units.get(group.any.hyperparameters.get("track")) for group in groups}
    told = f" a {unit.pop()}" if len(unit) == 1 and None not in unit else ""
    margin = 0.04 * (top - floor) or 0.01
    axes[0][0].set(ylabel=f"validation loss (nats{told})", ylim=(floor - margin, top + margin))
    figure.legend(loc="outside lower center", ncols=min(3, len(groups) + len(targets)), frameon=False)
    figure.suptitle("Validation loss: mean over runs; the band reaches from the lowest to the highest")
    figure.savefig(args.out, dpi=130)
    print(args.out)
    return 0


# --- runs-needed, ab

def print_runs_needed(args) -> int:
    """How many runs a claim needs."""
    for name in ("sd", "margin"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} is {getattr(args, name)}, expected more than 0")
    if not 0 < args.p < 0.5:
        raise UserError(f"--p is {args.p}, expected between 0 and 0.5")
    print(f"{runs_needed(args.sd, args.margin, args.p)} runs give p <= {args.p:g} where they come out as told: a mean "
          f"{args.margin:g} below the target, a standard deviation of {args.sd:g}")
    print(f"{runs_needed(args.sd, args.margin, args.p, 0.8)} runs give it with a chance of 80%")
    return 0


def ab(args) -> int:
    """Runs two scripts in turn, with the seeds 0, 1, ... for both, goes on where it was interrupted, and verifies."""
    if args.runs < 1:
        raise UserError(f"--runs is {args.runs}, expected 1 or more")
    scripts = [Path(args.a).resolve(), Path(args.b).resolve()]
    for script in scripts:
        if not script.is_file():
            raise UserError(f"there is no script {script}; expected two train_gpt.py files")
    # A run is kept by its side, script, flags and seed: where B was mended, A's are still those of A.
    sides = {which: hashlib.sha256(script.read_bytes()).hexdigest()[:12]
             for which, script in zip("AB", scripts, strict=True)}
    name = hashlib.sha256(json.dumps(args.args).encode()).hexdigest()[:12]
    state_path = ROOT / "records" / "scratch" / f"ab-{name}" / "state.json"
    state_path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(state_path.read_text()) if state_path.exists() else {}
    before, took = dict(done), []
    keys = {(which, seed): f"{which}-{sides[which]}-{seed}" for seed in range(args.runs) for which in "AB"}
    missing = [where for where, key in keys.items()
               if not (os.path.exists(done.get(key, "")) and any(run.complete for run in read_log(done[key])))]
    for number, (which, seed) in enumerate(missing, len(keys) - len(missing) + 1):
        script, key = scripts["AB".index(which)], keys[which, seed]
        left = f", about {mean(took) * (len(keys) - number + 1) / 60:.0f} minutes left" if took else ""
        print(f"--- run {number} of {len(keys)}{left}: {which}, seed {seed}: {script} {' '.join(args.args)}",
              flush=True)
        begun = time.monotonic()
        command = [sys.executable, str(script), *args.args, f"--seed={seed}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        log = None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = re.search(r", log (\S.*)$", line)
            log = found[1] if found else log
        if process.wait() or not log:
            raise UserError(f"{script} ended with exit code {process.returncode}"
                            + ("" if log else " and named no log") + "; mend it and run the command again: it goes on")
        took.append(time.monotonic() - begun)
        done[key] = log
        state_path.with_suffix(".tmp").write_text(json.dumps(done, indent=1))
        os.replace(state_path.with_suffix(".tmp"), state_path)
    logs = {which: [done[keys[which, seed]] for seed in range(args.runs)] for which in "AB"}
    if done == before:
        print(f"--- all runs were there already; delete {state_path} to run them anew")
    print("--- logs of A, the baseline, and B, the candidate:", *logs["A"], *logs["B"], sep="\n")
    return verdict(logs["B"], logs["A"], args)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    """Without argparse's usage before the one line that matters."""

    def error(self, message):
        raise UserError(f"{message}; python records/compare.py --help shows the commands")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name, function, help):
        added = commands.add_parser(name, help=help, description=function.__doc__)
        added.set_defaults(function=function)
        return added

    def judging(added):
        added.add_argument("--target", type=float, help=f"loss to reach (the log's own track's, else {TARGET})")
        added.add_argument("--p", type=float, default=0.01, help="what p-values must lie below (%(default)s)")
        added.add_argument("--systems-only", action="store_true",
                           help="only the speed of the same mathematics changed: the loss must not get worse")

    added = command("table", table, "one row per group of comparable runs, fastest first")
    added.add_argument("paths", nargs="+", metavar="PATH")
    added.add_argument("--target", type=float, help=f"loss to test against (the log's own track's, else {TARGET})")
    form = added.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as a pull request wants it")
    form.add_argument("--json", action="store_true", help="a list of objects")
    added = command("verify", verify, "apply the rules to a claim; exit code 0 or 1")
    added.add_argument("candidate", nargs="+", metavar="CANDIDATE", help="logs, or folders: the logs directly in them")
    added.add_argument("--baseline", nargs="+", metavar="OLD", help="likewise (CANDIDATE's folder baseline/)")
    judging(added)
    added = command("diff", diff, "what differs: code, hyperparameters, environment, results")
    added.add_argument("a", metavar="A")
    added.add_argument("b", metavar="B")
    added = command("plot", plot, "validation loss against steps, tokens and training time")
    added.add_argument("paths", nargs="+", metavar="PATH")
    added.add_argument("-o", "--out", required=True, help=".svg or .png to write")
    added.add_argument("--target", type=float)
    added = command("extract", extract, "write the embedded script")
    added.add_argument("log", metavar="LOG")
    added.add_argument("-o", "--out", required=True)
    added = command("runs-needed", print_runs_needed, "how many runs a claim needs")
    added.add_argument("--sd", type=float, required=True, help="standard deviation of the final loss")
    added.add_argument("--margin", type=float, required=True, help="how far the mean lies below the target")
    added.add_argument("--p", type=float, default=0.01)
    added = command("ab", ab, "run two scripts in turn, A B A B ..., then verify B against A")
    added.add_argument("a", metavar="A", help="the baseline's script")
    added.add_argument("b", metavar="B", help="the candidate's; what follows -- goes to both: -- --track laptop")
    added.add_argument("--runs", type=int, required=True, help="of each script; seeds 0, 1, ...")
    judging(added)
    end = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_args(argv[:end]), argv[end + 1:]
    if rest and args.command != "ab":
        raise UserError(f"unexpected arguments after --: {' '.join(rest)}")
    args.args = rest
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        return args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # | head
        return 0
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

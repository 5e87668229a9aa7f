"""Logs: what one tells of its runs, in our format and in all public ones.

A log is source, a line of 100 '=', versions, the line again, metrics; or with any of the first parts missing. What it
does not tell is None.
"""
import glob
import hashlib
import itertools
import json
import math
import os
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path

TARGET = 3.28  # of fineweb, where a log names none
SEPARATOR = b"=" * 100
STEP = re.compile(rb"step:(\d{1,15})/(\d{1,15})\s+(\S.*)")  # more digits are no step
LLM_C = re.compile(rb"s:(\d{1,15}) (tel|trl):(\S+)")  # llm.c: validation and training loss
FIELD = re.compile(rb"([\w/]+):(\S+)")
DURATION = re.compile(rb"(\d+(?:\.\d+)?)(ms|s)$")
RESUMED = re.compile(rb"resumed from .* at step (\d+)(?:$|; other runs)")
RUNNING = re.compile(r"Running PyTorch (\S+?),?(?: on (.+) with world_size (\d+)| .*)?$")
GPU_ROW = re.compile(r"\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|")  # of nvidia-smi's table
CODE_BEGINS = re.compile(rb'(import |from |#!|"""|\'\'\')')
DATED = re.compile(r"\d{4}-\d\d-\d\d_|\d{6}_")  # how an entry's folder begins; public ones of 2025: MMDDYY
SAYS_NOTHING = {"this_pr", "pr", "baseline", "log", "logs", "run", "runs", "result", "results", "new", "old", "main",
                "candidate"}  # of whose runs a folder holds
# Hyperparameters on which no result depends: runs that differ in these alone are comparable.
HARMLESS = {"seed", "entry", "resume", "resume_anyway", "keep", "val_every", "log_every", "save_every", "profile",
            "prompt", "sample_tokens", "device", "compile", "dtype"}


class UserError(Exception):
    """A mistake the user can mend: one line on stderr, exit code 2."""


# What a log's JSON object tells of these counts only if it is of that type; else it is as if the log did not tell it.
FACT_TYPES = {"hyperparameters": dict, "target": (int, float), "script": str, "code_hash": str, "run_id": str}


class Pace:
    """The training time at steps spread evenly over a run: a few hundred of them, however long it is."""
    MOST = 512

    def __init__(self):
        self.points, self.stride = array("d"), 1  # step, milliseconds, step, milliseconds, ...

    def add(self, step: int, ms: float) -> None:
        """Take in the time of a metric line."""
        if self.points and step - self.points[-2] < self.stride:
            return
        self.points.extend((step, ms))
        if len(self.points) > 2 * self.MOST:
            self.points = array("d", [x for i in range(0, len(self.points), 4) for x in self.points[i:i + 2]])
            self.stride *= 2

    def go_back(self, step: int) -> None:
        """Forget what came after a step: it is done again."""
        while self.points and self.points[-2] > step:
            del self.points[-2:]

    def intervals(self, after: int = 0) -> list[tuple[int, float]]:
        """(step at its end, milliseconds a step) of what lies between two points, from a step on."""
        pairs = list(zip(self.points[::2], self.points[1::2], strict=True))
        return [(int(step), (ms - ms_before) / (step - before)) for (before, ms_before), (step, ms)
                in zip(pairs, pairs[1:], strict=False) if before >= after and 0 <= ms - ms_before < math.inf]


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
    pace: Pace = field(default_factory=Pace, repr=False)
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
        """The entry whose script ran, or the script's name where it is in none; where no log tells, the log's folder.

        A folder inside an entry is named with it, as is one whose name says nothing (this_pr).
        """
        command = self.facts.get("command")
        ran = Path(str(command[0])) if isinstance(command, list) and command else Path()
        script = Path(self.facts.get("script", ""))
        if folder := script.parent.name.strip(".") or (ran.parent.name if DATED.match(ran.parent.name) else ""):
            return folder
        folders = self.folders
        if folders[-1] == "scratch" and (stem := script.stem or ran.stem):
            return stem
        first = max((i for i, folder in enumerate(folders) if DATED.match(folder)), default=len(folders) - 1)
        return "/".join(folders[first if DATED.match(folders[first]) else -2 if folders[-1] in SAYS_NOTHING else -1:])

    @property
    def folders(self) -> tuple[str, ...]:
        """The names of the log's folder and of those above it, the nearest last; four at most."""
        return Path(os.path.abspath(self.path)).parent.parts[-4:]

    @property
    def track(self) -> str:
        """Empty where the log does not tell."""
        return str(self.hyperparameters.get("track", ""))

    @property
    def target(self) -> float:
        return self.facts.get("target", TARGET)

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
            run.pace.go_back(self.resumed_at)
            self.resumed_at = self.last_line_ms = None  # nor does the time begin again where it goes back with the step
        run.last_step = step
        ms = milliseconds(fields.get(b"train_time"))
        if ms is not None:
            if self.last_line_ms is not None and ms < self.last_line_ms:
                run.restart_step = step
            self.last_line_ms = ms
            run.pace.add(step, ms)
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


def why_incomplete(run: Run) -> str:
    """How far a run came that was not validated after its last step."""
    last = f"step {run.curve[-1][0]}, val loss {run.curve[-1][1]:.4f}" if run.curve else "none"
    return f"last step {run.last_step} of {run.steps or 'an unknown number'}, last validation: {last}"


def sample_of(run: Run) -> str:
    """The text that the run wrote after training; empty where its log holds none. Raises OSError."""
    with open(run.path, "rb") as file:
        file.seek(max(0, os.path.getsize(run.path) - 2**18))
        lines = file.read().decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    begins = [i for i, line in enumerate(lines) if line == "sample:"]
    text = itertools.takewhile(lambda line: line.startswith("|"), lines[begins[-1] + 1:] if begins else [])
    return "\n".join(line.removeprefix("|").removeprefix(" ") for line in text)


def has_separator(path: str) -> bool:
    """Whether a file without a run is a log all the same, of a run that ended before its first step. Raises OSError."""
    with open(path, "rb") as file:
        return any(line.rstrip(b"\r\n") == SEPARATOR for line in lines_of(file))


def find_runs(paths: list[str], direct: bool = False) -> tuple[list[Run], list[str]]:
    """All runs below paths, and what is to be said of the rest: files that can't be read, logs that end before their
    first step, and named files that are no logs; in a folder those are passed over.

    direct: of a folder only the logs directly in it, if there are any. Raises UserError where a path leads nowhere, or
    nothing holds a run.
    """
    files, named, remarks, runs = [], set(), [], []
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
                named.add(os.path.normpath(item))
    for path in dict.fromkeys(os.path.normpath(f) for f in files):
        try:
            in_file = read_log(path)
            begun = bool(in_file) or has_separator(path)
        except OSError as error:
            remarks.append(f"can't read {path}: {error.strerror}")
            continue
        if not begun and path in named:
            remarks.append(f"no log: {path}")
        elif not in_file and begun:
            remarks.append(f"no step in {path}")
        runs += in_file
    if not runs:
        packed = [f"its logs are packed: tar xzf {p} -C {path}" for path in paths for p in Path(path).rglob("*.tar.gz")]
        raise UserError("; ".join([f"no run in {' '.join(paths)}", *packed[:1], *remarks[:3]]))
    return runs, remarks

"""Reads logs, in our format and in all public ones.

A log consists of the source code, a line of 100 '=', the versions, the line again, and the metrics;
the first parts may be missing. Whatever a log does not contain is None in its Run.
"""
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import UserError
from data.documents import files_below

TARGET = 3.28  # FineWeb's, used if a log names none
SEPARATOR = b"=" * 100
STEP = re.compile(rb"step:(\d{1,15})/(\d{1,15})\s+(\S.*)")  # a longer number is no step
LLM_C = re.compile(rb"s:(\d{1,15}) (tel|trl):(\S+)")  # llm.c: validation and training loss
FIELD = re.compile(rb"([\w/]+):(\S+)")
DURATION = re.compile(rb"(\d+(?:\.\d+)?)(ms|s)$")
HELD_OUT = re.compile(rb"held_out_loss:(\d{1,9}\.\d{1,9}) ")
RESUMED = re.compile(rb"resumed from .* at step (\d{1,15})(?:$|; other runs)")
# Lines of our logs, when a run starts or is resumed: where it runs; what changed at the resume.
MACHINE = re.compile(rb"track .+?, .*?(\d+ x .+?), log:? ")
CHANGED = re.compile(rb"(?:setting changed: (\w+)|(\w+) changed:) was .*, now .*")
RUNNING = re.compile(r"Running PyTorch (\S+?),?(?: on (.+) with world_size (\d{1,9})| .*)?$")
GPU_ROW = re.compile(r"\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|")  # a row of nvidia-smi's table
CODE_BEGINS = re.compile(rb'(import |from |#!|"""|\'\'\')')
DATED = re.compile(r"\d{4}-\d\d-\d\d_|\d{6}_")  # an entry's folder; some public ones use MMDDYY
# Names of folders that do not say whose runs the folder holds.
SAYS_NOTHING = {"this_pr", "pr", "baseline", "log", "logs", "run", "runs", "result", "results",
                "new", "old", "main", "candidate"}
# Hyperparameters that change no result: runs that differ in these alone are comparable. dtype and
# compile count through the environment's "activations" and "compiled", which say what was used.
HARMLESS = {"seed", "entry", "resume", "resume_anyway", "keep", "val_every", "log_every",
            "save_every", "no_weights", "profile", "prompt", "sample_tokens", "device", "compile",
            "dtype"}
# A value in a log's JSON object that has another type than this is ignored.
FACT_TYPES = {"hyperparameters": dict, "target": (int, float), "script": str, "code_hash": str,
              "run_id": str}


@dataclass
class Run:
    """One training run, as far as its log describes it."""
    path: str
    index: int = 0                    # among the runs of the file
    code_hash: str | None = None
    code_span: tuple[int, int] | None = None      # begin and end of the script in the log, in bytes
    gpu: str | None = None            # model of the GPU, or of the CPU if the run used none
    world_size: int | None = None
    torch: str | None = None          # version
    facts: dict = field(default_factory=dict)     # the JSON object in this project's logs
    steps: int | None = None          # planned
    last_step: int = -1               # of any metric line
    curve: list = field(default_factory=list)     # (step, validation loss, time in ms or None)
    tokens: dict = field(default_factory=dict)    # tokens read so far, by validated step
    changes: list = field(default_factory=list)   # of machine, settings, ... when it was resumed
    restart_step: int = 0             # where the training time began again from zero
    step_avg_ms: float | None = None  # of the last validation
    held_out_loss: float | None = None            # on text that no decision rests on, in nats
    train_hash: str = ""              # hash of the training losses

    @property
    def complete(self) -> bool:
        """Whether the run was validated after its last step, and nothing changed in between."""
        finished = self.steps is not None and bool(self.curve) and self.curve[-1][0] == self.steps
        return finished and not self.changes

    @property
    def val_loss(self) -> float | None:
        """Final validation loss in nats; None for an incomplete run."""
        return self.curve[-1][1] if self.complete else None

    @property
    def train_time_ms(self) -> float | None:
        """Training time in milliseconds; None for an incomplete run."""
        return self.curve[-1][2] if self.complete else None

    @property
    def partial(self) -> bool:
        """Whether validations read fewer tokens than the track's, so that the loss is no result."""
        return bool(self.hyperparameters.get("val_tokens"))

    @property
    def hyperparameters(self) -> dict:
        """The script's settings; empty for public logs, which do not list them."""
        return self.facts.get("hyperparameters", {})

    @property
    def entry(self) -> str:
        """The name of the entry whose script ran.

        A script outside an entry gives its own name. A log that names no script gives its folder:
        with the folders below an entry, or the folder above if its name says nothing (this_pr).
        """
        command = self.facts.get("command")
        started = Path(str(command[0])) if isinstance(command, list) and command else Path()
        script = Path(self.facts.get("script", ""))
        folder = script.parent.name.strip(".")
        if not folder and DATED.match(started.parent.name):
            folder = started.parent.name
        if folder:
            return folder
        folders = self.folders
        stem = script.stem or started.stem
        if folders[-1] == "scratch" and stem:
            return stem
        dated = [i for i, name in enumerate(folders) if DATED.match(name)]
        if dated:
            return "/".join(folders[dated[-1]:])
        return "/".join(folders[-2:] if folders[-1] in SAYS_NOTHING else folders[-1:])

    @property
    def folders(self) -> tuple[str, ...]:
        """The names of at most four folders that contain the log, the nearest last."""
        return Path(os.path.abspath(self.path)).parent.parts[-4:]

    @property
    def track(self) -> str:
        """The track's name; empty if the log does not name it."""
        return str(self.hyperparameters.get("track", ""))

    @property
    def target(self) -> float:
        """The loss that the run has to reach, in nats."""
        return self.facts.get("target", TARGET)

    @property
    def config(self) -> dict:
        """What must be equal, besides code and hardware, for two runs to be comparable."""
        facts = ("activations", "compiled", "data_fingerprint", "threads")
        settings = self.hyperparameters.items()
        return {**{name: value for name, value in settings if name not in HARMLESS},
                **{name: self.facts[name] for name in facts if name in self.facts}}

    @property
    def losses(self) -> tuple:
        """All losses. Two runs of one script with the same seed can have the same."""
        return tuple((step, loss) for step, loss, _ in self.curve), self.train_hash

    def tokens_before(self, step: int) -> int | None:
        """Tokens that the run had read before a step, over all ranks; None if the log does not say.

        Newer metric lines count them. In older logs the batch must be the same in all stages.
        """
        if step in self.tokens:
            return self.tokens[step]
        by_stage = self.facts.get("stage_tokens")
        if isinstance(by_stage, list) and by_stage:
            tokens_a_step = by_stage[0] if by_stage == by_stage[:1] * len(by_stage) else None
        elif by_stage is not None or "extension_steps" in self.hyperparameters:
            tokens_a_step = None  # a script with stages
        else:
            sizes = [self.hyperparameters.get(name) for name in ("batch_size", "sequence_length")]
            tokens_a_step = math.prod(sizes) if all(map(is_size, sizes)) else None
        return step * tokens_a_step if is_size(tokens_a_step) else None


def is_size(value) -> bool:
    """Whether a value in a log can be a number of tokens."""
    return type(value) is int and 0 < value <= 10**12


def number(digits: str) -> int | float:
    """An integer of a JSON object; infinite if no float can hold it."""
    return int(digits) if len(digits) < 300 else math.inf


def milliseconds(word: bytes | None) -> float | None:
    """Reads `1234ms` or `1.234s`; None for `nanms` and everything else."""
    found = DURATION.match(word or b"")
    if not found:
        return None
    return float(found[1]) * (1000 if found[2] == b"s" else 1)


class Part(NamedTuple):
    """A part of a run, from its start or from a resume on."""
    begin: int          # step
    machine: str        # empty if the log does not say
    changes: list[str]  # of settings, data, ... since the part before


def changes_between(parts: list[Part]) -> list[str]:
    """What changed between the parts of a run, as one text each."""
    machines = [part.machine for part in parts if part.machine]
    moved = [f"{old} -> {new}" for old, new in itertools.pairwise(machines) if old != new]
    return moved + [change for part in parts for change in part.changes]


class Metrics:
    """The runs in a section of metric lines.

    A step that goes back begins a new run, unless the run was resumed.
    """

    def __init__(self):
        self.runs: list[Run] = []
        self.last_line_ms: float | None = None
        self.machine = ""  # such as "1 x AMD EPYC, 1 threads"
        self.resumed_at: int | None = None  # until the next metric line
        self.parts: list[Part] = []  # of the last run

    def feed(self, line: bytes) -> bool:
        """Reads a line; returns whether it was a metric line."""
        if not line.endswith((b"\n", b"ms")):
            return False  # the file was cut here, perhaps in the middle of a number
        line = line.rstrip()
        if found := STEP.match(line):
            step = int(found[1])
            steps = int(found[2])
            fields = dict(FIELD.findall(found[3]))
            val = fields.get(b"val_loss")
            train = fields.get(b"train_loss")
        elif found := LLM_C.match(line):
            step = int(found[1])
            steps = None
            fields = {}
            val = found[3] if found[2] == b"tel" else None
            train = found[3] if found[2] == b"trl" else None
        else:
            self.feed_other(line)
            return False
        run = self.run_at(step, steps)
        run.last_step = step
        ms = milliseconds(fields.get(b"train_time"))
        if ms is not None:
            if self.last_line_ms is not None and ms < self.last_line_ms:
                run.restart_step = step
            self.last_line_ms = ms
        try:
            if val is not None:
                earlier = [point for point in run.curve if point[0] < step]
                run.curve = [*earlier, (step, float(val), ms)]
                run.step_avg_ms = milliseconds(fields.get(b"step_avg"))
                tokens = fields.get(b"tokens", b"")
                if tokens.isdigit() and len(tokens) < 16:
                    run.tokens[step] = int(tokens)
            elif train is not None:
                float(train)
                text = run.train_hash.encode() + b"%d %s" % (step, train)
                run.train_hash = hashlib.sha256(text).hexdigest()
        except ValueError:
            return False
        return True

    def feed_other(self, line: bytes) -> None:
        """Reads a line that is no metric line: it may say that the run was resumed."""
        found = HELD_OUT.match(line)
        if found and self.runs:
            self.runs[-1].held_out_loss = float(found[1])
        elif found := MACHINE.match(line):
            self.machine = found[1].decode(errors="replace")
        elif found := RESUMED.match(line):
            self.resumed_at = int(found[1])
            # What came after the checkpoint does not count.
            self.parts = [part for part in self.parts if part.begin < self.resumed_at]
            self.parts.append(Part(self.resumed_at, self.machine, []))
        elif self.resumed_at is not None and (found := CHANGED.match(line)):
            if found[1] is None or found[1].decode() not in HARMLESS:
                self.parts[-1].changes.append(line.decode(errors="replace"))

    def run_at(self, step: int, steps: int | None) -> Run:
        """The run that a metric line belongs to: a new one, or the last, set back if resumed."""
        if not self.runs or (step < self.runs[-1].last_step and self.resumed_at is None):
            self.runs.append(Run("", steps=steps))
            self.last_line_ms = None
            if self.resumed_at is None:
                self.parts = [Part(0, self.machine, [])]
        run = self.runs[-1]
        if self.resumed_at is not None:  # the steps after the checkpoint are repeated
            run.curve = [point for point in run.curve if point[0] <= self.resumed_at]
            self.resumed_at = None
            self.last_line_ms = None  # the time goes back with the step, which is no restart
        run.changes = changes_between(self.parts)
        return run


class Environment:
    """What the lines of one section say about versions, hardware and settings."""

    def __init__(self):
        self.found = False
        self.gpus: list[str] = []
        self.values: dict = {}  # gpu, world_size, torch, and the JSON object as facts
        self.json_lines: list[bytes] | None = None

    def feed(self, raw: bytes) -> None:
        """Reads a line."""
        if self.json_lines is not None:
            self.json_lines.append(raw)
            if raw.rstrip() == b"}":
                try:
                    text = b"".join(self.json_lines).decode(errors="replace")
                    self.values["facts"] = json.loads(text, parse_int=number)
                except (ValueError, RecursionError):
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
        """Writes what was found into a run."""
        facts = self.values.get("facts", {})
        run.facts = {name: fact for name, fact in facts.items()
                     if isinstance(fact, FACT_TYPES.get(name, object))}
        run.torch = self.values.get("torch")
        run.gpu = self.values.get("gpu") or (self.gpus[0] if self.gpus else None)
        run.world_size = self.values.get("world_size") or (len(self.gpus) or None)


def open_log(path: str):
    """Opens a log as a binary file of UTF-8 text. It may be compressed with gzip, or have another
    encoding of Unicode, as PowerShell writes it. Raises OSError."""
    file = open(path, "rb")
    begin = file.peek(4)[:4]
    encoding = json.detect_encoding(begin)
    if begin[:2] == b"\x1f\x8b":
        file.close()
        return gzip.open(path)
    if encoding == "utf-8":
        return file
    with file:
        return io.BytesIO(file.read().decode(encoding, errors="replace").encode())


def lines_of(file):
    """The lines of a binary file; those beyond 64 KiB in pieces, so that none fills the memory."""
    return iter(lambda: file.readline(2**16), b"")


def read_log(path: str) -> list[Run]:
    """The runs in a file: usually one, none if the file is no log. Raises OSError.

    Sections end at separators. The code is everything before the section with the versions, or
    before the last section; it may contain separators itself. Metric lines count only after it.
    """
    runs = []
    offset = 0
    begun = False  # whether there was a line that is neither empty nor a separator
    code_start: int | None = 0
    code_span: tuple[int, int] | None = None
    environment = Environment()  # of the current section
    described = Environment()    # of the current log
    metrics = Metrics()
    doubtful = []  # metric lines, unless a separator shows that they belong to the next log's code

    def finish():
        for run in metrics.runs:
            run.steps = run.steps or steps_shown(run)
            (described if described.found else environment).describe(run)
            run.path, run.code_span = path, code_span
            runs.append(run)

    with open_log(path) as file:
        if b"\0" in file.read(2**13):
            return []
        file.seek(0)
        for line in lines_of(file):
            begin = offset
            offset += len(line)
            if line.rstrip(b"\r\n") == SEPARATOR:
                if not begun:  # a leading separator
                    code_start = offset
                elif described.found and metrics.runs:  # a whole log ends, another one follows
                    finish()
                    described = Environment()
                    code_span = (code_start or begin, begin)
                elif not described.found and environment.found and code_span:
                    described = environment
                elif not described.found:
                    code_span = (code_start, begin)
                environment = Environment()
                metrics = Metrics()
                doubtful = []
                continue
            begun = begun or bool(line.strip())
            environment.feed(line)
            if described.found and metrics.runs and code_start is not None:
                if line.startswith((b"step:", b"resumed", b"track ")) or CHANGED.match(line):
                    doubtful.append(line)
            elif metrics.feed(line):
                code_start = None if described.found else code_start
            elif code_start is None and CODE_BEGINS.match(line):  # the next log in this file
                code_start = begin
        for line in doubtful:
            metrics.feed(line)
        finish()
        for index, run in enumerate(runs):
            run.index = index
            run.code_hash = run.facts.get("code_hash") or code_hash(file, run.code_span)
    return runs


def steps_shown(run: Run) -> int | None:
    """The number of steps of a run whose log does not state it (llm.c).

    It is known if the last line is a validation between two regular ones; else the result is None,
    because the run may have been cut off.
    """
    steps = [step for step, *_ in run.curve]
    if len(steps) < 3 or steps[-1] != run.last_step:
        return None
    return run.last_step if run.last_step % (steps[1] - steps[0]) else None


def code_hash(file, span: tuple[int, int] | None) -> str | None:
    """12 hexadecimal digits of the SHA-256 of the lines in a span of an open file, whatever their
    line ends; None if it is empty."""
    if not span or span[0] == span[1]:
        return None
    digest = hashlib.sha256()
    left = span[1] - span[0]
    file.seek(span[0])
    for line in lines_of(file):
        digest.update(line.replace(b"\r\n", b"\n"))
        left -= len(line)
        if left <= 0:
            break
    return digest.hexdigest()[:12]


def code_of(run: Run) -> bytes:
    """The embedded script, byte for byte. Raises UserError if there is none."""
    if not run.code_span:
        raise UserError(f"{run.path} embeds no code")
    with open_log(run.path) as file:
        file.seek(run.code_span[0])
        code = file.read(run.code_span[1] - run.code_span[0])
    # A log ends the code with a line break that the script may not have had, and may have got other
    # line ends since; the hash decides.
    unix = code.replace(b"\r\n", b"\n")
    windows = unix.replace(b"\n", b"\r\n")
    for script in (code, code[:-1], unix, unix[:-1], windows, windows[:-2]):
        if hashlib.sha256(script).hexdigest()[:12] == run.facts.get("code_hash"):
            return script
    return code


def why_incomplete(run: Run) -> str:
    """Why a run is incomplete: it changed when it was resumed, or it stopped early."""
    if run.changes:
        return f"resumed with changes: {'; '.join(run.changes)}"
    last = f"step {run.curve[-1][0]}, val loss {run.curve[-1][1]:.4f}" if run.curve else "none"
    steps = run.steps or "an unknown number"
    return f"last step {run.last_step} of {steps}, last validation: {last}"


def has_separator(path: str) -> bool:
    """Whether a file without a run is a log all the same, of a run that failed before step 0.

    Raises OSError.
    """
    with open_log(path) as file:
        return any(line.rstrip(b"\r\n") == SEPARATOR for line in lines_of(file))


def logs_below(folder: str, direct: bool) -> list[str]:
    """The .txt and .log files, also compressed ones, in a folder and, unless direct is set, below
    it. Links are followed.

    If direct is set but the folder itself holds no log, those below it are returned. Raises
    OSError if a folder can't be read.
    """
    def among(paths):
        return sorted(str(path) for path in paths if not path.is_dir()
                      and path.name.lower().removesuffix(".gz").endswith((".txt", ".log")))

    here = among(Path(folder).iterdir()) if direct else []
    return here or among(files_below(Path(folder)))


def find_runs(paths: list[str], direct: bool = False) -> tuple[list[Run], list[str]]:
    """All runs in logs, folders and globs, and remarks on files that could not be used.

    A remark names a file that can't be read, a log that ends before its first step, or a file that
    was named but is no log. Other files in a folder are skipped silently. direct: see logs_below.
    Raises UserError if a path does not exist or if there is no run at all.
    """
    files = []
    named = set()
    for path in paths:
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise UserError(f"there is no '{path}'; expected a log, a folder or a glob")
        for item in found:
            if os.path.isdir(item):
                files += logs_below(item, direct)
            else:
                files.append(item)
                named.add(os.path.normpath(item))
    runs = []
    remarks = []
    # A file that is reached twice, perhaps by a link, is read once.
    distinct = {os.path.realpath(file): os.path.normpath(file) for file in reversed(files)}
    for path in reversed(distinct.values()):
        if os.path.exists(path) and not os.path.isfile(path):  # to read a pipe could wait for ever
            remarks.append(f"can't read {path}: not a file")
            continue
        try:
            in_file = read_log(path)
            is_log = bool(in_file) or has_separator(path)
        except (OSError, EOFError, zlib.error) as error:  # the last two: damaged by compression
            remarks.append(f"can't read {path}: {getattr(error, 'strerror', None) or error}")
            continue
        if not is_log and path in named:
            remarks.append(f"no log: {path}")
        elif is_log and not in_file:
            remarks.append(f"no step in {path}")
        runs += in_file
    if not runs:
        message = [f"no run in {' '.join(paths)}"]
        for path in paths:
            if "records/candidates" in Path(os.path.abspath(path)).as_posix():
                message.append("a candidate is only predicted, and nothing is measured there")
                continue  # what is packed there are runs of other scripts
            for archive in list(Path(path).rglob("*.tar.gz"))[:1]:
                unpack = shlex.join(["tar", "xzf", str(archive), "-C", path])
                message.append(f"its logs are packed: {unpack}")
        raise UserError("; ".join(message + remarks[:3]))
    return runs, remarks

"""Run a training script on a simulated node of GPUs, without a GPU.

    ./run.sh simulate [SCRIPT] [--gpus 8] [--gpu H100] [--price 24] [--host] [--all] [flags]

The simulation runs one rank of SCRIPT (default: train_gpt.py) for a few steps, with its warm-up
and validation, on a CUDA runtime that computes nothing. Flags that it does not know are the
script's. It prints each check with a verdict and the reason. docs/simulator.md says what it
can't see. The exit code is 0, 1 after a FAIL, 2 for a wrong flag, or 3 if something could not run.
"""
import argparse
import collections
import concurrent.futures
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from tools.simulate.judge import (
    COLLECTIVES,
    HOST,
    Finding,
    HostTime,
    ends,
    fits,
    host_finding,
    host_time,
    judge,
    mean_step,
    peaks,
    predictions,
    same_collectives,
    smaller,
    steps,
    timed,
)
from tools.simulate.model import CARDS, ERROR, FITTED_TOKENS, PUBLISHED, left_out_error

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA_TESTS = Path("tests/runs/test_cuda.py")
ENVIRONMENT = ROOT / ".venv.cuda"
CPU_LIMIT = 7200  # seconds of CPU time that one job may take; train_gpt.py's first rank takes 1,200
REPORT_EVERY = 60  # seconds between two lines about a job that runs
WIDTH = 46         # columns of a check's name in the report


class CannotRun(Exception):
    """Something that the simulation needs is missing. The message says what, and how to get it."""


# --- A Python with a CUDA build of torch ----------------------------------------------------------

def cuda_python() -> str:
    """A Python whose torch is a CUDA build: CUDA_PYTHON, this one, or .venv.cuda.

    .venv.cuda is set up if it is missing. Raises CannotRun.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotRun("the simulation runs on x86-64 Linux, not on "
                        f"{platform.system()} {platform.machine()}")
    if not shutil.which("g++"):
        raise CannotRun("the simulation needs g++; on Debian and Ubuntu: apt install g++")
    given = os.environ.get("CUDA_PYTHON")
    for python in [given] if given else [sys.executable, str(ENVIRONMENT / "bin/python")]:
        if can_import_cuda_torch(python):
            return python
    if given:
        raise CannotRun(f"CUDA_PYTHON is {given}, which lacks tqdm or a CUDA build of torch; unset "
                        "it to have .venv.cuda set up")
    if os.environ.get("PYTHON"):  # ./run.sh then installs nothing
        raise CannotRun("PYTHON is given, so nothing is installed, and its torch is not a CUDA "
                        "build; unset PYTHON, or name a Python that has one in CUDA_PYTHON")
    return set_up_environment()


def can_import_cuda_torch(python: str) -> bool:
    """Whether this Python has what a script needs, and a torch that is built for CUDA."""
    command = [python, "-c", "import torch, tqdm, triton; print(torch.version.cuda)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() != "None"


def set_up_environment() -> str:
    """Install a CUDA build of torch, numpy and tqdm into .venv.cuda. Raises CannotRun."""
    print("the torch of this Python is not a CUDA build: setting up .venv.cuda with one (once; "
          "about 5 GB) ...", file=sys.stderr, flush=True)
    python = str(ENVIRONMENT / "bin/python")
    pins = re.findall(r"^(?:torch|numpy|tqdm)==.+", (ROOT / "requirements.txt").read_text(), re.M)
    # "===" asks for the build without a suffix, which is the CUDA build; "==" would prefer a +cpu
    # wheel if there is one.
    exact = [pin.replace("==", "===", 1) for pin in pins]
    for command in ([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
                    [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                     *exact]):
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            break
    if not can_import_cuda_torch(python):
        raise CannotRun("pip could not install a CUDA build of torch into .venv.cuda (see above); "
                        "try again, or name a Python that has one in CUDA_PYTHON")
    return python


# --- The simulated node ---------------------------------------------------------------------------

class Node:
    """A simulated node: runs jobs of node.py in a folder."""
    def __init__(self, python: str, folder: Path):
        """Build the CUDA runtime and driver that compute nothing. Raises CannotRun."""
        self.python, self.folder = python, folder
        self.running: set[subprocess.Popen] = set()
        find_triton = [python, "-c", "import triton; print(triton.__path__[0])"]
        triton = subprocess.run(find_triton, capture_output=True, text=True).stdout.strip()
        for source, target in (("fakecudart.cpp", "libfakecudart.so"),
                               ("fakecuda.cpp", "libcuda.so.1")):
            command = ["g++", "-shared", "-fPIC", "-O1", "-w", str(HERE / source),
                       "-o", str(folder / target), "-I", f"{triton}/backends/nvidia/include",
                       f"-Wl,-soname,{target}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CannotRun(f"g++ could not build {source}: {done.stderr.strip()[-300:]}")

    def environment(self, card_name: str, work: Path) -> dict[str, str]:
        """The environment variables of a job on a card."""
        card = CARDS[card_name]
        environment = {
            **os.environ,
            "LD_PRELOAD": str(self.folder / "libfakecudart.so"),
            "LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "TRITON_CACHE_DIR": str(work / "triton"),
            "TRITON_LIBCUDA_PATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "FAKE_CUDA_DEVICES": "8",
            "FAKE_CUDA_NAME": card.name,
            "FAKE_CUDA_MAJOR": str(card.capability[0]),
            "FAKE_CUDA_MINOR": str(card.capability[1]),
            "FAKE_CUDA_MULTIPROCESSORS": str(card.multiprocessors),
            "FAKE_CUDA_SHARED": str(card.shared),
            "FAKE_CUDA_MEMORY": str(card.memory)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        return environment

    def run(self, name: str, card_name: str = "H100", module: str = "node", label: str = "",
            **request) -> dict:
        """Run a job and return its record. Prints a line a minute. Raises CannotRun without one.

        module: node, or host; request: see there. label: what the lines call the job.
        """
        work, out = self.folder / name, self.folder / f"{name}.json"
        log_path = self.folder / f"{name}.txt"
        work.mkdir()
        request = dict(request, card=card_name, work=str(work), out=str(out))
        command = [self.python, "-m", f"tools.simulate.{module}", json.dumps(request)]
        with open(log_path, "w") as log:
            # In a session of its own, so that Ctrl-C does not reach the script.
            job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   env=self.environment(card_name, work), start_new_session=True)
            self.running.add(job)
            try:
                while is_running(job, REPORT_EVERY):
                    used = cpu_seconds(job.pid)
                    print(f"{label or name}: {used / 60:.1f} minutes of CPU, "
                          f"{progress(work, log_path)}", file=sys.stderr, flush=True)
                    if used > CPU_LIMIT:
                        raise CannotRun(f"{label or name} took more than {CPU_LIMIT} s of CPU time")
            finally:
                self.running.discard(job)
                end(job)
        if not out.exists():
            last = log_path.read_text().strip().splitlines()[-1:]
            raise CannotRun(f"{name} ended without a record: {''.join(last)[:400]}")
        return json.loads(out.read_text())

    def stop(self) -> None:
        """End the jobs that still run."""
        for job in list(self.running):
            end(job)


def is_running(job: subprocess.Popen, seconds: float) -> bool:
    """Whether a job still runs after so many seconds; returns at once when it ends."""
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children that have ended; 0 if it has ended itself."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def progress(work: Path, log: Path) -> str:
    """What a job has done so far, in words."""
    kernels = len(list(work.rglob("*.cubin")))
    phases = re.findall(r"^phase: (.+)$", log.read_text(errors="replace"), re.M)
    return f"{kernels:,} kernels compiled, now: {phases[-1] if phases else 'starting'}"


def end(job: subprocess.Popen) -> None:
    """End a job and all its processes, if it still runs."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


# --- Reports --------------------------------------------------------------------------------------

def show(title: str, findings: list[Finding]) -> None:
    """Print a block of the report, as wide as the terminal, or 120 columns into a file."""
    print(f"\n{title}")
    indent = WIDTH + 13
    columns = shutil.get_terminal_size((120, 24)).columns
    for check, verdict, why in findings:
        first, *others = textwrap.wrap(why, max(40, columns - indent - 1),
                                       break_on_hyphens=False) or [""]
        print(f"  {check:{WIDTH}} {verdict:9} {first}".rstrip())
        for line in others:
            print(" " * indent + line)
    sys.stdout.flush()


def summary(verdicts: dict[str, int]) -> str:
    """The last lines of the report: the number of findings by verdict, and what they mean."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    text = (f"{counts}. FAIL: on the real node the run would end in an error, hang or lose time. "
            "slow: it would run, but a kernel could be faster. No number was computed, so losses, "
            "accuracy and real times are not checked.")
    if "predicted" in verdicts:
        unseen = sum(row.left_out is None for row in PUBLISHED)
        text += (f" Predictions come from a model. Its error is {100 * left_out_error():.1f} % "
                 f"(root mean square) on {len(PUBLISHED) - unseen} records of modded-nanogpt, each "
                 f"left out of its fit, and up to {100 * ERROR:.0f} % on {unseen} that were never "
                 "fitted. All of them ran on one node of 8 H100s, with FlexAttention and "
                 f"{FITTED_TOKENS:,} or more tokens a GPU. Elsewhere the error is unknown.")
    columns = shutil.get_terminal_size((120, 24)).columns
    return "\n" + textwrap.fill(text, max(80, columns))


def compared_ranks(gpus: int) -> list[int]:
    """The ranks whose collectives are compared: the first, one in the middle, the last."""
    return sorted({0, gpus // 2, gpus - 1})


def simulate(node: Node, script: Path, flags: list[str], card_name: str, gpus: int,
             price: float | None, host: bool = False) -> dict:
    """Simulate rank 0, and the order of the collectives of other ranks. Returns the report.

    host: measure the time of the host, too. Raises CannotRun.
    """
    card, started = CARDS[card_name], time.time()
    number = len(list(node.folder.glob("*.txt")))
    name = f"job{number}_{script.parent.name}_{script.stem}_{card_name}_{gpus}"
    request = dict(script=str(script), flags=flags, world_size=gpus)
    jobs = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for rank in compared_ranks(gpus):
            jobs[rank] = pool.submit(
                node.run, f"{name}_rank{rank}", card_name, label=f"{script.name}, rank {rank}",
                rank=rank, compile=rank == 0, **request)
        try:
            record = jobs[0].result()
        except BaseException:  # leaving the pool would wait for the other jobs
            pool.shutdown(wait=False, cancel_futures=True)
            node.stop()
            raise
    measured, host_line = None, None
    if host and steps(record) and not record["error"]:  # after the jobs that would disturb it
        measured, host_line = measure_host(node, f"{name}_host", card_name, request)
    findings = judge(record, card, gpus, price, measured)
    if host_line:
        findings.append(host_line)
    if gpus > 1 and steps(record):
        findings.insert(3, compare_collectives(jobs))
    report = dict(script=str(script), card=card.name, gpus=gpus, flags=flags,
                  torch=record.get("torch"), findings=findings, kernels=record.get("kernels", []))
    if "batch_size" in record:
        report["batch"] = record["batch_size"], record["sequence_length"]
    if steps(record) and fits(record, card).verdict == "FAIL":
        findings.append(what_fits(node, request, card_name, record, name))
    if any(finding.verdict == "predicted" for finding in findings):
        found = predictions(record, card, gpus)
        report["peaks"] = peaks(record)
        report["peak_timed"] = max(phase["peak"] for phase in timed(record))
        report["predicted"] = mean_step(found)._asdict()
        report["stages"] = [dict(stage._asdict(), mean=stage.mean._asdict()) for stage in found]
        report["host"] = measured._asdict() if measured else None
    report["seconds"] = round(time.time() - started)
    return report


def compare_collectives(jobs: dict[int, concurrent.futures.Future]) -> Finding:
    """Do the ranks call the same collectives?"""
    try:
        return same_collectives({rank: job.result() for rank, job in jobs.items()})
    except CannotRun as error:
        return Finding(COLLECTIVES, "not run", str(error))


def measure_host(node: Node, name: str, card_name: str,
                 request: dict) -> tuple[HostTime | None, Finding]:
    """The host's time of a step, if it could be measured, and its line of the report."""
    try:
        record = node.run(name, card_name, module="host", label="the host's time", **request)
        if not record["error"]:
            return host_time(record), host_finding(record)
        reason = record["error"].strip().splitlines()[-1]
    except CannotRun as error:
        reason = str(error)
    return None, Finding(HOST, "not run", reason)


def what_fits(node: Node, request: dict, card_name: str, record: dict, name: str) -> Finding:
    """Flags with which the run fits into the card, tried."""
    check, flags = "flags that fit", smaller(record, CARDS[card_name])
    if flags is None:
        return Finding(check, "FAIL", "none: what does not depend on the sequence length is too "
                       "large by itself")
    request = dict(request, flags=[*request["flags"], *flags])
    try:
        again = node.run(f"{name}_smaller", card_name, label=" ".join(flags), rank=0, compile=True,
                         **request)
    except CannotRun as error:
        return Finding(check, "not run", f"{' '.join(flags)}: {error}")
    found = ends(again) if again["error"] else fits(again, CARDS[card_name])
    return Finding(check, found.verdict, f"{' '.join(flags)}: {found.why}")


def simulate_tests(node: Node, card_name: str) -> dict:
    """Run the functions of test_cuda.py on the simulated card. Returns a report."""
    findings = []
    try:
        request = dict(project=str(ROOT), tests=str(CUDA_TESTS))
        errors = node.run("test_cuda", card_name, **request)["tests"]
        for name, error in errors.items():
            lines = error.strip().splitlines() or ["numbers are not compared"]
            findings.append(Finding(name, "FAIL" if error else "ok", lines[-1]))
    except CannotRun as error:
        findings.append(Finding(str(CUDA_TESTS), "not run", str(error)))
    return dict(script=str(ROOT / CUDA_TESTS), card=CARDS[card_name].name, gpus=1, flags=[],
                findings=findings)


def reports(node: Node, given: argparse.Namespace, flags: list[str]) -> Iterator[dict]:
    """The report of each job, as soon as it is done."""
    jobs = [] if given.tests else [(given.script, given.gpus)]
    if given.all:
        jobs = [(given.script, gpus) for gpus in (1, 8, 16)]
        frozen = sorted((ROOT / "records").rglob("20*/train_gpt.py"))
        jobs += [(path, 8) for path in frozen if path != given.script]
    batch = None  # (batch_size, sequence_length) of the given script, once it is known
    for script, gpus in jobs:
        job_flags = []
        if script == given.script:
            job_flags = [*(divided(*batch, gpus) if batch else []), *flags]
        try:
            report = simulate(node, script, job_flags, given.gpu, gpus, given.price, given.host)
            if script == given.script:
                batch = report.get("batch")
        except CannotRun as error:
            report = dict(script=str(script), card=CARDS[given.gpu].name, gpus=gpus,
                          flags=job_flags,
                          findings=[Finding("the simulation", "not run", str(error))])
        yield report
    if given.all or given.tests:
        yield simulate_tests(node, given.gpu)


def divided(batch_size: int, sequence_length: int, gpus: int) -> list[str]:
    """Flags with which the same tokens a step divide over the GPUs: more and shorter sequences."""
    times = gpus // math.gcd(batch_size, gpus)
    if times == 1:
        return []
    return [f"--batch_size={batch_size * times}", f"--sequence_length={sequence_length // times}"]


# --- Command line ---------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""
    def error(self, message):
        print(f"error: {message}; ./run.sh simulate --help lists the flags", file=sys.stderr)
        sys.exit(2)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags of the simulation, flags of the script)."""
    parser = Parser(prog="./run.sh simulate", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    script = "train_gpt.py"
    if argv and argv[0].endswith(".py"):
        script, argv = argv[0], argv[1:]
    parser.add_argument("--gpus", type=int, default=8, help="number of ranks, one on each GPU (8)")
    parser.add_argument("--gpu", default="H100", choices=CARDS, help="the card (H100)")
    parser.add_argument("--host", action="store_true",
                        help="measure the host's time, too: 4 minutes of CPU more")
    parser.add_argument("--price", type=float, help="price of an hour of the node")
    parser.add_argument("--all", action="store_true",
                        help=f"1, 8 and 16 GPUs, every frozen script, {CUDA_TESTS}")
    parser.add_argument("--tests", action="store_true", help=f"{CUDA_TESTS} alone")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--folder", type=Path, help="new folder that keeps all that was recorded")
    given, flags = parser.parse_known_args(argv)
    given.script = Path(script).resolve()
    if not given.script.is_file():
        parser.error(f"{script} is not a file; expected a script like train_gpt.py")
    if given.gpus < 1:
        parser.error(f"--gpus is {given.gpus}, expected 1 or more")
    if given.folder and given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder {given.folder} is not empty, expected a new one")
    return given, flags


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    given, flags = parse(argv)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="simulate"))
    done = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        node = Node(cuda_python(), folder.resolve())
        print("simulating: 2 to 6 minutes of CPU a run, 25 for a script with stages ...",
              file=sys.stderr, flush=True)
        for report in reports(node, given, flags):
            done.append(report)
            if not given.json:
                script = Path(report["script"])
                if script.is_relative_to(ROOT):
                    script = script.relative_to(ROOT)
                command = " ".join([str(script), *report["flags"]])
                show(f"{command}, simulated on {report['gpus']} x {report['card']}",
                     report["findings"])
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    finally:
        if not given.folder:
            shutil.rmtree(folder, ignore_errors=True)
    counts = collections.Counter(finding.verdict for report in done
                                 for finding in report["findings"])
    if given.json:
        for report in done:
            report["findings"] = [finding._asdict() for finding in report["findings"]]
        print(json.dumps(done, indent=1))
    else:
        print(summary(counts))
    if "FAIL" in counts:
        return 1
    return 3 if "not run" in counts else 0


if __name__ == "__main__":
    # SIGTERM must run the finally clauses, which end the jobs.
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

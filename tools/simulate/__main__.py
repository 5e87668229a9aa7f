"""What would a node of 8 H100s say to this script? Asked without a GPU.

    ./run.sh simulate [SCRIPT] [--gpus 8] [--gpu H100] [--price 24] [--all] [--json] [the script's flags]

Runs one rank of SCRIPT (default: train_gpt.py) for a few steps, with warm-up, validation and sample, on a CUDA runtime
that computes nothing (README.md beside this file), and prints check, verdict, why. Exit code: 0; 1 after a FAIL; 2 for
a wrong flag; 3 where something could not be run.
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
    Finding,
    ends,
    fits,
    judge,
    peaks,
    predictions,
    same_collectives,
    smaller,
    steps,
    timed,
    whole,
)
from tools.simulate.model import CARDS, ERROR, FITTED_TOKENS, PUBLISHED, left_out_error

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv.cuda"
TIMEOUT = 1800  # seconds that one rank may take


class CannotRun(Exception):
    """Something that the simulation needs is missing; the message says what, and how to get it."""


def cuda_python() -> str:
    """A Python whose torch is a CUDA build: CUDA_PYTHON, this one, or .venv.cuda, which is set up where it is missing.

    Raises CannotRun.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise CannotRun(f"the simulation runs on x86-64 Linux, not on {platform.system()} {platform.machine()}")
    if not shutil.which("g++"):
        raise CannotRun("the simulation needs g++, which is not on the path; on Debian and Ubuntu: apt install g++")
    given = os.environ.get("CUDA_PYTHON")
    for python in [given] if given else [sys.executable, str(ENVIRONMENT / "bin/python")]:
        if has_cuda_build(python):
            return python
    if given:
        raise CannotRun(f"CUDA_PYTHON is '{given}', whose torch is no CUDA build; unset it to have .venv.cuda set up")
    pins = re.findall(r"^(?:torch|numpy)==.+", (ROOT / "requirements.txt").read_text(), re.M)
    if os.environ.get("SIMULATE_INSTALLS") == "no":
        raise CannotRun("PYTHON is given, so nothing is installed, and its torch is no CUDA build; unset PYTHON, or "
                        "name a Python that has one in CUDA_PYTHON")
    print("this Python's torch is not a CUDA build: setting up .venv.cuda with one (once; about 5 GB) ...",
          file=sys.stderr, flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)]).returncode or subprocess.run(
        [str(ENVIRONMENT / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         # === asks for the build without a suffix, the CUDA one, where a +cpu wheel would be preferred
         *(pin.replace("==", "===") for pin in pins)], stdout=sys.stderr).returncode
    if done or not has_cuda_build(str(ENVIRONMENT / "bin/python")):
        raise CannotRun("pip could not install a CUDA build of torch into .venv.cuda (see above); mend the network, or "
                        "name a Python that has one in CUDA_PYTHON")
    return str(ENVIRONMENT / "bin/python")


def has_cuda_build(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", "import torch, triton; print(torch.version.cuda)"], capture_output=True,
                              text=True)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() != "None"


class Node:
    """A simulated node: runs jobs of node.py in a folder."""
    def __init__(self, python: str, folder: Path):
        """Builds the CUDA runtime and driver that compute nothing. Raises CannotRun."""
        self.python, self.folder, self.running = python, folder, set()
        triton = subprocess.run([python, "-c", "import triton; print(triton.__path__[0])"], capture_output=True,
                                text=True).stdout.strip()
        for source, target in (("fakecudart.cpp", "libfakecudart.so"), ("fakecuda.cpp", "libcuda.so.1")):
            command = ["g++", "-shared", "-fPIC", "-O1", "-w", str(HERE / source), "-o", str(folder / target),
                       "-I", f"{triton}/backends/nvidia/include", f"-Wl,-soname,{target}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CannotRun(f"g++ could not build {source}: {done.stderr.strip()[-300:]}")

    def run(self, name: str, card_name: str = "H100", **request) -> dict:
        """The record of a job; request: see node.py. Raises CannotRun where the job left none."""
        card, work, out = CARDS[card_name], self.folder / name, self.folder / f"{name}.json"
        work.mkdir()
        environment = {
            **os.environ, "LD_PRELOAD": str(self.folder / "libfakecudart.so"),
            "LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton"),
            "PYTHONWARNINGS": "ignore", "FAKE_CUDA_DEVICES": "8", "FAKE_CUDA_NAME": card.name,
            "FAKE_CUDA_MAJOR": str(card.capability[0]), "FAKE_CUDA_MINOR": str(card.capability[1]),
            "FAKE_CUDA_MULTIPROCESSORS": str(card.multiprocessors), "FAKE_CUDA_SHARED": str(card.shared),
            "FAKE_CUDA_MEMORY": str(card.memory)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        words = dict(request, card=card_name, work=str(work), out=str(out))
        with open(self.folder / f"{name}.txt", "w") as log:
            # In a session of its own, or Ctrl-C would reach the script too, which would go on to the end of its step.
            job = subprocess.Popen([self.python, "-m", "tools.simulate.node", json.dumps(words)], cwd=ROOT, stdout=log,
                                   stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            self.running.add(job)
            try:
                job.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                raise CannotRun(f"{name} took longer than {TIMEOUT} s") from None
            finally:
                self.running.discard(job)
                end(job)
        if not out.exists():
            last = (self.folder / f"{name}.txt").read_text().strip().splitlines()[-1:]
            raise CannotRun(f"{name} ended without a record: {''.join(last)[:400]}")
        return json.loads(out.read_text())


    def stop(self) -> None:
        """End the jobs under way."""
        for job in list(self.running):
            end(job)


def end(job: subprocess.Popen) -> None:
    """A job with all its processes, if it still runs."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def show(title: str, findings: list[Finding]) -> None:
    """A block of the report on stdout, as wide as the terminal; 120 columns in a file."""
    print(f"\n{title}")
    width = max(40, shutil.get_terminal_size((120, 24)).columns - 60)
    for check, verdict, why in findings:
        lines = textwrap.wrap(why, width, break_on_hyphens=False) or [""]
        print(f"  {check:46} {verdict:9} {lines[0]}".rstrip())
        for line in lines[1:]:
            print(" " * 59 + line)
    sys.stdout.flush()


def summary(verdicts: dict[str, int]) -> str:
    """The last lines of the report: how many findings of each verdict, what they mean, how far they can be trusted."""
    text = (f"{', '.join(f'{n} {verdict}' for verdict, n in verdicts.items())}. FAIL: an error, a hang or time that a "
            "run loses on the real node; slow: it runs, but a kernel could be faster. No number was computed: losses, "
            "accuracy and real times are not seen.")
    if "predicted" in verdicts:
        fitted, fresh = (sum((row.left_out is None) == unseen for row in PUBLISHED) for unseen in (False, True))
        text += (f" Predictions are a model's: off by {100 * left_out_error():.1f} % (root mean square) where each of "
                 f"{fitted} public records was left out of its fit, by up to {100 * ERROR:.0f} % on {fresh} that it "
                 f"never saw; all of them on one node of 8 H100s, with FlexAttention and {FITTED_TOKENS:,} or more "
                 "tokens a GPU. Elsewhere the error is unknown.")
    return "\n" + textwrap.fill(text, max(80, shutil.get_terminal_size((120, 24)).columns))


def simulate(node: Node, script: Path, flags: list[str], card_name: str, gpus: int, price: float | None) -> dict:
    """One rank of the script, and the order of the last rank's collectives. Returns the report. Raises CannotRun."""
    card, started = CARDS[card_name], time.time()
    name = f"job{len(list(node.folder.glob('*.txt')))}_{script.parent.name}_{script.stem}_{card_name}_{gpus}"
    request = dict(script=str(script), flags=flags, world_size=gpus)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(node.run, name, card_name, rank=0, compile=True, **request)
        if gpus > 1:
            last = pool.submit(node.run, f"{name}_last", card_name, rank=gpus - 1, compile=False, **request)
        try:
            record = first.result()
        except BaseException:  # the pool would wait for the other one
            node.stop()
            raise
        findings = judge(record, card, gpus, price)
        if gpus > 1 and steps(record):
            try:
                findings.insert(3, same_collectives(record, last.result()))
            except CannotRun as error:
                findings.insert(3, Finding("first and last rank call the same collectives", "not run", str(error)))
    report = dict(script=str(script), card=card.name, gpus=gpus, flags=flags, torch=record.get("torch"),
                  findings=findings, kernels=record.get("kernels", []))
    if "batch_size" in record:
        report["batch"] = record["batch_size"], record["sequence_length"]
    if steps(record) and fits(record, card).verdict == "FAIL":
        findings.append(what_fits(node, request, card_name, record, name))
    if any(finding.verdict == "predicted" for finding in findings):
        found = predictions(record, card, gpus)
        report |= dict(peaks=peaks(record), peak_timed=max(phase["peak"] for phase in timed(record)),
                       predicted=whole(found)._asdict(),
                       stages=[dict(stage._asdict(), mean=stage.mean._asdict()) for stage in found])
    return report | dict(seconds=round(time.time() - started))


def what_fits(node: Node, request: dict, card_name: str, record: dict, name: str) -> Finding:
    """Flags with which the card holds the run, tried."""
    words, check = smaller(record, CARDS[card_name]), "flags that fit"
    if words is None:
        return Finding(check, "FAIL", "none: what does not depend on the sequence's length is too large by itself")
    request = dict(request, flags=[*request["flags"], *words])
    try:
        again = node.run(f"{name}_smaller", card_name, rank=0, compile=True, **request)
    except CannotRun as error:
        return Finding(check, "not run", f"{' '.join(words)}: {error}")
    found = ends(again) if again["error"] else fits(again, CARDS[card_name])
    return Finding(check, found.verdict, f"{' '.join(words)}: {found.why}")


def simulate_tests(node: Node, card_name: str) -> dict:
    """tests/runs/test_cuda.py on the card: does it run and compile? Returns a report."""
    try:
        found = node.run("test_cuda", card_name, project=str(ROOT))["tests"]
        last = {name: (error.strip().splitlines() or ["numbers not compared"])[-1] for name, error in found.items()}
        findings = [Finding(name, "FAIL" if error else "ok", last[name]) for name, error in found.items()]
    except CannotRun as error:
        findings = [Finding("tests/runs/test_cuda.py", "not run", str(error))]
    return dict(script=str(ROOT / "tests/runs/test_cuda.py"), card=CARDS[card_name].name, gpus=1, flags=[],
                findings=findings)


def reports(node: Node, given: argparse.Namespace, flags: list[str]) -> Iterator[dict]:
    """Each job's report, as it is done."""
    jobs = [] if given.tests else [(given.script, given.gpus)]
    if given.all:
        entries = [path for path in sorted((ROOT / "records").glob("20*/train_gpt.py")) if path != given.script]
        jobs = [(given.script, 1), (given.script, 8), (given.script, 16), *((path, 8) for path in entries)]
    shapes = {}  # of the script's batch, once it is known
    for script, gpus in jobs:
        words = [*divided(*shapes.get(script, (gpus, 0)), gpus), *flags] if script == given.script else []
        try:
            report = simulate(node, script, words, given.gpu, gpus, given.price)
            shapes[script] = report.get("batch", (gpus, 0))
        except CannotRun as error:
            report = dict(script=str(script), card=CARDS[given.gpu].name, gpus=gpus, flags=words,
                          findings=[Finding("the simulation", "not run", str(error))])
        yield report
    if given.all or given.tests:
        yield simulate_tests(node, given.gpu)


def divided(batch_size: int, sequence_length: int, gpus: int) -> list[str]:
    """Flags with which as many tokens a step divide over so many GPUs: more and shorter sequences."""
    times = gpus // math.gcd(batch_size, gpus)
    return [f"--batch_size={batch_size * times}", f"--sequence_length={sequence_length // times}"] if times > 1 else []


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its whole usage before the one line that matters
        print(f"error: {message}; ./run.sh simulate --help lists the flags", file=sys.stderr)
        sys.exit(2)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the simulation's flags, the script's)."""
    parser = Parser(prog="./run.sh simulate", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    script = words.pop(0) if words and words[0].endswith(".py") else "train_gpt.py"
    parser.add_argument("--gpus", type=int, default=8, help="ranks, one a GPU (8)")
    parser.add_argument("--gpu", default="H100", choices=CARDS, help="the card (H100)")
    parser.add_argument("--price", type=float, help="of an hour of the node, in any currency")
    parser.add_argument("--all", action="store_true", help="1, 8 and 16 GPUs, every entry, tests/runs/test_cuda.py")
    parser.add_argument("--tests", action="store_true", help="tests/runs/test_cuda.py alone")
    parser.add_argument("--json", action="store_true", help="the report as JSON instead of text")
    parser.add_argument("--folder", type=Path, help="a new folder, to keep all that was recorded")
    given, flags = parser.parse_known_args(words)
    given.script = Path(script).resolve()
    if not given.script.is_file():
        parser.error(f"{script} is no file; expected a script like train_gpt.py")
    if given.gpus < 1:
        parser.error(f"--gpus is {given.gpus}, expected 1 or more")
    if given.folder and given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder {given.folder} is not empty, expected a new one")
    return given, flags


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    given, flags = parse(words)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="simulate"))
    done, verdicts = [], set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        node = Node(cuda_python(), folder.resolve())
        print("simulating: 2 minutes a run on 2 cores, 7 to 15 for a script with stages ...", file=sys.stderr, flush=True)
        for report in reports(node, given, flags):
            done.append(dict(report, findings=[finding._asdict() for finding in report["findings"]]))
            verdicts |= {finding.verdict for finding in report["findings"]}
            if not given.json:
                script = Path(report["script"])
                name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
                show(f"{' '.join([str(name), *report['flags']])}, simulated on {report['gpus']} x {report['card']}",
                     report["findings"])
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    finally:
        if not given.folder:
            shutil.rmtree(folder, ignore_errors=True)
    if given.json:
        print(json.dumps(done, indent=1))
    else:
        print(summary(collections.Counter(finding["verdict"] for report in done for finding in report["findings"])))
    return 1 if "FAIL" in verdicts else 3 if "not run" in verdicts else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(128 + signal.SIGTERM))  # not without what runs here
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

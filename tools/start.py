"""Starts a run: fetches the data of its track, then starts one process per GPU. run.sh calls it.

    python -m tools.start [--record ENTRY] [flags of train_gpt.py]

The environment variables NPROC and SHARDS are explained by ./run.sh --help.
"""
import argparse
import logging
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from data import UserError, run_as_program, usable_cores
from data.fineweb import DEFAULT_SHARDS

ROOT = Path(__file__).resolve().parents[1]


def positive_number(variable: str, default: int) -> int:
    """Return the environment variable as a number, or default if it is unset or empty.

    Raises UserError if it is something else.
    """
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{variable} is {text!r}, expected a number from 1 on")
    return int(text)


def script_of(entry: str | None) -> str:
    """Return the path of the script to run: train_gpt.py, or that of an entry in records/.

    Raises UserError, with a list of the entries, if there is no such entry.
    """
    if entry is None:
        return "train_gpt.py"
    records = ROOT / "records"
    entries = sorted(path.parent.relative_to(records).as_posix()
                     for path in records.rglob("train_gpt.py"))
    name = entry.rstrip("/")
    if name not in entries:
        raise UserError(f"--record is {entry!r}, expected one of: {' '.join(entries)}")
    return f"records/{name}/train_gpt.py"


def num_gpus(device: str | None) -> int:
    """Return how many CUDA GPUs a run with --device has. CUDA_VISIBLE_DEVICES is heeded."""
    if device == "cpu":
        return 0
    import torch  # takes seconds, so only when it is needed
    return torch.cuda.device_count()


def track_of(flags: list[str], processes: int) -> str:
    """Return the track of a run of train_gpt.py; a checkpoint can name it, too.

    Raises UserError for wrong flags, so that nobody downloads data for a run that can't start.
    """
    import train_gpt

    try:
        settings = train_gpt.parse_arguments(flags)
        train_gpt.check_hyperparameters(settings, processes)
    except train_gpt.UserError as error:
        raise UserError(str(error)) from None
    return settings.track


def fetch(track: str | None) -> int:
    """Fetch or build what is missing of a track's data. Returns an exit code.

    It is a process of its own, because a log holds the peak memory of the process that trains. The
    script itself says what is missing of other tracks.
    """
    if track == "laptop":
        words = ["data.laptop"]
    elif track == "fineweb":
        shards = positive_number("SHARDS", DEFAULT_SHARDS)
        words = ["data.fineweb", "--shards", str(shards)]
    else:
        return 0
    process = subprocess.Popen([sys.executable, "-m", *words])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # a terminal sends Ctrl-C to both processes
        code = process.wait()
    return exit_code(code)


def exit_code(code: int) -> int:
    """Turn the -n of a process that signal n has ended into the 128 + n of shells."""
    return 128 - code if code < 0 else code


def start_ranks(processes: int, script: str, flags: list[str]) -> int:
    """Run the script in several processes with torchrun. Returns an exit code.

    If a rank fails, one line names it instead of torchrun's traceback.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)
    # torchrun's default is one thread per process. A laptop has more cores than that.
    threads = min(max(usable_cores() // processes, 1), 8)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Without --local-addr torchrun resolves the name of the host, which may be impossible.
    options = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}"]
    try:
        torchrun([*options, script, *flags])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        stopped = [128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        if failure.exitcode in (2, *stopped):  # the rank has explained it
            return failure.exitcode
        reason = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            reason = f"signal {-failure.exitcode}"
        print(f"error: rank {rank} ended with {reason}, so the other ranks were stopped",
              file=sys.stderr)
        return exit_code(failure.exitcode)
    return 0


def start(argv: list[str]) -> int:
    """Start the run that the command line asks for. Returns an exit code. Raises UserError."""
    if find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no package torch; unset PYTHON, so that run.sh sets "
                        f"up .venv, or: {sys.executable} -m pip install -r requirements.txt")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--record", nargs="?", const="")
    args, flags = parser.parse_known_args(argv)
    script = script_of(args.record)
    # The script's own parser reports a flag without its value, so here a value is optional.
    for flag in ("--track", "--device"):
        parser.add_argument(flag, nargs="?")
    parser.add_argument("-h", "--help", action="store_true")
    given = parser.parse_known_args(flags)[0]
    if given.help:
        os.execv(sys.executable, [sys.executable, script, *flags])

    processes = positive_number("NPROC", 0)
    if processes == 0:
        processes = max(num_gpus(given.device), 1)
    track = given.track
    if script == "train_gpt.py":
        track = track_of(flags, processes)
    elif track is None:  # some entries have another default
        track = "fineweb" if num_gpus(given.device) else "laptop"
        flags = ["--track", track, *flags]
    code = fetch(track)
    if code:
        return code
    if processes > 1:
        return start_ranks(processes, script, flags)
    os.execv(sys.executable, [sys.executable, script, *flags])


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(run_as_program(start, sys.argv[1:]))

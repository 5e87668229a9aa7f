"""Starts a run: fetches the data of its track, then starts one process per GPU. run.sh calls it.

    python -m tools.start [SCRIPT.py | --record ENTRY] [flags of the script]

The environment variables NPROC and SHARDS are explained by ./run.sh --help.
"""
import argparse
import ast
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from data import Stopped, UserError, run_as_program, usable_cores
from data.fineweb import DEFAULT_SHARDS

ROOT = Path(__file__).resolve().parents[1]
# What torchrun and job systems tell a process about its ranks.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE",
                  "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR",
                  "MASTER_PORT")
# Signals that stop a run: torchrun passes them on, and the ranks end with 128 + n. Slurm can be
# asked to send SIGUSR1 before the time limit.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Ends all processes of a run at once, without a checkpoint. The scripts do not handle it.
END_SIGNAL = signal.SIGALRM


class Plan(NamedTuple):
    """What a run consists of."""
    script: str         # see short_name
    flags: list[str]
    track: str | None   # whose data it needs, if that can be fetched
    processes: int
    gpus: int           # that torch sees; 0: it runs on the CPU


def positive_number(variable: str, default: int) -> int:
    """Return the environment variable as a number, or default if it is unset or empty.

    Raises UserError if it is something else.
    """
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise UserError(f"{variable} is {text!r}, expected a number from 1 on")
    return int(text)


def script_of(argv: list[str]) -> tuple[Path, list[str]]:
    """Return the path of the script that a command line asks for, and the script's flags.

    It is the file that is named first, or that of an entry in records/, or train_gpt.py. Raises
    UserError, with a list of the entries, if there is no such entry.
    """
    if argv and not argv[0].startswith("-"):
        script = Path(argv[0]).absolute()
        if not script.is_file() or script.suffix != ".py":
            raise UserError(f"there is no script {argv[0]}; expected an edited copy of "
                            "train_gpt.py, a file that ends in .py")
        return script, argv[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--record", nargs="?", const="")
    args, flags = parser.parse_known_args(argv)
    if args.record is None:
        return ROOT / "train_gpt.py", flags
    records = ROOT / "records"
    entries = sorted(path.parent.relative_to(records).as_posix()
                     for path in records.rglob("train_gpt.py"))
    name = args.record.rstrip("/")
    if name not in entries:
        raise UserError(f"--record is {args.record!r}, expected one of: {' '.join(entries)}")
    return records / name / "train_gpt.py", flags


def short_name(script: Path) -> str:
    """Return the script's path relative to ROOT if its folder is inside, else the whole path.

    Its name may begin with a hyphen, but the path does not: Python takes that for an option.
    """
    path = script.parent.resolve() / script.name
    if not path.is_relative_to(ROOT):
        return str(script)
    name = str(path.relative_to(ROOT))
    return f"./{name}" if name.startswith("-") else name


def num_gpus(device: str | None) -> int:
    """Return how many CUDA GPUs a run with --device has. CUDA_VISIBLE_DEVICES is heeded."""
    if device == "cpu":
        return 0
    import torch  # takes seconds, so only when it is needed
    return torch.cuda.device_count()


def num_processes(gpus: int) -> int:
    """Return NPROC, by default one per GPU and one without GPUs. Raises UserError."""
    processes = positive_number("NPROC", max(gpus, 1))
    if 0 < gpus < processes:
        raise UserError(f"NPROC is {processes}, but there are {gpus} GPUs; expected one process "
                        "per GPU at most, or --device cpu")
    return processes


def load(script: Path) -> ModuleType:
    """Import a script as a module. Raises UserError, without running it, if it is no Python or has
    not train_gpt.py's functions for flags; and whatever the script raises when it is imported.
    """
    try:
        functions = {node.name for node in ast.parse(script.read_bytes(), str(script)).body
                     if isinstance(node, ast.FunctionDef)}
    except OSError as error:
        raise UserError(f"can't read {script}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{script} is not valid Python: {error}") from None
    for name in ("parse_arguments", "check_hyperparameters"):
        if name not in functions:
            raise UserError(f"{script} has no function {name}; expected train_gpt.py or an edited "
                            "copy of it")
    spec = importlib.util.spec_from_file_location("script_to_start", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    sys.path.insert(0, str(script.parent))  # as when Python runs it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    root = Path(getattr(module, "ROOT", ROOT)).resolve()
    if root != ROOT:  # found above the script
        raise UserError(f"{script} would read data and write logs in {root}, not in {ROOT}; copy "
                        f"it into {ROOT}")
    return module


def plan_run(argv: list[str]) -> Plan:
    """Return what the command line asks for. Raises UserError, also for wrong flags, so that nobody
    downloads data for a run that can't start.
    """
    if find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no package torch; unset PYTHON, so that run.sh sets "
                        f"up .venv, or: {sys.executable} -m pip install -r requirements.txt")
    positive_number("SHARDS", DEFAULT_SHARDS)
    if not os.environ.get("OMP_NUM_THREADS"):  # if it is empty, torch complains
        os.environ.pop("OMP_NUM_THREADS", None)
    script, flags = script_of(argv)
    name = short_name(script)
    if Path(name).parts[0] == "records" and script.name == "train_gpt.py":
        # The script's own parser reports a flag without its value, so here a value is optional.
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag in ("--track", "--device"):
            parser.add_argument(flag, nargs="?")
        given = parser.parse_known_args(flags)[0]
        gpus = num_gpus(given.device)
        track = given.track
        if track is None:  # some entries have another default
            track = "fineweb" if gpus else "laptop"
            flags = ["--track", track, *flags]
        return Plan(name, flags, track, num_processes(gpus), gpus)
    module = load(script)
    try:
        settings = module.parse_arguments(flags)
        gpus = num_gpus(getattr(settings, "device", None))  # a checkpoint can name it, too
        processes = num_processes(gpus)
        module.check_hyperparameters(settings, processes)
    except module.UserError as error:
        raise UserError(str(error)) from None
    return Plan(name, flags, settings.track, processes, gpus)


def num_threads(processes: int) -> int:
    """Return how many CPU threads each process has, which is the script's own rule: one per core
    that this process may use, at most 8, or OMP_NUM_THREADS.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # it can be a list
    return int(text) if text.isdecimal() else min(max(usable_cores() // processes, 1), 8)


def place_of(plan: Plan) -> str:
    """Return where a run takes place: what must be equal for times to be comparable."""
    import torch

    import train_gpt

    processes = f"{plan.processes} process{'es' if plan.processes > 1 else ''}"
    if plan.gpus:  # asked in another process, because it takes memory of the GPU
        ask = "import torch; print(torch.cuda.get_device_name())"
        name = subprocess.run([sys.executable, "-c", ask], text=True, capture_output=True)
        device = f"{plan.processes} x {name.stdout.strip()}"
    else:
        threads = num_threads(plan.processes)
        name = train_gpt.device_name(torch.device("cpu"))
        device = f"CPU {name}, {threads} thread{'s' if threads > 1 else ''} each"
    return f"{processes} on {device}, torch {torch.__version__}"


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
    except Stopped:  # a signal to this process alone
        process.terminate()
        process.wait()
        raise
    return exit_code(code)


def exit_code(code: int) -> int:
    """Turn the -n of a process that signal n has ended into the 128 + n of shells."""
    return 128 - code if code < 0 else code


def forget_other_ranks() -> None:
    """Remove what another launcher left in the environment: a run that is started here has the
    processes that are started here. Variables that begin with PET_ are defaults of torchrun's
    options; one of them would make it wait for another node.
    """
    if {os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")} - {"", "0", "1"}:
        print("note: WORLD_SIZE and RANK in the environment are ignored, because run.sh starts all "
              "processes itself; for several nodes see docs/nodes.md", file=sys.stderr)
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith(("PET_", "TORCHELASTIC_")):
            del os.environ[name]


def loopback_address() -> str:
    """Return an address over which processes of this machine can connect. It is no name, because
    neither the host's name nor "localhost" resolves everywhere. Raises UserError.
    """
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.create_server((address, 0), family=family) as server:
                socket.create_connection(server.getsockname()[:2], timeout=5).close()
            return address
        except OSError:
            continue
    raise UserError("several processes connect over 127.0.0.1 or ::1, but neither works here; "
                    "enable the loopback interface (ip link set lo up), or use NPROC=1")


def start_ranks(plan: Plan) -> int:
    """Run a script in several processes with torchrun. Returns an exit code.

    If a rank fails, one line names it instead of torchrun's traceback.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)
    # torchrun's default is one thread per process. A laptop has more cores than that.
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads(plan.processes)))
    address = loopback_address()
    for _, interface in socket.if_nameindex():
        if interface in ("lo", "lo0"):  # gloo resolves the host's name otherwise
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    passed_on = [number.name for number in (*STOP_SIGNALS, END_SIGNAL)
                 if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    options = ["--nnodes=1", f"--nproc-per-node={plan.processes}", "--rdzv-backend=c10d",
               f"--rdzv-endpoint={address}:0", f"--local-addr={address}",
               f"--signals-to-handle={','.join(passed_on)}"]
    try:
        torchrun([*options, plan.script, *plan.flags])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, *[128 + number for number in STOP_SIGNALS]):
            return failure.exitcode  # the rank has explained it
        reason = f"exit code {failure.exitcode}"
        if failure.exitcode < 0:
            reason = f"signal {-failure.exitcode}"
        print(f"error: rank {rank} ended with {reason}, so the other ranks were stopped",
              file=sys.stderr)
        return exit_code(failure.exitcode)
    return 0


def start(argv: list[str]) -> int:
    """Start the run that the command line asks for. Returns an exit code. Raises UserError."""
    if {"-h", "--help"} & set(argv):
        script, flags = script_of(argv)
        os.execv(sys.executable, [sys.executable, short_name(script), *flags])
    plan = plan_run(argv)
    code = fetch(plan.track)
    if code:
        return code
    forget_other_ranks()
    if plan.processes > 1:
        return start_ranks(plan)
    os.execv(sys.executable, [sys.executable, plan.script, *plan.flags])


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(run_as_program(start, sys.argv[1:]))

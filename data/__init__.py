"""Commands that fetch, build and check training data; each one runs as `python -m data.NAME`.

Nothing in this package imports torch or train_gpt. What the commands share is defined here.
"""
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# Every module of this package needs numpy, and Python imports this file before any of them.
if find_spec("numpy") is None:
    print(f"error: {sys.executable} has no package numpy; run ./run.sh once without PYTHON, "
          "which sets up .venv, then: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

# data/ itself may be a link to a large disk; the repository is what has it.
PACKAGE = Path(__file__).absolute().parent
DATA_FOLDER = PACKAGE.parent.resolve() / PACKAGE.name
STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class UserError(Exception):
    """A mistake that the user can correct. A command prints it as one line and exits with 2."""


class Stopped(SystemExit):
    """SIGTERM or SIGHUP has arrived. Like Ctrl-C, it removes temporary files on its way out."""


def usable_cores() -> int:
    """Return how many cores this process may use; Slurm, taskset and containers may limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def path_argument(text: str) -> Path:
    """Return a path of the command line. Raises UserError if it is empty: Path("") is the folder
    that the caller is in."""
    if not text:
        raise UserError("a path is empty, expected a file or a folder; is a shell variable unset?")
    return Path(text)


def visible(text: str) -> str:
    """Replace characters that are invisible, or that a terminal would obey, by codes like \\x1b."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode()
                   for c in text)


def say(line: str, stream=None, end: str = "\n") -> None:
    """Print a line to a stream (default: stdout).

    When nobody reads it any more (`| head -1`), or when its disk is full, the work goes on.
    """
    stream = stream or sys.stdout
    try:
        print(line, file=stream, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_streams() -> None:
    """Make stdout and stderr accept every text, and exist, even if the caller has closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that are not UTF-8, or not ASCII


def stop(number: int, frame) -> None:
    """A handler of STOP_SIGNALS. Further ones are ignored, so that nothing is left behind."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(128 + number)


def run_as_program(function: Callable, *args) -> int:
    """Call function(*args) and return an exit code: its own, 2 on a UserError, 130 on Ctrl-C.

    If print fails, the code is 141 when nobody reads the output any more (`| head -1`), as shells
    report SIGPIPE, and otherwise 2, as on any OSError. SIGTERM and SIGHUP end it with 143 and 129.
    Signals that the caller ignores (nohup) stay so.
    """
    prepare_streams()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        code = function(*args) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        # A file's name can have line breaks, and so can the message of a library.
        say(f"error: {visible(str(error))}", sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except OSError as error:
        reason = f"{error.filename or 'output'}: {error.strerror or error}"
        say(f"error: {visible(reason)}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    except Stopped as stopped:
        say(f"stopped by {signal.Signals(stopped.code - 128).name}", sys.stderr)
        return stopped.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        say("", end="")  # writes what argparse has printed

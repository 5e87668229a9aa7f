"""Commands that fetch, build and check training data; each one runs as `python -m data.NAME`.

Nothing in this package imports torch or train_gpt. What the commands share is defined here.
"""
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# Every module of this package needs numpy, and Python imports this file before any of them.
if find_spec("numpy") is None:
    print(f"error: {sys.executable} has no package numpy; run ./run.sh once without PYTHON, "
          "which sets up .venv, then: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

DATA_FOLDER = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can correct. A command prints it as one line and exits with 2."""


def usable_cores() -> int:
    """Return how many cores this process may use; Slurm, taskset and containers may limit them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_as_program(function: Callable, *args) -> int:
    """Call function(*args) and return an exit code: its own, 2 on a UserError, 130 on Ctrl-C."""
    try:
        return function(*args) or 0
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

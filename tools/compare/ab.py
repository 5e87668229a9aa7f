"""A/B test: runs two scripts alternately, then judges B against A."""
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from .logs import UserError, read_log
from .stats import mean
from .verdict import print_verdict

ROOT = Path(__file__).resolve().parents[2]


def ab(args) -> int:
    """Runs two scripts alternately, A B A B ..., with the seeds 0, 1, ... for both, then judges B
    against A. Started again after an interruption, it keeps the complete runs of the same script
    and flags.
    """
    if args.runs < 1:
        raise UserError(f"--runs is {args.runs}, expected 1 or more")
    scripts = {"A": Path(args.a).resolve(), "B": Path(args.b).resolve()}
    for script in scripts.values():
        if not script.is_file():
            raise UserError(f"there is no script {script}; expected two train_gpt.py files")
    # The state is kept by flags, a run in it by side, script and seed: if B changes, A's runs stay.
    flags = digest(json.dumps(args.args).encode())
    state_path = ROOT / "records" / "scratch" / f"ab-{flags}" / "state.json"
    state_path.parent.mkdir(parents=True, exist_ok=True)
    logs = {}
    if state_path.exists() and not args.fresh:
        logs = json.loads(state_path.read_text())
    keys = {(side, seed): f"{side}-{digest(scripts[side].read_bytes())}-{seed}"
            for seed in range(args.runs) for side in "AB"}
    kept = [run for run, key in keys.items() if is_complete(logs.get(key, ""))]
    missing = [run for run in keys if run not in kept]
    if kept:
        names = ", ".join(f"{side} seed {seed}" for side, seed in kept)
        print(f"--- kept, because script and flags are the same: {names} (--fresh repeats them)",
              flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the script, as Ctrl-C does
    durations = []
    for number, (side, seed) in enumerate(missing, len(kept) + 1):
        minutes = (mean(durations) or 0) * (len(keys) - number + 1) / 60
        left = f", about {minutes:.1f} minutes left" if durations else ""
        print(f"--- run {number} of {len(keys)}{left}: {side}, seed {seed}: {scripts[side]} "
              f"{' '.join(args.args)}", flush=True)
        started = time.monotonic()
        code, log = run_script([sys.executable, str(scripts[side]), *args.args, f"--seed={seed}"])
        if code or not log:
            no_log = "" if log else " and named no log"
            raise UserError(f"{scripts[side]} ended with exit code {code}{no_log}; correct it and "
                            "run the same command again: it continues here")
        durations.append(time.monotonic() - started)
        logs[keys[side, seed]] = log
        temporary = state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(logs, indent=1))
        os.replace(temporary, state_path)
    baseline = [logs[keys["A", seed]] for seed in range(args.runs)]
    candidate = [logs[keys["B", seed]] for seed in range(args.runs)]
    print("--- logs of A, the baseline, and B, the candidate:", *baseline, *candidate, sep="\n")
    return print_verdict(candidate, baseline, args)


def digest(data: bytes) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()[:12]


def is_complete(path: str) -> bool:
    """Whether there is a log with a complete run at a path."""
    return os.path.exists(path) and any(run.complete for run in read_log(path))


def run_script(command: list[str]) -> tuple[int, str | None]:
    """Runs a script and passes on what it prints; returns its exit code and the log that it named.

    Ctrl-C kills the script, so that it saves no checkpoint: ab repeats an interrupted run from its
    beginning.
    """
    log = None
    # In a session of its own the script gets no signal from the terminal.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r", log:? (\S.*)$", line):
                log = found[1]
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, log

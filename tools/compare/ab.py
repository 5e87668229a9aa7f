"""A/B test: runs two scripts alternately, then judges B against A."""
import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from data import UserError

from .. import start
from .logs import read_log
from .stats import mean
from .verdict import print_verdict

ROOT = Path(__file__).resolve().parents[2]
FIDELITY = "records/studies/2026-11-30_Fidelity/families.tsv"  # below ROOT


def ab(args) -> int:
    """The command ab of command_line.py; returns the exit code of the verdict."""
    if args.runs < 1:
        raise UserError(f"--runs is {args.runs}, expected 1 or more")
    scripts = {"A": Path(args.a).absolute(), "B": Path(args.b).absolute()}
    plans = [start.plan_run([str(script), *args.args]) for script in scripts.values()]
    place = start.place_of(plans[0])
    print(f"--- every run: {place}", flush=True)
    # The state is kept by flags, a run in it by side, script, seed and place: if B changes, A's
    # runs stay.
    flags = digest(json.dumps(args.args).encode())
    state_path = ROOT / "records" / "scratch" / f"ab-{flags}" / "state.json"
    state_path.parent.mkdir(parents=True, exist_ok=True)
    logs = {}
    if state_path.exists() and not args.fresh:
        logs = json.loads(state_path.read_text())
    keys = {(side, seed): f"{side}-{digest(scripts[side].read_bytes())}-{seed}, {place}"
            for seed in range(args.runs) for side in "AB"}
    kept = [run for run, key in keys.items() if is_complete(logs.get(key, ""))]
    missing = [run for run in keys if run not in kept]
    if kept:
        names = ", ".join(f"{side} seed {seed}" for side, seed in kept)
        print("--- kept, because script, flags and hardware are the same: "
              f"{names} (--fresh repeats them)", flush=True)
    durations = []
    for number, (side, seed) in enumerate(missing, len(kept) + 1):
        minutes = (mean(durations) or 0) * (len(keys) - number + 1) / 60
        left = f", about {minutes:.1f} minutes left" if durations else ""
        print(f"--- run {number} of {len(keys)}{left}: {side}, seed {seed}: {scripts[side]} "
              f"{' '.join(args.args)}", flush=True)
        started = time.monotonic()
        with stop_signals_as_ctrl_c():
            code, log = run_script([
                str(scripts[side]), *args.args, f"--seed={seed}", *without_weights(scripts[side])])
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
    print(f"--- verdict for {place}")
    code = print_verdict(candidate, baseline, args)
    print(what_a_track_tells(plans[0].track), end="")
    return code


def what_a_track_tells(track: str | None) -> str:
    """One line per family of ideas: how often the track showed the published sign. Empty for a
    track that the study has not measured."""
    if not (ROOT / FIDELITY).exists():
        return ""
    with open(ROOT / FIDELITY, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["track"] == track]
    lines = [f"{row['family']}: {row['same_sign']} of {row['ideas']} published ideas had the "
             f"published sign here, {row['shown']} of them beyond the noise\n" for row in rows]
    if lines:
        source = Path(FIDELITY).parent / "README.md"
        lines.insert(0, f"--- what the track {track} can tell about the full size ({source})\n")
    return "".join(lines)


def digest(data: bytes) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()[:12]


def without_weights(script: Path) -> list[str]:
    """The flag by which a run leaves no weights, of which many runs could fill the disk. Older
    scripts neither have it nor keep weights."""
    return ["--no_weights"] if b"no_weights" in script.read_bytes() else []


def is_complete(path: str) -> bool:
    """Whether there is a log with a complete run at a path."""
    return os.path.exists(path) and any(run.complete for run in read_log(path))


@contextmanager
def stop_signals_as_ctrl_c():
    """Inside `with`, each signal that stops a run raises KeyboardInterrupt, as Ctrl-C does."""
    handlers = {}
    for number in start.STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            handlers[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_script(words: list[str]) -> tuple[int, str | None]:
    """Starts a script with its flags as run.sh does, and passes on what it prints; returns the exit
    code and the log that it named.

    Ctrl-C ends all processes of the run at once, so that they save no checkpoint: ab repeats an
    interrupted run from its beginning.
    """
    log = None
    # In a session of its own the run gets no signal from the terminal. Its output names the log, so
    # it must not depend on the console's encoding.
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.start", *words], cwd=start.ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"}, stdout=subprocess.PIPE,
        encoding="utf-8", errors="surrogateescape", start_new_session=True)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r", log:? (\S.*)$", line):
                log = found[1]
        process.wait()
    except BaseException:
        end(process)
        raise
    return process.returncode, log


def end(process: subprocess.Popen) -> None:
    """Ends a run. torchrun's ranks have sessions of their own, so torchrun has to end them."""
    for number in start.STOP_SIGNALS:  # the next one must not interrupt this
        signal.signal(number, signal.SIG_IGN)
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, start.END_SIGNAL)
    process.wait()

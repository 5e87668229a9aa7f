"""A/B: runs two scripts in turn, goes on where it was interrupted, and verifies."""
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
from .statistics import mean
from .verdict import verdict

ROOT = Path(__file__).resolve().parents[2]


def ab(args) -> int:
    """Runs two scripts in turn, with the seeds 0, 1, ... for both, goes on where it was interrupted, and verifies."""
    if args.runs < 1:
        raise UserError(f"--runs is {args.runs}, expected 1 or more")
    scripts = [Path(args.a).resolve(), Path(args.b).resolve()]
    for script in scripts:
        if not script.is_file():
            raise UserError(f"there is no script {script}; expected two train_gpt.py files")
    # A run is kept by its side, script, flags and seed: where B was mended, A's are still those of A.
    sides = {which: hashlib.sha256(script.read_bytes()).hexdigest()[:12]
             for which, script in zip("AB", scripts, strict=True)}
    name = hashlib.sha256(json.dumps(args.args).encode()).hexdigest()[:12]
    state_path = ROOT / "records" / "scratch" / f"ab-{name}" / "state.json"
    state_path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(state_path.read_text()) if state_path.exists() and not args.fresh else {}
    took = []
    keys = {(which, seed): f"{which}-{sides[which]}-{seed}" for seed in range(args.runs) for which in "AB"}
    missing = [where for where, key in keys.items()
               if not (os.path.exists(done.get(key, "")) and any(run.complete for run in read_log(done[key])))]
    kept = [where for where in keys if where not in missing]
    if kept:
        names = ", ".join(f"{which} seed {seed}" for which, seed in kept)
        print(f"--- kept, for their script and flags are the same: {names} (--fresh runs all anew)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running script ends with this
    environment = same_threads([done[keys[where]] for where in kept])
    for number, (which, seed) in enumerate(missing, len(keys) - len(missing) + 1):
        script, key = scripts["AB".index(which)], keys[which, seed]
        ahead = mean(took) * (len(keys) - number + 1) if took else 0
        left = f", about {ahead / 60:.0f} minutes left" if ahead > 90 else f", about {ahead:.0f} s left" if took else ""
        print(f"--- run {number} of {len(keys)}{left}: {which}, seed {seed}: {script} {' '.join(args.args)}",
              flush=True)
        begun = time.monotonic()
        command = [sys.executable, str(script), *args.args, f"--seed={seed}"]
        process, log = run_of(command, environment)
        if process.returncode or not log:
            raise UserError(f"{script} ended with exit code {process.returncode}"
                            + ("" if log else " and named no log") + "; mend it and run the command again: it goes on")
        took.append(time.monotonic() - begun)
        done[key] = log
        state_path.with_suffix(".tmp").write_text(json.dumps(done, indent=1))
        os.replace(state_path.with_suffix(".tmp"), state_path)
        environment = same_threads([log])
    logs = {which: [done[keys[which, seed]] for seed in range(args.runs)] for which in "AB"}
    print("--- logs of A, the baseline, and B, the candidate:", *logs["A"], *logs["B"], sep="\n")
    return verdict(logs["B"], logs["A"], args)


def run_of(command: list[str], environment: dict) -> tuple[subprocess.Popen, str | None]:
    """The ended process of a script, and the log that it named; what it prints is passed on. Ctrl-C kills it: it would
    save a checkpoint, and what ab runs again it runs from the beginning."""
    # in a session of its own, so that a terminal sends it no signal
    process, log = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment,
                                    start_new_session=True), None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            found = re.search(r", log (\S.*)$", line)
            log = found[1] if found else log
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process, log


def same_threads(logs: list[str]) -> dict:
    """The environment of the next run: on a CPU it has as many threads as the runs before, whatever it would choose."""
    facts = [run.facts for path in logs[:1] for run in read_log(path)]
    threads = {"OMP_NUM_THREADS": str(fact["threads"]) for fact in facts if "threads" in fact and not fact.get("cuda")}
    return {**threads, **os.environ}

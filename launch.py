"""What run.sh starts: checks a run's flags, fetches its data, trains in one process or several.

    python launch.py [--record ENTRY] [flags of train_gpt.py]      # in the project's folder

Environment: NPROC, the number of processes (default: one a GPU; without GPUs, one), and SHARDS, the
number of FineWeb's training shards to fetch (default: as many as the run reads).
"""
import argparse
import difflib
import importlib
import importlib.util
import logging
import math
import multiprocessing
import os
import re
import sys
from pathlib import Path
from types import ModuleType

TOKENS_A_SHARD, ALL_SHARDS = 10**8, 103  # of fineweb10B; a run that needs more reads them again


def split_record(words: list[str]) -> tuple[str, list[str]]:
    """(path of the script to run, the words for it). The last --record counts.

    Raises SystemExit, after one line that lists the entries, where there is no such entry.
    """
    script, others, words = "train_gpt.py", [], iter(words)
    for word in words:
        if word != "--record" and not word.startswith("--record="):
            others.append(word)
            continue
        entry = next(words, "") if word == "--record" else word.removeprefix("--record=")
        entries = sorted(path.parent.name for path in Path("records").glob("*/train_gpt.py"))
        name = entry.rstrip("/")  # a shell completes the name of a folder with a slash
        if name not in entries:  # '..' is none, though ../train_gpt.py is a file
            die(f"--record is '{entry}', expected one of: {' '.join(entries)}")
        script = f"records/{name}/train_gpt.py"
    return script, others


def die(message: str) -> None:
    """Raises SystemExit: message as one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(script: str) -> ModuleType:
    """The script as a module. Raises what its import raises."""
    if script == "train_gpt.py":
        return importlib.import_module("train_gpt")  # under the name by which data/ imports it
    spec = importlib.util.spec_from_file_location("entry", Path(script).resolve())
    module = importlib.util.module_from_spec(spec)
    sys.modules["entry"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def number(name: str, error: type[Exception]) -> int | None:
    """The environment variable as a number; None where it is unset or empty.

    Raises error where it holds something else.
    """
    text = os.environ.get(name) or None
    if text and not re.fullmatch("[1-9][0-9]*", text):
        raise error(f"{name} is '{text}', expected a number from 1 on: {name}=2 ./run.sh")
    return text and int(text)


def start(module: ModuleType, script: str, words: list[str]) -> int:
    """One run; returns its exit code.

    Raises the script's UserError for a wrong flag or variable, before anything is fetched.
    """
    import torch

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--track", nargs="?")  # that its value is missing, the script's parser says
    first.add_argument("--device", nargs="?")
    first.add_argument("--prompt", nargs="?")
    first.add_argument("--resume", nargs="?")
    given = first.parse_known_args(words)[0]
    if given.prompt:  # one process writes text, without data
        return module.main(words)
    gpus = 0 if given.device == "cpu" else torch.cuda.device_count()  # heeds CUDA_VISIBLE_DEVICES
    by_checkpoint = given.resume and hasattr(module, "open_checkpoint")  # older scripts take none
    if given.track is None and not by_checkpoint:
        track = "fineweb" if gpus else "laptop"
        words = ["--track", track, *words]  # the entries' own default is fineweb, on a CPU too
        print(f"track {track} (CUDA GPUs to run on: {gpus}; choose with --track)")
    processes = number("NPROC", module.UserError) or max(gpus, 1)
    shards = number("SHARDS", module.UserError)
    hp = module.parse_arguments(words)
    module.check_hyperparameters(hp, processes)
    code = bring(module, hp, shards)
    if code:
        return code
    sys.argv = [script, *words]  # the log shows it as the run's command
    ranks = f"NPROC={processes} " if os.environ.get("NPROC") else ""
    record = "" if script == "train_gpt.py" else f" --record {Path(script).parent.name}"
    os.environ["STARTED_BY"] = f"{ranks}./run.sh{record}"  # a run that is ended tells it
    code = module.main(words) if processes == 1 else torchrun(processes, script, words)
    if not code and (command := page(hp)):
        print(f"a page of this run: {command}")
    return code


def page(hp) -> str:
    """The command that makes a page of the newest run, beside the last entry with logs of its
    track; empty where there is no log."""
    runs = Path("records", getattr(hp, "entry", "") or "scratch").glob(f"{hp.track}-*.txt")
    log = max(runs, key=lambda path: path.stat().st_mtime, default=None)
    if not log:
        return ""
    entries = sorted({str(path.parent) for path in Path("records").glob(f"20*/{hp.track}-*.txt")})
    beside = [entry for entry in entries if entry != str(log.parent)][-1:]
    words = [os.path.relpath(sys.executable), "records/compare.py", "report", *beside, str(log)]
    return " ".join([*words, "-o", str(log.with_suffix(".html"))])


def bring(module: ModuleType, hp, shards: int | None) -> int:
    """Fetch the run's data, of FineWeb shards or else as many as the run reads; an exit code."""
    fetched = shards or shards_at_least(module, hp)
    code = fetch(hp.track, fetched)
    while not (code or shards or fetched >= ALL_SHARDS) and reads_beyond(module, hp):
        fetched += 1
        code = fetch(hp.track, fetched)
    return code


def shards_at_least(module: ModuleType, hp) -> int:
    """How many of FineWeb's training shards hold the run's tokens, if it drops none."""
    if hasattr(module, "tokens_before"):  # a script whose batch may grow
        tokens = module.tokens_before(hp.num_steps, hp)
    else:
        tokens = hp.num_steps * hp.step_tokens
    return min(math.ceil(tokens / TOKENS_A_SHARD), ALL_SHARDS)


def reads_beyond(module: ModuleType, hp) -> bool:
    """Does a run of cut documents on FineWeb need more shards than are there? Counted in them."""
    if hp.track != "fineweb" or not hasattr(module, "first_documents"):
        return False
    if not any(stage.document for stage in hp.stages):
        return False
    track = module.TRACKS[hp.track]
    stream = module.TokenStream(track.train_files, track, 1)
    return module.first_documents(stream, hp)[-1] > len(stream.documents) - 1


def fetch(track: str, shards: int) -> int:
    """Bring the data of laptop or fineweb, nothing for another track; returns an exit code.

    In a process of its own, or the memory that it takes would count as the run's. A fork saves the
    import of torch; not on a Mac, where a fork that uses the network may crash.
    """
    if track not in ("laptop", "fineweb"):
        return 0
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    # A daemon: should Ctrl-C come at another line than below, Python's exit does not wait for it.
    process = context.Process(target=fetch_here, args=(track, shards), daemon=True)
    try:
        process.start()
        process.join()
    except KeyboardInterrupt:
        if process.pid:
            process.join(5)  # a terminal sends Ctrl-C to both: the other one says it and tidies up
            process.terminate()
            process.join()
        return 130
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def fetch_here(track: str, shards: int) -> None:
    """Raises SystemExit with the exit code of the track's module in data/."""
    try:
        module = importlib.import_module(f"data.{track}")
        code = module.main([] if track == "laptop" else ["--shards", str(shards)])
    except KeyboardInterrupt:  # before the module could heed it
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def torchrun(processes: int, script: str, words: list[str]) -> int:
    """The run in several processes; returns its exit code.

    torchrun itself, but a failed run ends with the script's own line and exit code, not with
    torchrun's traceback.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // processes, 1))
    os.environ["OMP_NUM_THREADS"] = threads
    logging.disable(logging.ERROR)
    sys.stdout.flush()  # what was said here comes before what the ranks say
    try:
        run(["--standalone", f"--nproc_per_node={processes}", script, *words])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        # a rank that heeds signal 15 says so by 143
        codes = {rank: -15 if failure.exitcode == 143 else failure.exitcode
                 for rank, failure in error.failures.items()}
        killed = {rank: -code for rank, code in codes.items() if code < 0}
        # torchrun ended the others by signal 15, so 15 is the cause only where there is no other
        others = {rank: n for rank, n in killed.items() if n != 15}
        killed = others if others or max(codes.values()) > 0 else killed
        for rank, n in killed.items():
            print(f"error: rank {rank} was killed by signal {n}, so the others were ended; go on "
                  "with --resume latest", file=sys.stderr)
        return 128 + max(killed.values()) if killed else max(codes.values())
    return 0


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    if words and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], ("test", "simulate"), 1)
        hint = f"did you mean ./run.sh {near[0]}?" if near else "./run.sh --help lists the flags"
        die(f"'{words[0]}' is no flag, and neither test nor simulate; {hint}")
    script, words = split_record(words)
    try:
        module = load(script)
    except ModuleNotFoundError as error:
        die(f"{sys.executable} has no package '{error.name}', which {script} imports; unset PYTHON "
            f"to have a .venv set up, or: {sys.executable} -m pip install -r requirements.txt")
    if {"-h", "--help"} & set(words):
        comment = Path("run.sh").read_text().partition("\nset -")[0].splitlines()[1:]
        lines = [line.removeprefix("#").removeprefix(" ") for line in comment]
        print(*lines, "", sep="\n", flush=True)
        sys.argv = [script, *words]  # the help calls the program by it
        return module.main(words)
    return module.run_as_program(start, module, script, words)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # during the import of torch
        print("interrupted", file=sys.stderr)
        sys.exit(130)

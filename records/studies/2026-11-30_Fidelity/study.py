"""Measures ideas on small tracks: each idea is a patch of one script, with a known published gain.

    python study.py data CORPUS              # once: builds data/english from shards of GPT-2 tokens
    python study.py run                      # all ideas, both tracks, 4 seeds
    python study.py run --only xsa,smear --tracks laptop --seeds 2
    python study.py report                   # tables, correlations, plot, from the logs

With --base, --patches, --table and --out it measures other ideas on another script. A script gets
the track "english" by `patch train_gpt.py english.patch`.

A run's log is OUT/<track>/<idea>/seed<k>.txt, without the script, which is the base script with the
idea's patch. Finished runs are skipped. Runs are interleaved: all ideas with seed 0, then all with
seed 1, and so on. Two further points are always run: "base", and "shorter", which is the base
script with 0.8 times the steps and gives the slope of the loss over steps.
"""
import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SEPARATOR = "=" * 100

# Flags of each track. The laptop track has fewer steps than its 170, so that all runs fit into some
# hours on one core. fineweb is the full-size model for 13.1 M tokens on one GPU, not compiled,
# because compiling each patched script would take longer than the run (tests/gpu.sh ideas).
ON_CPU = ["--device=cpu", "--dtype=float32", "--compile=off", "--val_every=0"]
FLAGS = {
    "laptop": [*ON_CPU, "--num_steps=48", "--val_tokens=32768"],
    "english": [*ON_CPU, "--num_steps=48", "--val_tokens=32768"],
    "fineweb": ["--device=cuda", "--compile=off", "--num_steps=200", "--extension=0.025",
                "--batch_size=2", "--micro_batch=1", "--val_every=0", "--val_length=65536",
                "--val_tokens=1048576"],
}
SHORTER = 0.8  # steps of the point "shorter", as a share of the base's

# --- Data -----------------------------------------------------------------------------------------

VOCAB_SIZE = 1024  # the first 1,023 tokens of GPT-2's vocabulary, and end-of-text


def expansion_table() -> list[list[int]]:
    """For each GPT-2 token, the tokens that stand for it in the small vocabulary.

    GPT-2's tokens are numbered in the order in which byte-pair encoding merges them, so the first
    tokens are a complete vocabulary of their own: the encoding after fewer merges."""
    import tiktoken
    rank = tiktoken.get_encoding("gpt2")._mergeable_ranks
    table = [[]] * (len(rank) + 1)
    for text, token in rank.items():
        parts = [text]
        if token >= VOCAB_SIZE - 1:
            parts = [text[i:i + 1] for i in range(len(text))]
        while True:
            pairs = [rank.get(a + b, VOCAB_SIZE) for a, b in zip(parts, parts[1:], strict=False)]
            if not pairs or min(pairs) >= VOCAB_SIZE - 1:
                break
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        table[token] = [rank[part] for part in parts]
    table[len(rank)] = [VOCAB_SIZE - 1]  # end-of-text
    return table


def build_data(corpus: str) -> None:
    """Translate shards of GPT-2 tokens (*_train_*.bin, *_val_*.bin) into data/english."""
    sys.path.insert(0, str(ROOT))
    from data.shards import open_shard, write_shard
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(corpus) / "tiktoken_cache"))
    table = expansion_table()
    lengths = np.array([len(parts) for parts in table])
    flat = np.concatenate(table)
    starts = lengths.cumsum() - lengths
    for split in ("train", "val"):
        for number, path in enumerate(sorted(Path(corpus).glob(f"*_{split}_*.bin"))):
            tokens = np.asarray(open_shard(path), dtype=np.int64)
            count = lengths[tokens]
            within = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
            small = flat[np.repeat(starts[tokens], count) + within]
            write_shard(ROOT / f"data/english/english_{split}_{number:06d}.bin", small)
            print(f"{path}: {len(tokens):,} tokens, now {len(small):,}")


# --- Runs -----------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict]:
    """The ideas: one row per idea, with the columns of ideas.tsv."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def patch_of(idea: str, track: str, patches: Path) -> Path:
    """The idea's patch: <idea>.<track>.patch if there is one, else <idea>.patch."""
    special = patches / f"{idea}.{track}.patch"
    return special if special.exists() else patches / f"{idea}.patch"


def script_of(idea: str, track: str, args) -> Path:
    """The base script with the idea's patch, in OUT/scripts. Exits if the patch does not fit."""
    script = args.out / "scripts" / track / f"{idea}.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_bytes(args.base.read_bytes())
    if idea not in ("base", "shorter"):
        patch = patch_of(idea, track, args.patches)
        done = subprocess.run(
            ["patch", "--quiet", "--no-backup-if-mismatch", str(script), str(patch)],
            capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {patch} does not fit {args.base}: {done.stdout.strip()}")
    return script


def call_script(script: Path, flags: list[str], console: Path) -> None:
    """In a process of its own: run a script as `python SCRIPT FLAGS`, with its output in a file."""
    import importlib.util
    output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [str(script), *flags]
    try:
        spec = importlib.util.spec_from_file_location("train_gpt", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_gpt"] = module
        spec.loader.exec_module(module)
        module.ROOT = ROOT
        module.warm_up = lambda *args: None  # it would only load kernels
        code = module.main(flags)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def run_once(track: str, idea: str, seed: int, args) -> None:
    """One run; its log goes to OUT/<track>/<idea>/seed<k>.txt. A run that fails leaves
    seed<k>.failed with what it printed."""
    log = args.out / track / idea / f"seed{seed}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    script = script_of(idea, track, args)
    flags = [f"--track={track}", *FLAGS[track], f"--seed={seed}", "--entry=scratch/fidelity"]
    if idea == "shorter":
        steps = next(int(flag.split("=")[1]) for flag in flags if flag.startswith("--num_steps"))
        flags.append(f"--num_steps={round(SHORTER * steps)}")
    console = log.with_suffix(".failed")
    # A fork has imported torch already, which takes as long as ten training steps.
    process = multiprocessing.get_context("fork").Process(
        target=call_script, args=(script, flags, console))
    process.start()
    process.join()
    named = re.search(r", log: (\S+)$", console.read_text(), re.MULTILINE)
    if process.exitcode or not named:
        print(f"{track} {idea} seed {seed} FAILED, see {console}", flush=True)
        return
    written = Path(named[1])
    _, rest = written.read_text().split(SEPARATOR + "\n", 1)  # without the script
    log.write_text(f"{idea}: the script is {args.base.name} with its patch\n{SEPARATOR}\n{rest}")
    written.unlink()
    console.unlink()


def ideas_of(track: str, args) -> list[str]:
    """The points of a track: the base, the shorter base, and the ideas that it can see."""
    rows = [row["idea"] for row in read_table(args.table) if row[track] in ("in", "out")]
    if args.only:
        rows = [idea for idea in rows if idea in args.only.split(",")]
    return ["base", "shorter", *rows]


def run(args) -> None:
    """All runs that are missing, seed by seed."""
    import torch  # before the forks
    import torch.nn.attention.flex_attention  # noqa: F401
    torch.set_num_threads(1)
    plan = [(track, idea, seed) for seed in range(args.seeds) for track in args.tracks.split(",")
            for idea in ideas_of(track, args)]
    todo = [(track, idea, seed) for track, idea, seed in plan
            if not (args.out / track / idea / f"seed{seed}.txt").exists()]
    print(f"{len(todo)} of {len(plan)} runs are to do", flush=True)
    begun = time.monotonic()
    for number, (track, idea, seed) in enumerate(todo, 1):
        started = time.monotonic()
        run_once(track, idea, seed, args)
        now = time.monotonic()
        left = (now - begun) / number * (len(todo) - number) / 60
        print(f"{number}/{len(todo)} {track} {idea} seed {seed}: {now - started:.1f} s; "
              f"about {left:.0f} minutes left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("data", "run", "report"))
    parser.add_argument("corpus", nargs="?", help="for data: a folder with GPT-2 tokens")
    parser.add_argument("--base", type=Path, default=HERE / "base.py", help="the script")
    parser.add_argument("--patches", type=Path, default=HERE / "patches", help="folder of patches")
    parser.add_argument("--table", type=Path, default=HERE / "ideas.tsv", help="the ideas")
    parser.add_argument("--out", type=Path, default=ROOT / "records/scratch/fidelity",
                        help="folder of the logs")
    parser.add_argument("--only", default="", help="ideas, with commas between; default: all")
    parser.add_argument("--tracks", default="laptop,english",
                        help="default: %(default)s; on a GPU: fineweb")
    parser.add_argument("--seeds", type=int, default=4, help="seeds 0 to this - 1")
    args = parser.parse_args()
    if args.command == "run" and os.environ.get("MALLOC_MMAP_MAX_") != "0":
        # glibc would return each large tensor to the system, which takes a quarter of the time.
        keep = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="8000000000", OMP_NUM_THREADS="1")
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})
    args.out = args.out.absolute()
    if args.command == "data":
        build_data(args.corpus or parser.error("data needs a folder"))
    elif args.command == "run":
        run(args)
    else:
        from report import report
        report(args)


if __name__ == "__main__":
    main()

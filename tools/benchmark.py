"""Time to a loss on the laptop corpus: train_gpt.py against nanoGPT's CPU configuration.

    python -m tools.benchmark --runs 3     # A B A B A B, about 10 minutes on 2 cores
    python -m tools.benchmark --runs 3 --out records/studies/2026-11-22_LaptopBenchmark

A is a GPT-2 as nanoGPT's README trains it on a CPU (shakespeare_char, "I only have a macbook"): 4
layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, AdamW, float32, not compiled. It is
written anew here, from that description. B is train_gpt.py with the flags SPEEDRUN, a schedule that
is short enough to end just below A's final loss. Both are validated on all validation tokens of the
laptop track, A with its own context. Each run is one process on the CPU. The times are training
time without compilation, start-up and validation; the table also has the total time. The result is
B's time divided by A's; it counts only if B's loss is not above A's. --out keeps the results and
B's logs in a folder.
"""
import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, run_as_program
from data.shards import open_shard
from tools import start
from train_gpt import TRACKS

REPOSITORY = Path(__file__).resolve().parents[1]
SPEEDRUN = ["--num_steps=48", "--cooldown=0.7", f"--momentum_warmup={20 / 48}", "--compile=on"]
LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


class Layer(nn.Module):
    """A pre-LayerNorm transformer layer of GPT-2, without biases."""
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(),
                                 nn.Linear(4 * WIDTH, WIDTH, bias=False))

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


class Baseline(nn.Module):
    """GPT-2 with learned positions and a tied head."""
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                is_residual = "proj" in name or "mlp.2" in name  # there are 2 in each layer
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if is_residual else 0.02)

    def forward(self, tokens, targets):
        x = self.layers(self.embed(tokens) + self.position.weight)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step: int) -> float:
    """A linear warmup over 100 steps to 1e-3, then a cosine to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4


def read_tokens(pattern: str) -> torch.Tensor:
    """All tokens of the shards that match a pattern, (n,) int64."""
    shards = [open_shard(path) for path in sorted(REPOSITORY.glob(pattern))]
    return torch.from_numpy(np.concatenate(shards).astype(np.int64))


def baseline_run(seed: int) -> dict:
    """{"seconds", "val_loss", "total_seconds"} of one run of A."""
    began = time.perf_counter()
    track = TRACKS["laptop"]
    train = read_tokens(track.train_files)
    val = read_tokens(track.val_files)[:track.val_tokens + 1]
    torch.manual_seed(seed)
    model = Baseline(track.vocab_size)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        positions = torch.randint(len(train) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT)
        loss = model(train[positions], train[positions + 1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    losses = []
    with torch.no_grad():
        size = 64 * CONTEXT
        for tokens, targets in zip(val[:-1].split(size), val[1:].split(size), strict=True):
            loss = model(tokens.view(-1, CONTEXT), targets.view(-1, CONTEXT))
            losses.append(loss.item())
    return {"seconds": seconds, "val_loss": statistics.mean(losses),
            "total_seconds": time.perf_counter() - began}


def speedrun_run(seed: int, flags: list[str], entry: str) -> dict:
    """The same of one run of B, and its log. entry: folder below records/ for the log."""
    folder = REPOSITORY / "records" / entry
    before = set(folder.glob("*.txt"))
    command = [sys.executable, "train_gpt.py", "--track=laptop", "--device=cpu", "--val_every=0",
               f"--seed={seed}", f"--entry={entry}", *flags]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True)
    total = time.perf_counter() - began
    if done.returncode:
        raise UserError(done.stderr or f"train_gpt.py ended with exit code {done.returncode}")
    (log,) = set(folder.glob("*.txt")) - before
    metrics = re.findall(r"^step:\d+/\d+ val_loss:(\S+) train_time:(\d+)ms", log.read_text(), re.M)
    loss, ms = metrics[-1]
    return {"seconds": int(ms) / 1000, "val_loss": float(loss), "total_seconds": total,
            "log": str(log)}


def keep(out: Path, flags: list[str], results: dict[str, list[dict]]) -> None:
    """Write results.json and copy B's logs into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    for run in results["train_gpt"]:
        log = Path(run["log"])
        shutil.copy(log, out / log.name)
        run["log"] = log.name
    content = {"flags": flags, "torch": torch.__version__, "threads": torch.get_num_threads(),
               **results}
    (out / "results.json").write_text(json.dumps(content, indent=1))


def benchmark(args: argparse.Namespace) -> int:
    """All runs, and the comparison. Returns an exit code. Raises UserError."""
    if args.runs < 1:
        raise UserError(f"--runs is {args.runs}, expected 1 or more")
    print(f"every run: one process on the CPU, {torch.get_num_threads()} threads", flush=True)
    start.forget_other_ranks()
    if code := start.fetch("laptop"):
        return code
    results = {"nanoGPT": [], "train_gpt": []}
    for seed in range(args.runs):
        results["nanoGPT"].append(baseline_run(seed))
        entry = f"scratch/benchmark_{os.getpid()}"
        results["train_gpt"].append(speedrun_run(seed, args.flags, entry))
        for name, runs in results.items():
            run = runs[-1]
            print(f"{name:10} seed {seed}: val_loss {run['val_loss']:.4f} after "
                  f"{run['seconds']:.1f} s of training, {run['total_seconds']:.1f} s in total",
                  flush=True)
    pairs = list(zip(results["nanoGPT"], results["train_gpt"], strict=True))
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    above = sum(b["val_loss"] > a["val_loss"] for a, b in pairs)
    print(f"train_gpt.py needs {statistics.median(ratios):.3f} times nanoGPT's time (median; from "
          f"{min(ratios):.3f} to {max(ratios):.3f}); its loss is above nanoGPT's in {above} of "
          f"{len(pairs)} runs")
    if args.out:
        keep(args.out, args.flags, results)
    return 0


def main() -> int:
    """The command line. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--out", type=Path, help="folder for results.json and B's logs")
    parser.add_argument("flags", nargs="*", default=SPEEDRUN, help="after --: other flags for B")
    return run_as_program(benchmark, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())

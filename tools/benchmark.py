"""Time to a loss on the laptop corpus: train_gpt.py against nanoGPT's published CPU configuration, interleaved.

    python -m tools.benchmark --runs 3                      # A B A B A B, about 10 minutes on 2 cores
    python -m tools.benchmark --runs 3 --out records/studies/2026-11-22_LaptopBenchmark    # and keep the logs there

A is a GPT-2 as nanoGPT's README trains it on a CPU (shakespeare_char, "I only have a macbook"): 4 layers, 4 heads,
width 128, context 64, batch 12, 2,000 steps, AdamW, float32, not compiled; written anew here from its description.
B is train_gpt.py with the flags SPEEDRUN, a schedule short enough to end just below A's final loss. Both are judged on
all validation tokens of the laptop track, A with its own context; both times are training time alone, without
compilation, start-up and validation, which the table gives apart. What counts is B's time over A's, where B's loss is
not above A's.
"""
import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
from train_gpt import TRACKS, TokenStream  # noqa: E402

SPEEDRUN = "--num_steps=48 --cooldown=0.7 --momentum_warmup_steps=20 --compile=on".split()
LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


class Layer(nn.Module):
    """Pre-LayerNorm transformer layer of GPT-2, without biases."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(),
                                 nn.Linear(4 * WIDTH, WIDTH, bias=False))

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


class Baseline(nn.Module):
    """GPT-2 with learned positions and a tied head."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab_size, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers, self.norm = nn.Sequential(*(Layer() for _ in range(LAYERS))), nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # residual projections smaller by the number of them
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if "proj" in name or "mlp.2" in name else 0.02)

    def forward(self, tokens, targets):
        x = self.layers(self.embed(tokens) + self.position.weight)
        return F.cross_entropy(F.linear(self.norm(x), self.embed.weight).flatten(0, 1), targets.flatten())


def learning_rate(step):
    """Linear warmup over 100 steps to 1e-3, cosine to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4


def baseline_run(seed):
    """{"seconds", "val_loss", "total_seconds"} of one run of A."""
    began, track = time.perf_counter(), TRACKS["laptop"]
    train = torch.from_numpy(TokenStream(track.train_files, track, 1).read(0, 40_000_000))
    val = torch.from_numpy(TokenStream(track.val_files, track, 1).read(0, track.val_tokens + 1))
    torch.manual_seed(seed)
    model = Baseline(track.vocab_size)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        starts = torch.randint(len(train) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT)
        loss = model(train[starts], train[starts + 1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        losses = [model(a.view(-1, CONTEXT), b.view(-1, CONTEXT)).item()
                  for a, b in zip(val[:-1].split(64 * CONTEXT), val[1:].split(64 * CONTEXT), strict=True)]
    return {"seconds": seconds, "val_loss": statistics.mean(losses), "total_seconds": time.perf_counter() - began}


def speedrun_run(seed, flags):
    """The same of one run of B, and its log."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "train_gpt.py", "--track=laptop", "--device=cpu", "--val_every=0",
                           "--sample_tokens=0", f"--seed={seed}", *flags], cwd=REPOSITORY, text=True,
                          capture_output=True)
    total = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    loss, ms = re.findall(r"^step:\d+/\d+ val_loss:(\S+) train_time:(\d+)ms", done.stdout, re.M)[-1]
    log = re.search(r"log (\S+\.txt)", done.stdout)[1]
    return {"seconds": int(ms) / 1000, "val_loss": float(loss), "total_seconds": total, "log": log}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--out", type=Path, help="folder for results.json and B's logs")
    parser.add_argument("flags", nargs="*", default=SPEEDRUN, help="after --: other flags for B")
    args = parser.parse_args()
    results = {"nanoGPT": [], "train_gpt": []}
    for seed in range(args.runs):
        results["nanoGPT"].append(baseline_run(seed))
        results["train_gpt"].append(speedrun_run(seed, args.flags))
        for name, runs in results.items():
            print(f"{name:10} seed {seed}: val_loss {runs[-1]['val_loss']:.4f} after {runs[-1]['seconds']:.1f} s of "
                  f"training, {runs[-1]['total_seconds']:.1f} s in all", flush=True)
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(*results.values(), strict=True)]
    met = all(b["val_loss"] <= a["val_loss"] for a, b in zip(*results.values(), strict=True))
    print(f"train_gpt.py needs {statistics.median(ratios):.3f} of nanoGPT's time (median; {min(ratios):.3f} to "
          f"{max(ratios):.3f}); its loss is {'never' if met else 'SOMETIMES'} above nanoGPT's")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for run in results["train_gpt"]:
            log = Path(run.pop("log"))
            (args.out / log.name).write_bytes(log.read_bytes())
            run["log"] = log.name
        (args.out / "results.json").write_text(json.dumps(
            {"flags": args.flags, "torch": torch.__version__, "threads": torch.get_num_threads(), **results}, indent=1))


if __name__ == "__main__":
    main()

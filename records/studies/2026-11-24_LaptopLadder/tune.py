"""Tune the learning rates of the four ports of published records for the laptop track.

    python records/studies/2026-11-24_LaptopLadder/tune.py ENTRY...

All ports are tuned by the same rule, with two factors on the published learning rates: one for the
embeddings and the head, one for the blocks (matrices and scalars). AdamW has one learning rate, so
one factor. The search starts at (1, 1). A round tries to double each factor, and doubles it again
while the final validation loss falls. If doubling does not help, it tries halving in the same way.
After a round without improvement the next one uses factors of 2^(1/2). The search ends after
NUM_TRIALS runs of 600 steps with seed 0. Results are appended to tuning.tsv, logs go to tuning/.
"""
import re
import subprocess
import sys
from pathlib import Path

NUM_TRIALS, NUM_STEPS = 9, 600
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# Learning rates of each factor, as published, and the schedule in steps, the same fractions of 600
# as of the record's run.
ENTRIES = {
    "2024-06-06_AdamW": ([{"lr": 0.0018}], dict(warmup_steps=16, cooldown_steps=129)),
    "2024-10-14_ModernArch": (
        [{"adam_lr": 0.0036}, {"muon_lr": 0.00036}], dict(cooldown_steps=171)),
    "2024-11-03_UntieEmbed": (
        [{"embed_lr": 0.3, "head_lr": 0.002}, {"muon_lr": 0.02}], dict(cooldown_steps=171)),
    "2024-12-04_ValueEmbed": (
        [{"embed_lr": 0.6, "head_lr": 0.008}, {"muon_lr": 0.05, "scalar_lr": 0.04}],
        dict(cooldown_steps=235, momentum_warmup_steps=118)),
}


def trial(entry: str, factors: tuple[float, ...]) -> float:
    """Return the final validation loss, in nats a byte, of a run with these factors."""
    rates, schedule = ENTRIES[entry]
    flags = {name: f"{rate * factor:.6g}" for group, factor in zip(rates, factors, strict=True)
             for name, rate in group.items()}
    flags |= dict(track="laptop", seed=0, num_steps=NUM_STEPS, val_every=150, dtype="bfloat16",
                  compile="on", entry=f"studies/{HERE.name}/tuning", **schedule)
    script = f"records/published/{entry}/train_gpt.py"
    command = [sys.executable, script, *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    losses = re.findall(r"val_loss:(\S+)", done.stdout)
    if done.returncode or not losses:
        sys.exit(f"error: {' '.join(command)} failed: {done.stderr[-500:]}")
    with open(HERE / "tuning.tsv", "a") as table:
        shown = [f"{factor:.4g}" for factor in factors] + ["-"] * (2 - len(factors))
        print(entry, *shown, losses[-1], sep="\t", file=table)
    return float(losses[-1])


def search(entry: str) -> None:
    """Run the compass search over the base-2 logarithms of the factors."""
    best = (0.0,) * len(ENTRIES[entry][0])
    seen = {best: trial(entry, tuple(2**x for x in best))}
    step = 1.0
    while len(seen) < NUM_TRIALS:
        improved = False
        for axis in range(len(best)):
            for sign in (1, -1):
                moved = False
                while len(seen) < NUM_TRIALS:
                    there = tuple(x + sign * step * (i == axis) for i, x in enumerate(best))
                    if there not in seen:
                        seen[there] = trial(entry, tuple(2**x for x in there))
                    if seen[there] >= seen[best]:
                        break
                    best, moved = there, True
                improved |= moved
                if moved:
                    break
        step = step if improved else step / 2
    print(entry, tuple(2**x for x in best), seen[best], flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ENTRIES:
        search(name)

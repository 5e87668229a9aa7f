"""Draws the losses of one run's log against its training time.

    python records/plot.py records/2026-11-22_Laptop/laptop-....txt -o records/2026-11-22_Laptop/curve.png
"""
import argparse
import json
import re
from pathlib import Path


def main() -> None:
    """Command line; needs matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, environment, metrics = args.log.read_text().split("=" * 100 + "\n")
    told = json.loads(environment[environment.index("\n{"):environment.rindex("}") + 1])
    found = re.findall(r"^step:\d+/\d+ (train|val)_loss:(\S+) train_time:(\d+)ms", metrics, re.M)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, style in (("train", dict(color="#9ecae1", linewidth=1.2, label="training loss of single steps")),
                        ("val", dict(color="#08519c", marker="o", linewidth=2, label="validation loss"))):
        points = [(int(ms) / 1000, float(loss)) for k, loss, ms in found if k == kind]
        axes.plot(*zip(*points, strict=True), **style)
    last = points[-1]
    axes.annotate(f"{last[1]:.3f} after {last[0]:.0f} s", last, xytext=(0, -20), textcoords="offset points", ha="right")
    axes.axhline(told["target"], color="#d95f02", linestyle="--", label=f"target {told['target']}")
    axes.set(xlabel="training time (seconds)", ylabel="cross-entropy (nats a token)", ylim=(0.9, 3.0),
             title=f"laptop track, {told['device']}, {told['threads']} threads")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()

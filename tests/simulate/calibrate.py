"""What a GPU measured beside what the simulation had predicted for it: a table.

    python -m tests.simulate train_gpt.py --gpus 1 --json [flags] > report.json
    python train_gpt.py --profile [flags]
    python -m tests.simulate.calibrate report.json records/scratch/LOG.txt records/scratch/LOG.trace.json[.gz]
"""
import collections
import gzip
import json
import re
import sys
from pathlib import Path

PROFILED_STEPS = 3  # that train_gpt.py's --profile records
PARTS = ("matrix products", "attention", "head and loss", "generated", "eager")
PATTERNS = (("collectives", r"nccl"), ("attention", r"flex_attention|flash|fmha|cudnn.*attn"),
            ("generated", r"^triton_"), ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma"))


def part_of(kernel: str, predicted: dict[str, str]) -> str:
    """The part of a step that a measured kernel belongs to: as predicted, where it has the same name."""
    if kernel in predicted:
        return predicted[kernel]
    return next((part for part, pattern in PATTERNS if re.search(pattern, kernel, re.I)), "eager")


def measured_parts(trace: dict, predicted: dict[str, str]) -> dict[str, float]:
    """ms a step by part, of a Chrome trace of PROFILED_STEPS steps."""
    ms = collections.Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            ms[part_of(event["name"], predicted)] += event["dur"] / 1000 / PROFILED_STEPS
    return dict(ms)


def measured(log: str) -> tuple[float, float]:
    """(ms a step, peak GiB) of a run's log. Raises ValueError where it has none."""
    steps, peak = re.findall(r"step_avg:([0-9.]+)ms", log), re.search(r"peak_memory_per_rank:(\d+)MiB", log)
    if not steps or not peak:
        raise ValueError("the log has no step_avg or no peak_memory_per_rank: the run did not end")
    return float(steps[-1]), int(peak[1]) / 1024


def table(report: dict, log: str, trace: dict | None) -> str:
    """Markdown: what, predicted, measured, measured over predicted."""
    predicted, (step, peak) = report["predicted"], measured(log)
    total = sum(predicted["ms"].values()) + predicted["exposed"]
    rows = [("ms a step", total, step), ("peak, GiB", report["peak_timed"] / 2**30, peak)]
    if trace:  # of the run's first steps, so of its first stage
        stages, where = report["stages"], ", first stage" * (len(report["stages"]) > 1)
        first = stages[0]["mean"]
        parts = measured_parts(trace, {name: part for part, name, *_ in first["kernels"]})
        rows += [(f"{part}, ms a step{where}", first["ms"].get(part, 0.0), parts.get(part, 0.0)) for part in PARTS]
    lines = [f"| {report['card']}, torch {report['torch']} | predicted | measured | ratio |", "|---|---|---|---|"]
    for what, guess, value in rows:
        ratio = f"{value / guess:.2f}" if guess else ""
        lines.append(f"| {what} | {guess:.1f} | {value:.1f} | {ratio} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    if not 2 <= len(words) <= 3:
        print(f"error: expected REPORT LOG [TRACE], got {len(words)} words", file=sys.stderr)
        return 2
    try:
        report, log = json.loads(Path(words[0]).read_text())[0], Path(words[1]).read_text()
        trace = None
        if len(words) == 3:
            content = Path(words[2]).read_bytes()
            trace = json.loads(gzip.decompress(content) if words[2].endswith(".gz") else content)
        print(table(report, log, trace))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: can't compare {' '.join(words)}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

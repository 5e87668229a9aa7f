"""What a GPU measured beside what the simulation had predicted for it: a table.

    python -m tools.simulate train_gpt.py --gpus 1 --json [flags] > report.json
    python -m tools.simulate.trace FOLDER [flags] > log.txt
    python -m tools.simulate.calibrate report.json log.txt FOLDER/*.trace.json[.gz]
"""
import collections
import gzip
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

PROFILED_STEPS = 3  # in each trace
PARTS = ("matrix products", "attention", "head and loss", "generated", "eager")
PATTERNS = (("collectives", r"nccl"), ("attention", r"flex_attention|flash|fmha|cudnn.*attn"),
            ("generated", r"^triton_"), ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma"))


def part_of(kernel: str, predicted: dict[str, str]) -> str:
    """The part of a step that a measured kernel belongs to: as predicted, where it has the same name."""
    if kernel in predicted:
        return predicted[kernel]
    return next((part for part, pattern in PATTERNS if re.search(pattern, kernel, re.I)), "eager")


def measured_parts(trace: dict, predicted: dict[str, str]) -> dict[str, float]:
    """ms a step by part, of a Chrome trace of PROFILED_STEPS steps: of what these steps launched, for where the host
    runs ahead, kernels of the steps before are recorded as well."""
    ms, launches = collections.Counter(), ("cuda_runtime", "cuda_driver")
    launched = {event["args"].get("correlation") for event in trace["traceEvents"] if event.get("cat") in launches}
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel" and event["args"].get("correlation") in launched:
            ms[part_of(event["name"], predicted)] += event["dur"] / 1000 / PROFILED_STEPS
    return dict(ms)


def measured(log: str) -> tuple[list[tuple[int, float]], float]:
    """([(step, its train_time in ms) of each logged line], peak GiB) of a run's log. Raises ValueError without."""
    lines = re.findall(r"^step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", log, re.M)
    peak = re.search(r"peak_memory_per_rank:(\d+)MiB", log)
    if len(lines) < 2 or not peak:
        raise ValueError("the log has no train_loss lines or no peak_memory_per_rank: the run did not end")
    return [(int(step), float(ms)) for step, ms in lines], int(peak[1]) / 1024


def step_time(lines: list[tuple[int, float]], begin: int, end: int) -> float:
    """The median ms a step between lines, of steps in (begin, end]: what a few slow ones (a trace) take counts not."""
    pairs = [(b - a, (y - x) / (b - a)) for (a, x), (b, y) in itertools.pairwise(lines) if begin <= a and b <= end]
    return statistics.median(ms for _, ms in pairs) if pairs else float("nan")


def table(report: dict, log: str, traces: list[dict]) -> str:
    """Markdown: what, predicted, measured, measured over predicted; traces: one of each stage, from the first on."""
    lines, peak = measured(log)
    rows, begin = [("peak, GiB", report["peak_timed"] / 2**30, peak)], 0
    for stage, trace in itertools.zip_longest(report["stages"], traces[:len(report["stages"])]):
        mean, tokens, end = stage["mean"], f"{stage['tokens']:,} tokens", begin + stage["steps"]
        total = sum(mean["ms"].values()) + mean["exposed"]
        rows.append((f"**ms a step of {tokens}**", total, step_time(lines, begin, end)))
        if trace:
            parts = measured_parts(trace, {name: part for part, name, *_ in mean["kernels"]})
            rows += [(part, mean["ms"].get(part, 0.0), parts.get(part, 0.0)) for part in PARTS]
            rows.append(("all kernels", sum(mean["ms"].values()), sum(parts.values())))
        begin = end
    written = [f"| {report['card']}, torch {report['torch']} | predicted | measured | ratio |", "|---|---|---|---|"]
    for what, guess, value in rows:
        ratio = f"{value / guess:.2f}" if guess else ""
        written.append(f"| {what} | {guess:.1f} | {value:.1f} | {ratio} |")
    return "\n".join(written)


def main(words: list[str]) -> int:
    if len(words) < 2:
        print(f"error: expected REPORT LOG [TRACE of the first stage, of the second, ...], got {len(words)} words",
              file=sys.stderr)
        return 2
    try:
        report, log = json.loads(Path(words[0]).read_text())[0], Path(words[1]).read_text()
        contents = [(word, Path(word).read_bytes()) for word in words[2:]]
        print(table(report, log, [json.loads(gzip.decompress(content) if word.endswith(".gz") else content)
                                  for word, content in contents]))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: can't compare {' '.join(words)}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

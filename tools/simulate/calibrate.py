"""Compare what a GPU measured with what the simulation predicted for it, as a table.

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
PATTERNS = (  # the part of a step, and the names of its kernels
    ("collectives", r"nccl"), ("attention", r"flex_attention|flash|fmha|cudnn.*attn"),
    ("generated", r"^triton_"), ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma"))
LAUNCHES = ("cuda_runtime", "cuda_driver")  # categories of the host's calls in a trace


def part_of(kernel: str, predicted: dict[str, str]) -> str:
    """The part of a step that a measured kernel belongs to.

    predicted maps the names of predicted kernels to their parts; it decides if it has the name.
    """
    if kernel in predicted:
        return predicted[kernel]
    for part, pattern in PATTERNS:
        if re.search(pattern, kernel, re.I):
            return part
    return "eager"


def measured_parts(trace: dict, predicted: dict[str, str]) -> dict[str, float]:
    """Milliseconds a step by part, from a Chrome trace of PROFILED_STEPS steps.

    Only kernels that these steps launched count: the host runs ahead of the GPU, so a trace also
    holds kernels of the steps before.
    """
    events = trace["traceEvents"]
    launched = {event["args"].get("correlation") for event in events
                if event.get("cat") in LAUNCHES}
    ms = collections.Counter()
    for event in events:
        if event.get("cat") == "kernel" and event["args"].get("correlation") in launched:
            part = part_of(event["name"], predicted)
            ms[part] += event["dur"] / 1000 / PROFILED_STEPS
    return dict(ms)


def measured(log: str) -> tuple[list[tuple[int, float]], float]:
    """([(step, train_time in ms), ...], peak memory in GiB) of a log.

    Raises ValueError if the log does not have them.
    """
    lines = re.findall(r"^step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", log, re.M)
    peak = re.search(r"peak_memory_per_rank:(\d+)MiB", log)
    if len(lines) < 2 or not peak:
        raise ValueError("the log lacks train_loss lines or peak_memory_per_rank: the run did not "
                         "end")
    return [(int(step), float(ms)) for step, ms in lines], int(peak[1]) / 1024


def step_time(lines: list[tuple[int, float]], begin: int, end: int) -> float:
    """The median time of a step in (begin, end], in ms, or NaN.

    Each pair of neighbouring log lines gives one value. The median ignores the slow traced steps.
    """
    times = []
    for (step, ms), (next_step, next_ms) in itertools.pairwise(lines):
        if begin <= step and next_step <= end:
            times.append((next_ms - ms) / (next_step - step))
    return statistics.median(times) if times else float("nan")


def stage_rows(stage: dict, trace: dict | None, ms: float) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) of one stage; ms: the measured time of a step."""
    mean = stage["mean"]
    kernels_ms = sum(mean["ms"].values())
    rows = [(f"**ms a step of {stage['tokens']:,} tokens**", kernels_ms + mean["exposed"], ms)]
    if trace:
        part_by_name = {name: part for part, name, *_ in mean["kernels"]}
        parts = measured_parts(trace, part_by_name)
        for part in PARTS:
            rows.append((part, mean["ms"].get(part, 0.0), parts.get(part, 0.0)))
        rows.append(("all kernels", kernels_ms, sum(parts.values())))
    return rows


def table(report: dict, log: str, traces: list[dict]) -> str:
    """A Markdown table: predicted, measured, and measured / predicted.

    traces has one trace for each stage, from the first stage on; there may be fewer traces.
    """
    lines, peak = measured(log)
    rows = [("peak, GiB", report["peak_timed"] / 2**30, peak)]
    begin = 0
    for stage, trace in itertools.zip_longest(report["stages"], traces[:len(report["stages"])]):
        end = begin + stage["steps"]
        rows += stage_rows(stage, trace, step_time(lines, begin, end))
        begin = end
    written = [f"| {report['card']}, torch {report['torch']} | predicted | measured | ratio |",
               "|---|---|---|---|"]
    for what, guess, value in rows:
        ratio = f"{value / guess:.2f}" if guess else ""
        written.append(f"| {what} | {guess:.1f} | {value:.1f} | {ratio} |")
    return "\n".join(written)


def read_trace(path: str) -> dict:
    """A trace file, which may be compressed."""
    content = Path(path).read_bytes()
    return json.loads(gzip.decompress(content) if path.endswith(".gz") else content)


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) < 2:
        print(f"error: expected REPORT LOG [TRACE of the first stage, of the second, ...], got "
              f"{len(argv)} arguments", file=sys.stderr)
        return 2
    report_path, log_path, *trace_paths = argv
    try:
        report = json.loads(Path(report_path).read_text())[0]
        log = Path(log_path).read_text()
        print(table(report, log, [read_trace(path) for path in trace_paths]))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: can't compare {' '.join(argv)}: {type(error).__name__}: {error}",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

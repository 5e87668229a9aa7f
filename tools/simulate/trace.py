"""train_gpt.py's run, with a trace of three steps in each of its stages: for calibrate.py, on a real GPU.

    python -m tools.simulate.trace FOLDER [train_gpt.py's flags]      writes FOLDER/stage1.trace.json, stage2...
"""
import sys
from pathlib import Path

import torch

import train_gpt

SETTLED, TRACED = 7, 3  # steps of a stage before those that are traced


def stages_profiler(hp, folder: Path) -> torch.profiler.profile:
    """torch's profiler of three steps of each stage that has as many; it writes each as a file of its own."""
    begins = [0, *train_gpt.stage_ends(hp)[:-1]]
    action, name = torch.profiler.ProfilerAction, iter(f"stage{i}.trace.json" for i in range(1, len(begins) + 1))

    def schedule(step: int) -> torch.profiler.ProfilerAction:
        since = step - max(begin for begin in begins if begin <= step) - SETTLED
        if not -1 <= since < TRACED:
            return action.NONE
        return action.WARMUP if since < 0 else action.RECORD_AND_SAVE if since == TRACED - 1 else action.RECORD

    return torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda found: found.export_chrome_trace(str(folder / next(name))))


def main(words: list[str]) -> int:
    if not words or not Path(words[0]).is_dir():
        print(f"error: {' '.join(words[:1]) or 'nothing'} is no folder; expected: FOLDER [train_gpt.py's flags]",
              file=sys.stderr)
        return 2
    train_gpt.profiler = lambda hp, runtime, log: stages_profiler(hp, Path(words[0]))
    return train_gpt.main(words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run train_gpt.py on a real GPU and trace three steps of each stage, for calibrate.py.

    python -m tools.simulate.trace FOLDER [flags of train_gpt.py]

It writes FOLDER/stage1.trace.json, stage2.trace.json, ... and passes the script's log on. It runs
one process, so the collectives of several GPUs are missing in the trace.
"""
import sys
from pathlib import Path

import torch

import train_gpt

SETTLED = 7  # steps of a stage before those that are traced
TRACED = 3


def profile_stages(hp, folder: Path) -> torch.profiler.profile:
    """A profiler that writes one file for each stage that is long enough."""
    first_steps = [0, *train_gpt.stage_ends(hp)[:-1]]
    action = torch.profiler.ProfilerAction
    written = []

    def schedule(step: int) -> torch.profiler.ProfilerAction:
        stage_start = max(start for start in first_steps if start <= step)
        since = step - stage_start - SETTLED
        if since == -1:
            return action.WARMUP
        if 0 <= since < TRACED - 1:
            return action.RECORD
        if since == TRACED - 1:
            return action.RECORD_AND_SAVE
        return action.NONE

    def write(profile) -> None:
        path = folder / f"stage{len(written) + 1}.trace.json"
        profile.export_chrome_trace(str(path))
        written.append(path)

    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)


def run_traced(folder: Path, argv: list[str]) -> int:
    """train_gpt.main(argv) with a profiler around the training steps after the warm-up."""
    warm_up, training_step = train_gpt.warm_up, train_gpt.training_step
    profiles = []

    def warm_up_untraced(model, *rest):
        train_gpt.training_step = training_step
        warm_up(model, *rest)
        profiles.append(profile_stages(model.hp, folder))
        profiles[-1].start()
        train_gpt.training_step = traced_step

    def traced_step(*args):
        loss = training_step(*args)
        profiles[-1].step()
        return loss

    train_gpt.warm_up = warm_up_untraced
    try:
        return train_gpt.main(argv)
    finally:
        for profile in profiles:
            profile.stop()
        train_gpt.warm_up, train_gpt.training_step = warm_up, training_step


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    if not argv or not Path(argv[0]).is_dir():
        given = argv[0] if argv else "nothing"
        print(f"error: {given} is not a folder; expected: FOLDER [flags of train_gpt.py]",
              file=sys.stderr)
        return 2
    return run_traced(Path(argv[0]), argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

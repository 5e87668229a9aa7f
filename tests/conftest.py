"""What several tests use: a small corpus, a small model, and a sandbox in which the real script runs."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from data.shards import write_shard

REPOSITORY = Path(__file__).resolve().parents[1]
VAL_TOKENS = 16_384  # the sandbox's copy of the script validates on so many instead of the laptop track's
# What people search logs for, without an anchor.
SEARCHES = ["val_loss:", "val_loss:[0-9.]+", "train_loss:", "train_time:", "step_avg:", "step:[0-9]+/"]
TINY = ("--device=cpu --dtype=float32 --compile=off --num_steps=6 --batch_size=2 --micro_batch=2 "
        "--sequence_length=256 --num_layers=2 --num_heads=2 --model_dim=32 --window_start=64 --window_end=128 "
        "--cooldown_steps=3 --val_every=3 --log_every=1 --sample_tokens=0 --muon_lr=0.035 --ngram_lr=1 "
        "--ngrams=3 --ngram_rows=1021").split()


def words(num_tokens: int, seed: int) -> np.ndarray:
    """Documents of made-up words as byte tokens, each after the end-of-text token 256: (num_tokens,) uint16."""
    random = np.random.RandomState(seed)  # the legacy generator's streams are frozen, so a golden file can rest on it
    vocabulary = [bytes(random.randint(97, 123, size=random.randint(2, 8)).tolist()) for _ in range(60)]
    parts, length = [], 0
    while length < num_tokens:
        text = b" ".join(vocabulary[i] for i in np.minimum(random.geometric(0.08, size=random.randint(5, 90)), 60) - 1)
        parts.append(np.concatenate([[256], np.frombuffer(text, np.uint8)]))
        length += len(parts[-1])
    return np.concatenate(parts)[:num_tokens].astype(np.uint16)


@pytest.fixture
def sandbox(tmp_path):
    """A folder with the scripts (fewer validation tokens) and a small laptop corpus; sandbox(args...) runs one."""
    for script in [REPOSITORY / "train_gpt.py", *(REPOSITORY / "records").glob("*/train_gpt.py")]:
        source = script.read_text()
        assert source.count("262_144") == 1
        copy = tmp_path / script.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.replace("262_144", f"{VAL_TOKENS:_}"))
    (tmp_path / "run.sh").touch()  # marks the root of a repository
    write_shard(tmp_path / "data/laptop/laptop_val_000000.bin", words(VAL_TOKENS + 1, seed=1))
    for number in (1, 2):
        write_shard(tmp_path / f"data/laptop/laptop_train_{number:06d}.bin", words(3000, seed=1 + number))

    def run(*args, ranks=1, tiny=TINY, env=None, script="train_gpt.py"):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [script, "--track=laptop", *tiny, *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})

    run.path = tmp_path
    return run


@pytest.fixture
def hp():
    """Hyperparameters of a model of 2 layers and width 32."""
    return train_gpt.parse_arguments(["--track=laptop", *TINY])


@pytest.fixture
def tiny_model(hp):
    """Its model, on the CPU in float32, with weights drawn where training would start from zero."""
    model = train_gpt.build_model(hp, torch.device("cpu"), torch.float32, flex=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any() or name.endswith("_mix"):
                p.add_(0.1 * torch.randn_like(p))
    return model


def at_window(window: int) -> train_gpt.Schedule:
    """What the schedules say at step 0 of a run, but for another window."""
    schedule = train_gpt.Schedule(0, train_gpt.Hyperparameters(), torch.device("cpu"))
    schedule.window = torch.tensor(window)
    return schedule


def metric_lines(text: str) -> list[str]:
    """The lines of a log or a console that carry a loss, without the times, which no two runs share."""
    return [line.split(" train_time")[0] for line in text.splitlines() if line.startswith("step:")]

"""What several tests use: a small corpus, small models, and a sandbox in which the real script runs."""
import os
import re
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
# The laptop track's tables with a width of 32.
TINY = ("--device=cpu --dtype=float32 --compile=off --num_steps=6 --batch_size=2 --micro_batch=2 "
        "--sequence_length=256 --val_length=2048 --num_heads=2 --model_dim=32 --cooldown=0.5 --val_every=3 "
        "--log_every=1 --sample_tokens=0 --muon_lr=0.035 --ngram_lr=1 --ngrams=3 --ngram_rows=1021").split()
# The same for the scripts of old entries.
ENTRY_TINY = ("--device=cpu --dtype=float32 --compile=off --num_steps=14 --batch_size=2 --micro_batch=2 "
              "--sequence_length=256 --num_layers=2 --num_heads=2 --model_dim=32 --cooldown_steps=3 --val_every=3 "
              "--log_every=1").split()
# For fineweb's tables under the laptop track (the fixtures recipe and recipe_sandbox): all of the full recipe on bytes.
# Its stages begin at steps 0, 4, 8, 11 and 12, with batches of 2, 4, 6, 6 and 6 sequences; untied at step 8. Of 384
# words 106, 149 and 256 compete in the first three, more than the sandboxes' text has, then all.
RECIPE = ("--device=cpu --dtype=float32 --compile=off --num_steps=14 --extension_steps=2 --batch_size=2 "
          "--micro_batch=2 --sequence_length=256 --val_length=4096 --num_heads=2 --model_dim=32 --ngrams=2 "
          "--ngram_rows=1021 --ngram_rule=adam --attention_scale=0.1 --final_window=320 --logit_cap=23 "
          "--logit_shift=5 --logit_scale=7.5 --head_lr=0.008 --value_lr=0.6 --ngram_lr=0.6 --adam_every=2 "
          "--adam_decay=0.005 --muon_lr=0.023 --muon_decay=1.2 --muon_beta2=0.9 --momentum_warmup_steps=4 "
          "--momentum_cooldown_steps=3 --cooldown=0.6 --lr_floor=0.15 --val_every=4 --log_every=1 "
          "--sample_tokens=0").split()
SHORTER = 8  # times shorter are the recipe's windows and documents: 48, 112, 176, 208; 112, 256 tokens
RECIPE_TABLES = f'''
LAYERS["laptop"] = LAYERS["fineweb"]
STAGES["laptop"] = tuple(stage._replace(window=stage.window // {SHORTER}, document=stage.document // {SHORTER},
                                        words=stage.words // 96) for stage in STAGES["fineweb"])
'''


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


def with_val_tokens(source: str, val_tokens: int) -> str:
    """A script whose laptop track validates on so many tokens."""
    source, count = re.subn(r'("laptop": Track\([^()]*)\b262_144\b', rf"\g<1>{val_tokens:_}", source)
    assert count == 1
    return source


def with_recipe(source: str) -> str:
    """A script whose laptop track has fineweb's LAYERS and STAGES, with shorter windows and documents."""
    before, main, after = source.rpartition('\nif __name__ == "__main__":')
    assert main
    return before + RECIPE_TABLES + main + after


def make_sandbox(folder: Path, edit, flags: list[str], train_tokens: int):
    """A folder with the scripts (fewer validation tokens) and a small laptop corpus. Returns a function that runs one
    with flags and more."""
    for script in [REPOSITORY / "train_gpt.py", *(REPOSITORY / "records").glob("*/train_gpt.py")]:
        copy = folder / script.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        source = with_val_tokens(script.read_text(), VAL_TOKENS)
        copy.write_text(edit(source) if copy.parent == folder else source)
    (folder / "run.sh").touch()  # marks the root of a repository
    write_shard(folder / "data/laptop/laptop_val_000000.bin", words(VAL_TOKENS + 1, seed=1))
    for number in (1, 2):
        write_shard(folder / f"data/laptop/laptop_train_{number:06d}.bin", words(train_tokens, seed=1 + number))

    def run(*args, ranks=1, tiny=flags, env=None, script="train_gpt.py"):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [script, "--track=laptop", *tiny, *map(str, args)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})

    run.path = folder
    return run


@pytest.fixture
def sandbox(tmp_path):
    """A folder with the scripts (fewer validation tokens) and a small laptop corpus; sandbox(args...) runs one."""
    return make_sandbox(tmp_path, lambda source: source, TINY, 3000)


@pytest.fixture
def recipe_sandbox(tmp_path):
    """The same, where train_gpt.py has the full recipe's tables, RECIPE's flags, and more text."""
    return make_sandbox(tmp_path, with_recipe, RECIPE, 20_000)


@pytest.fixture
def hp():
    """Hyperparameters of the laptop track's layers with a width of 32."""
    return train_gpt.parse_arguments(["--track=laptop", *TINY])


@pytest.fixture
def recipe(monkeypatch):
    """Hyperparameters of all 11 layers and 5 stages of the full recipe, on bytes, with a width of 32."""
    tables = {name: dict(getattr(train_gpt, name)) for name in ("LAYERS", "STAGES")}
    exec(RECIPE_TABLES, tables)
    for name in ("LAYERS", "STAGES"):
        monkeypatch.setitem(getattr(train_gpt, name), "laptop", tables[name]["laptop"])
    train_gpt._stage_tensors.cache_clear()  # its keys are hyperparameters: it takes the tables for constants
    yield train_gpt.parse_arguments(["--track=laptop", *RECIPE])
    train_gpt._stage_tensors.cache_clear()


def away_from_zero(model):
    """The model with weights drawn where training would start from zero or from one number."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any() or name.endswith("_scale"):
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def tiny_model(hp):
    """hp's model, on the CPU in float32, with weights drawn where training would start from zero."""
    return away_from_zero(train_gpt.build_model(hp, torch.device("cpu"), torch.float32, flex=False))


@pytest.fixture
def recipe_model(recipe):
    """The same of the full recipe."""
    return away_from_zero(train_gpt.build_model(recipe, torch.device("cpu"), torch.float32, flex=False))


def at_window(window: int, hp: train_gpt.Hyperparameters | None = None) -> train_gpt.Schedule:
    """What the schedules say at step 0 of a run (default: of TINY), but for another window in all layers."""
    hp = hp or train_gpt.parse_arguments(["--track=laptop", *TINY])
    schedule = train_gpt.Schedule(0, hp, torch.device("cpu"))
    schedule.windows = {kind: torch.tensor(window) for kind in schedule.windows}
    return schedule


def metric_lines(text: str) -> list[str]:
    """The lines of a log or a console that carry a loss, without the times, which no two runs share."""
    return [line.split(" train_time")[0] for line in text.splitlines() if line.startswith("step:")]

"""Small runs of train_gpt.py for the tests: a made-up corpus, flags, shorter tables.

A test in its own process calls `install` on a module and then main(argv). For tests that need a
process of its own (kill, signals, several ranks):

    python tests/small.py [--recipe] [--patch FILE:FUNCTION] ROOT [flags of train_gpt.py]

runs train_gpt.main on the corpus in ROOT. FUNCTION(module), in the Python file FILE, patches the
module first.
"""
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from data.shards import write_shard  # noqa: E402

VAL_TOKENS = 16_384  # the laptop track of the tests validates on so many tokens

# The laptop track's layers with a width of 32.
TINY = [
    "--track=laptop", "--device=cpu", "--dtype=float32", "--compile=off", "--num_steps=6",
    "--batch_size=2", "--micro_batch=2", "--sequence_length=256", "--val_length=2048",
    "--num_heads=2", "--model_dim=32", "--mlp_dim=128", "--cooldown=0.5", "--val_every=3",
    "--log_every=1", "--muon_lr=0.035", "--ngram_lr=1", "--ngrams=3", "--ngram_rows=1021",
    "--no_weights"]

# The full recipe (fineweb's LAYERS and STAGES) on the laptop track's bytes, with a width of 32. Its
# stages begin at steps 0, 4, 8, 11 and 12, with batches of 2, 4, 6, 6 and 6 sequences; the
# embedding is untied at step 8. The sampled softmax has 106, 149 and 256 of 384 entries in the
# first stages. Averages of the weights are updated after 6, 10 and 14 steps.
# Muon has two momenta from step 6 on.
RECIPE = [
    "--track=laptop", "--device=cpu", "--dtype=float32", "--compile=off", "--num_steps=14",
    "--extension=0.142857", "--batch_size=2", "--micro_batch=2", "--sequence_length=256",
    "--val_length=4096", "--num_heads=2", "--model_dim=32", "--mlp_dim=128", "--ngrams=2",
    "--ngram_rows=1021",
    "--ngram_rule=adam", "--attention_scale=0.085", "--final_window=320", "--pointer_window=64",
    "--logit_cap=23", "--logit_shift=5", "--logit_scale=7.5", "--head_lr=0.008", "--value_lr=0.6",
    "--ngram_lr=0.6", "--adam_every=2", "--adam_decay=0.005", "--muon_lr=0.023", "--muon_decay=1.2",
    "--muon_beta2=0.9", "--momentum_warmup=0.285714", "--momentum_cooldown=0.214286",
    "--two_momenta_from=0.4", "--cooldown=0.6", "--lr_floor=0.15", "--average_tail=0.7",
    "--val_every=4", "--log_every=1", "--no_weights"]
SHORTER = 8         # divides the recipe's windows, which become 48 to 208 tokens, and documents
FEWER_CLASSES = 96  # divides the size of its sampled softmax


def words(num_tokens: int, seed: int) -> np.ndarray:
    """Documents of made-up words as bytes, each after the end-of-text token 256: (num_tokens,)
    uint16."""
    random = np.random.RandomState(seed)  # golden losses rest on it: its streams never change
    vocabulary = []
    for _ in range(60):
        letters = random.randint(97, 123, size=random.randint(2, 8))
        vocabulary.append(bytes(letters.tolist()))
    parts, length = [], 0
    while length < num_tokens:
        ranks = np.minimum(random.geometric(0.08, size=random.randint(5, 90)), 60) - 1
        text = b" ".join(vocabulary[rank] for rank in ranks)
        parts.append(np.concatenate([[256], np.frombuffer(text, np.uint8)]))
        length += len(parts[-1])
    return np.concatenate(parts)[:num_tokens].astype(np.uint16)


def write_corpus(root: Path, train_tokens: int = 3000) -> None:
    """A repository's data for the laptop track: one validation shard, two training shards of
    train_tokens each."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "run.sh").touch()  # marks the root of a repository
    write_shard(root / "data/laptop/laptop_val_000000.bin", words(VAL_TOKENS + 1, seed=1))
    for number in (1, 2):
        shard = root / f"data/laptop/laptop_train_{number:06d}.bin"
        write_shard(shard, words(train_tokens, seed=1 + number))


def recipe_tables(module) -> tuple[tuple, tuple]:
    """(LAYERS, STAGES) of the full recipe with shorter windows and documents and fewer classes."""
    stages = []
    for stage in module.STAGES["fineweb"]:
        stages.append(stage._replace(
            window=stage.window // SHORTER,
            max_doc_len=stage.max_doc_len // SHORTER,
            softmax_size=stage.softmax_size // FEWER_CLASSES))
    return module.LAYERS["fineweb"], tuple(stages)


def install(module, root: Path, monkeypatch, recipe: bool = False) -> None:
    """Point a train_gpt module at the corpus in root; recipe: with the full recipe's tables. The
    original values come back when monkeypatch (pytest's) is undone."""
    monkeypatch.setattr(module, "ROOT", root)
    track = dataclasses.replace(module.TRACKS["laptop"], val_tokens=VAL_TOKENS)
    monkeypatch.setitem(module.TRACKS, "laptop", track)
    if recipe:
        layers, stages = recipe_tables(module)
        monkeypatch.setitem(module.LAYERS, "laptop", layers)
        monkeypatch.setitem(module.STAGES, "laptop", stages)


def load_function(spec: str):
    """The function that FILE:FUNCTION names."""
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("patch_for_a_small_run", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return getattr(module, name)


def main(argv: list[str]) -> int:
    import pytest

    import train_gpt

    recipe = argv[0] == "--recipe"
    if recipe:
        argv = argv[1:]
    patches = []
    while argv[0] == "--patch":
        patches.append(load_function(argv[1]))
        argv = argv[2:]
    install(train_gpt, Path(argv[0]), pytest.MonkeyPatch(), recipe)
    for patch in patches:
        patch(train_gpt)
    code = train_gpt.main(argv[1:])
    if train_gpt.dist.is_initialized():  # as the script itself ends
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

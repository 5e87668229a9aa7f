"""Runs two versions of train_gpt.py in ten settings; compares losses, weights and optimizer state.

    git show 0c52893:train_gpt.py > old.py
    git show 977cfda:train_gpt.py > new.py
    python records/studies/2026-11-29_PlainCode/same_numbers.py old.py new.py

Run it in the repository's root, with the packages of requirements.txt and, for the last setting, the
laptop corpus (`python -m data.laptop`).
"""
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import small  # noqa: E402

RENAMED = {"resid_lambdas": "residual_scale", "branch_lambdas": "branch_scale", "v_lambda": "value_scale",
           "input_embedding": "stem", "smear_lambda": "smear_scale", "ngram_lambda": "ngram_scale",
           "skip_lambda": "skip_scale", "xsa_lambdas": "xsa_scale", "momentum_buffer": "momentum"}
SHARES = ("--extension", "--momentum_warmup", "--momentum_cooldown")  # of the new script
TINY = [*small.TINY, "--num_steps=16", "--val_every=4", "--save_every=16"]
RECIPE = [*small.RECIPE, "--save_every=14"]
BFLOAT16 = ["--dtype=bfloat16"]
LAPTOP = ["--track=laptop", "--num_steps=40", "--val_every=20", "--log_every=5", "--save_every=40",
          "--dtype=float32", "--compile=off"]
SETTINGS = {  # name: (tables, flags, ranks)
    "laptop tables": ("tiny", TINY, 1),
    "laptop tables, 2 ranks": ("tiny", TINY, 2),
    "laptop tables, bfloat16": ("tiny", TINY + BFLOAT16, 1),
    "laptop tables, compiled": ("tiny", [*TINY, "--compile=on"], 1),
    "laptop tables, no value embeddings, bigrams": ("no values", [*TINY, "--ngrams=2"], 1),
    "recipe": ("recipe", RECIPE, 1),
    "recipe, 2 ranks": ("recipe", RECIPE, 2),
    "recipe, bfloat16": ("recipe", RECIPE + BFLOAT16, 1),
    "recipe, bfloat16, 2 ranks": ("recipe", RECIPE + BFLOAT16, 2),
    "laptop preset": ("as they are", LAPTOP, 1),
}


def run_script(path: str, tables: str, root: str, flags: list[str]) -> int:
    """One rank: the script with small tables, in this process."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    module.ROOT = Path(root)
    if tables != "as they are":
        track = dataclasses.replace(module.TRACKS["laptop"], val_tokens=small.VAL_TOKENS)
        module.TRACKS["laptop"] = track
    if tables == "recipe":
        module.LAYERS["laptop"] = module.LAYERS["fineweb"]
        fields = module.Stage._fields
        document = "max_doc_len" if "max_doc_len" in fields else "document"
        classes = "softmax_size" if "softmax_size" in fields else "words"
        module.STAGES["laptop"] = tuple(stage._replace(**{
            "window": stage.window // small.SHORTER,
            document: getattr(stage, document) // small.SHORTER,
            classes: getattr(stage, classes) // small.FEWER_CLASSES})
            for stage in module.STAGES["fineweb"])
    if tables == "no values":
        module.LAYERS["laptop"] = tuple(
            layer._replace(value_table=None) for layer in module.LAYERS["laptop"])
    return module.main(flags)


def results(path: str, is_old: bool, tables: str, flags: list[str], ranks: int):
    """(loss lines without times, last checkpoint) of one run."""
    if is_old:  # the old script has steps where the new one has shares, and writes a sample
        flags = [flag for flag in flags if not flag.startswith(SHARES)] + ["--sample_tokens=0"]
        if tables == "recipe":
            flags += ["--extension_steps=2", "--momentum_warmup_steps=4", "--momentum_cooldown_steps=3"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if tables == "as they are":
            (root / "run.sh").touch()
            (root / "data").symlink_to(ROOT / "data")
        else:
            small.write_corpus(root, 20_000 if tables == "recipe" else 3000)
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost",
                        f"--nproc_per_node={ranks}"]
        command += [__file__, "one-run", path, tables, folder, *flags]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        losses = [re.sub(" train_time.*", "", line) for line in done.stdout.splitlines()
                  if line.startswith("step:")]
        checkpoint = max((root / "records/scratch").glob("*.pt"))
        return losses, torch.load(checkpoint, weights_only=True)


def old_name(name: str) -> str:
    for new, old in RENAMED.items():
        name = name.replace(new, old)
    return name


def main(old: str, new: str) -> None:
    for name, (tables, flags, ranks) in SETTINGS.items():
        old_losses, old_state = results(old, True, tables, flags, ranks)
        new_losses, new_state = results(new, False, tables, flags, ranks)
        weights = [torch.equal(value, old_state["model"][old_name(key)])
                   for key, value in new_state["model"].items()]
        buckets = zip(new_state["optimizer"]["buckets"], old_state["optimizer"]["buckets"], strict=True)
        state = [torch.equal(value, old_bucket[old_name(key)])
                 for new_bucket, old_bucket in buckets for key, value in new_bucket.items()]
        print(f"{name}: {len(new_losses)} losses {'equal' if old_losses == new_losses else 'DIFFER'}, "
              f"{sum(weights)} of {len(weights)} weights and {sum(state)} of {len(state)} optimizer "
              "states equal bit for bit", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "one-run":
        sys.exit(run_script(*sys.argv[2:5], sys.argv[5:]))
    main(*sys.argv[1:])

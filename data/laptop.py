"""The laptop track's corpus: the Python source of the installed torch package as bytes. Offline and deterministic.

    python -m data.laptop            # writes data/laptop/laptop_{train,val}_*.bin, about 46 MB, in a few seconds

Every installation of the project already holds this text, so the track needs no network. A document is one .py file,
preceded by the end-of-text token 256, in sorted path order; a hash of the relative path sends one file in VAL_ONE_IN to
the validation shard and all others to the training shard.
"""
import argparse
import hashlib
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data.shards import write_shard
from train_gpt import ROOT, TRACKS, UserError, open_shard, run_as_program

TRACK = TRACKS["laptop"]
VAL_ONE_IN = 118  # of torch 2.13.0: 277,846 tokens of 23 files from all over the package, the largest a fifth of them
LEFT_OUT = {"version.py"}  # written by the build, so it differs between builds of the same release


def torch_source() -> Path:
    """The folder of the installed torch package. Raises UserError if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("the laptop corpus is torch's own source, and torch is not installed; run ./run.sh, or "
                        "pip install -r requirements.txt")
    return Path(spec.origin).parent


def documents(folder: Path) -> list[tuple[str, Path]]:
    """All (relative path with forward slashes, file) of Python source below folder, sorted by that path."""
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py"))
    return sorted((name, path) for name, path in found if name not in LEFT_OUT)


def is_validation(name: str) -> bool:
    """Whether the document of this relative path belongs to the validation shard."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % VAL_ONE_IN == 0


def tokenize(path: Path) -> np.ndarray:
    """One document as uint16 tokens: the end-of-text token, then the file's bytes (line ends as LF on every system)."""
    text = np.frombuffer(path.read_bytes().replace(b"\r\n", b"\n"), dtype=np.uint8)
    return np.concatenate([[TRACK.eot_token], text]).astype(np.uint16)


def build(source: Path | None = None, target: Path | None = None) -> None:
    """Write the corpus into target (default: where the track looks) unless it is there already, whole.

    Raises UserError if torch is missing or the source holds too little text for the validation set.
    """
    target = target or (ROOT / TRACK.val_files).parent
    shards: dict[str, list[np.ndarray]] = {"laptop_val_000000.bin": [], "laptop_train_000001.bin": []}
    val, train = shards.values()
    for name, path in documents(source or torch_source()):
        (val if is_validation(name) else train).append(tokenize(path))
    num_val = sum(map(len, val))
    if num_val <= TRACK.val_tokens or not train:
        raise UserError(f"the source of torch {metadata.version('torch')} gives {num_val:,} validation tokens, expected "
                        f"more than {TRACK.val_tokens:,}; take the pinned release: pip install -r requirements.txt")
    for name, parts in shards.items():
        tokens = np.concatenate(parts)
        if not _holds(target / name, tokens):
            write_shard(target / name, tokens, vocab_size=TRACK.vocab_size)
    print(f"laptop corpus: {sum(map(len, train)):,} training and {num_val:,} validation tokens in {target}")


def _holds(path: Path, tokens: np.ndarray) -> bool:
    """Whether the shard at path is whole and equal to tokens."""
    try:
        return np.array_equal(open_shard(path), tokens)
    except UserError:
        return False


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m data.laptop`. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    return run_as_program(build)


if __name__ == "__main__":
    sys.exit(main())

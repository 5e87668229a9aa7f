"""Builds the laptop track's corpus: the Python source of the installed torch package, as bytes.

    python -m data.laptop    # writes data/laptop/laptop_{train,val}_*.bin, about 92 MB

Every installation of this project already holds this text, so the track needs no network. Each .py
file is one document. It consists of the end-of-text token 256 and the bytes of the file. Documents
are sorted by their relative paths. A hash of that path sends one file in 118 to the validation
shard and all others to the training shard, so the corpus depends only on the torch release.
"""
import argparse
import hashlib
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from data import DATA_FOLDER, UserError, run_as_program, say
from data.documents import files_below
from data.shards import BYTE_VOCAB_SIZE, open_shard, write_shard

FOLDER = DATA_FOLDER / "laptop"
TRAIN_SHARD = "laptop_train_000001.bin"
VAL_SHARD = "laptop_val_000000.bin"
END_OF_TEXT = BYTE_VOCAB_SIZE - 1
VAL_TOKENS = 262_144  # the track validates on so many tokens

# With torch 2.13.0 this gives 277,846 validation tokens in 23 files from all parts of the package.
# The largest file is a fifth of them.
VAL_ONE_IN = 118
LEFT_OUT = {"version.py"}  # differs between builds of the same release


def torch_source() -> Path:
    """Return the folder of the installed torch package, without importing it.

    Raises UserError if torch is not installed.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("the laptop corpus is the source of torch, which is not installed; use "
                        "./run.sh, or pip install -r requirements.txt")
    return Path(spec.origin).parent


def documents(folder: Path) -> list[tuple[str, Path]]:
    """Return (relative path with forward slashes, file) of all Python files, sorted by path."""
    found = []
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".py" and name not in LEFT_OUT:
            found.append((name, path))
    return sorted(found)


def is_validation(name: str) -> bool:
    """Whether the document with this relative path belongs to the validation shard."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VAL_ONE_IN == 0


def tokenize(path: Path) -> np.ndarray:
    """Return one document, (n,) uint16. Line ends become LF, so that all systems agree."""
    text = path.read_bytes().replace(b"\r\n", b"\n")
    tokens = np.empty(1 + len(text), np.uint16)
    tokens[0] = END_OF_TEXT
    tokens[1:] = np.frombuffer(text, np.uint8)
    return tokens


def build(source: Path | None = None, target: Path = FOLDER) -> None:
    """Write the two shards into target. A shard that is already there and right is left alone.

    source: the folder of Python files, by default that of the installed torch. Raises UserError if
    torch is missing, or if its source has too little text for the validation set.
    """
    train, val = [], []
    try:
        for name, path in documents(source or torch_source()):
            split = val if is_validation(name) else train
            split.append(tokenize(path))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; use ./run.sh, or pip "
                        "install -r requirements.txt") from error
    num_train = sum(len(tokens) for tokens in train)
    num_val = sum(len(tokens) for tokens in val)
    # One token more than VAL_TOKENS, because the target of a token is the next one.
    if num_val <= VAL_TOKENS or num_train == 0:
        raise UserError(f"the source of torch {metadata.version('torch')} gives {num_val:,} "
                        f"validation tokens, expected more than {VAL_TOKENS:,}; install the pinned "
                        "release: pip install -r requirements.txt")
    for shard, parts in ((TRAIN_SHARD, train), (VAL_SHARD, val)):
        tokens = np.concatenate(parts)
        if not holds(target / shard, tokens):
            write_shard(target / shard, tokens, BYTE_VOCAB_SIZE)
    say(f"laptop corpus: {num_train:,} training and {num_val:,} validation tokens in {target}")


def holds(path: Path, tokens: np.ndarray) -> bool:
    """Whether the file at path is a complete shard of these tokens."""
    try:
        return np.array_equal(open_shard(path), tokens)
    except UserError:
        return False


def command(argv: list[str] | None) -> None:
    """Build the corpus. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m data.laptop", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    build()


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m data.laptop`. Returns the exit code."""
    return run_as_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())

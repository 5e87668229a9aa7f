"""Token shards, the file format of all training data: read, write and check them.

    python -m data.shards FILE...    # checks shards; prints the tokens, documents and largest id

A shard begins with a header of 256 little-endian int32: a magic number, the version, the number of
tokens, then zeros. The tokens follow as little-endian uint16. The format is that of the public
FineWeb shards. train_gpt.py has its own short reader, because it must stand alone.

A file under a shard's final name is always complete: write_shard writes to a temporary file first
and renames it.
"""
import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from data import UserError, run_as_program, say

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_TOKENS = 2**31 - 1  # the header counts them in an int32
MAX_VOCAB_SIZE = 2**16  # token ids are uint16

# In every vocabulary the last id is the end-of-text token, which precedes each document.
BYTE_VOCAB_SIZE = 257
GPT2_VOCAB_SIZE = 50_257

CHUNK = 2**24  # tokens that verify_shard looks at together

# Commands write into a temporary folder whose name begins like this. It lies in the final folder,
# because a rename cannot cross file systems.
UNFINISHED = ".unfinished-"


class ShardInfo(NamedTuple):
    """What verify_shard found."""
    num_tokens: int
    num_documents: int  # end-of-text tokens, that is, documents that begin in this shard
    max_id: int         # -1 in an empty shard


def open_shard(path: str | Path) -> np.ndarray:
    """Return the tokens of a shard as a read-only memory map, (num_tokens,) uint16.

    Raises UserError if the file cannot be read, or if it is not a complete shard.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a shard: it is a folder, a pipe or a device")
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
    if len(header) < HEADER_INTS:
        raise UserError(f"{path} is not a shard: it has {size:,} bytes, expected a header of "
                        f"{HEADER_BYTES:,}; delete it, then fetch or build it again")
    magic, version, num_tokens = header[:3].tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(f"{path} is not a shard: it begins with {magic}, {version}, expected "
                        f"{MAGIC}, {VERSION}; delete it, then fetch or build it again")
    if num_tokens < 0 or size != HEADER_BYTES + 2 * num_tokens:
        raise UserError(f"{path} is damaged: it has {size:,} bytes, but its header promises "
                        f"{num_tokens:,} tokens; delete it, then fetch or build it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int = MAX_VOCAB_SIZE) -> None:
    """Write tokens, integers of shape (n,), as a shard, and create its folder if it is missing.

    An existing file is replaced. Raises ValueError if the tokens do not fit into a shard, and
    UserError if the file cannot be written. In both cases an existing file stays as it is.
    """
    path = Path(path)
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens have shape {tokens.shape} and type {tokens.dtype}, "
                         "expected integers of shape (n,)")
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"{len(tokens):,} tokens, expected at most {MAX_TOKENS:,} in a shard")
    largest_allowed = min(vocab_size, MAX_VOCAB_SIZE) - 1
    if len(tokens) and (tokens.min() < 0 or tokens.max() > largest_allowed):
        raise ValueError(f"token ids range from {tokens.min()} to {tokens.max()}, "
                         f"expected 0 to {largest_allowed}")

    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    try:
        make_folder(path.parent)
        with TemporaryDirectory(prefix=UNFINISHED, dir=path.parent,
                                ignore_cleanup_errors=True) as folder:
            temporary = Path(folder) / path.name
            with open(temporary, "wb") as file:
                file.write(header.data)
                file.write(np.ascontiguousarray(tokens, dtype="<u2").data)
            publish(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free disk space or "
                        "choose another folder, then repeat the command") from error


def make_folder(folder: Path) -> None:
    """Create a folder if it is missing, also where a link leads nowhere. Raises OSError."""
    os.makedirs(os.path.realpath(folder), exist_ok=True)


def name_leftovers(folder: Path) -> None:
    """Name the temporary folders of other commands, which may have been killed."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        say(f"{leftover} belongs to another command; if that is not running any more, delete it")


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its final name after its content has reached the disk.

    Raises OSError.
    """
    with open(temporary, "rb+") as file:
        # Otherwise a power failure could keep the name and lose the content.
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ShardWriter:
    """Cuts a stream of tokens into shards named PREFIX_SPLIT_000001.bin and so on.

    All shards but the last have shard_tokens tokens. A document that does not fit continues in the
    next shard, without another end-of-text token, as in the public FineWeb shards. Training shards
    count from 1, validation shards from 0.

    Use it in a `with` statement: the end of the block writes the last shard, unless an exception
    ended it.
    """

    def __init__(self, directory: str | Path, prefix: str, split: str, shard_tokens: int,
                 vocab_size: int = MAX_VOCAB_SIZE):
        if not 1 <= shard_tokens <= MAX_TOKENS:
            raise ValueError(f"shard_tokens is {shard_tokens:,}, expected 1 to {MAX_TOKENS:,}")
        self.directory = Path(directory)
        self.prefix = prefix
        self.split = split
        self.vocab_size = vocab_size
        self.buffer = np.empty(shard_tokens, np.uint16)  # the system allocates pages when written
        self.filled = 0              # tokens in the buffer
        self.num_tokens = 0          # tokens written so far, including those in the buffer
        self.paths: list[Path] = []  # finished shards

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, (n,) uint16. Raises ValueError on another type, else as write_shard."""
        if tokens.dtype != np.uint16:
            raise ValueError(f"tokens have type {tokens.dtype}, expected uint16")
        self.num_tokens += len(tokens)
        while len(tokens):
            room = len(self.buffer) - self.filled
            part = tokens[:room]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part):]
            if self.filled == len(self.buffer):
                self._write_buffer()

    def _write_buffer(self) -> None:
        first_number = 1 if self.split == "train" else 0
        number = first_number + len(self.paths)
        path = self.directory / f"{self.prefix}_{self.split}_{number:06d}.bin"
        write_shard(path, self.buffer[:self.filled], self.vocab_size)
        self.paths.append(path)
        self.filled = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None and self.filled:
            self._write_buffer()


def verify_shard(path: str | Path, vocab_size: int | None = None) -> ShardInfo:
    """Read a whole shard and count its tokens and documents.

    Without vocab_size, a shard whose ids are all below 257 counts as one of bytes, any other as one
    of GPT-2 tokens. Raises UserError on a damaged shard and on an id that is not below vocab_size.
    """
    tokens = open_shard(path)
    chunks = [tokens[start:start + CHUNK] for start in range(0, len(tokens), CHUNK)]
    max_id = max((int(chunk.max()) for chunk in chunks), default=-1)
    if vocab_size is None:
        vocab_size = BYTE_VOCAB_SIZE if max_id < BYTE_VOCAB_SIZE else GPT2_VOCAB_SIZE
    if max_id >= vocab_size:
        raise UserError(f"{path} holds the token id {max_id}, expected ids below {vocab_size}; if "
                        "it has another vocabulary, name its size with --vocab_size, otherwise "
                        "delete the file and fetch or build it again")
    end_of_text = vocab_size - 1
    num_documents = sum(int(np.count_nonzero(chunk == end_of_text)) for chunk in chunks)
    return ShardInfo(len(tokens), num_documents, max_id)


def verify(paths: list[str], vocab_size: int | None) -> None:
    """Print one line for each shard. Raises UserError at the first bad one."""
    for path in paths:
        info = verify_shard(path, vocab_size)
        say(f"{path}: {info.num_tokens:,} tokens, {info.num_documents:,} documents, "
            f"largest id {info.max_id}")


def command(argv: list[str] | None) -> None:
    """Check the shards that the command line names. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m data.shards", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FILE", help="a .bin shard")
    parser.add_argument("--vocab_size", type=int, help="size of the vocabulary; its last id is the "
                        "end-of-text token (257 if all ids are below that, otherwise 50257)")
    args = parser.parse_args(argv)
    verify(args.paths, args.vocab_size)


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m data.shards`. Returns the exit code."""
    return run_as_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())

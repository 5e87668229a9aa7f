"""Token shards: written and verified here, read by train_gpt.open_shard.

    python -m data.shards FILE...      # verifies shards; prints the tokens, documents and largest id of each

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then its tokens as little-endian uint16.
A file under a shard's name is always a whole shard: it is written under another name first, then renamed.
"""
import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train_gpt import SHARD_HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, TRACKS, UserError, open_shard, run_as_program

MAX_SHARD_TOKENS = 2**31 - 1          # the header counts them in an int32
FIRST_NUMBER = {"train": 1, "val": 0}  # of a split's shards, as in the public FineWeb files


class ShardInfo(NamedTuple):
    """What verify_shard found."""
    num_tokens: int
    num_documents: int  # end-of-text tokens: documents that begin in this shard
    max_id: int         # -1 where there are no tokens


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int | None = None) -> None:
    """Write tokens, integers of shape (n,), as a shard; an existing one is replaced. Folders are made as needed.

    Raises ValueError where an id is not below vocab_size (default 65,536), or on more than 2**31 - 1 tokens;
    UserError where the disk does not take it. In both cases whatever was at path is still there.
    """
    path, tokens, limit = Path(path), np.asarray(tokens), vocab_size or 2**16
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens of shape {tokens.shape} and type {tokens.dtype}, expected integers of shape (n,)")
    if len(tokens) > MAX_SHARD_TOKENS:
        raise ValueError(f"{len(tokens):,} tokens, expected at most {MAX_SHARD_TOKENS:,} in a shard")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < min(limit, 2**16):
        raise ValueError(f"token ids from {tokens.min()} to {tokens.max()}, expected 0 to {min(limit, 2**16) - 1}")
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # beside it: a rename can't cross filesystems
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(header.data)
            file.write(np.ascontiguousarray(tokens, "<u2").data)
        publish(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free the disk or choose another folder, "
                        "then repeat the command") from error
    finally:
        with suppress(OSError):  # gone already where it was renamed
            temporary.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file to its final name, its bytes on the disk first. Raises OSError."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())  # or a power cut could leave the name without the content
    os.replace(temporary, path)


class ShardWriter:
    """Cuts a stream of tokens into shards directory/prefix_split_%06d.bin, all of shard_tokens tokens but the last.

    As in the public FineWeb files, a document that does not fit goes on in the next shard, with no end-of-text token in
    between. Used in a `with` block: leaving it writes the last shard; leaving it by an exception writes nothing more.
    """

    def __init__(self, directory: str | Path, prefix: str, split: str, shard_tokens: int,
                 vocab_size: int | None = None):
        if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(f"shard_tokens is {shard_tokens:,}, expected 1 to {MAX_SHARD_TOKENS:,}")
        self.directory, self.prefix, self.split, self.vocab_size = Path(directory), prefix, split, vocab_size
        self.buffer = np.empty(shard_tokens, np.uint16)  # memory is taken as it fills
        self.filled = 0
        self.num_tokens = 0          # in all, the buffer's included
        self.paths: list[Path] = []  # of the shards written

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, uint16 of shape (n,). Raises what write_shard raises, and ValueError on another type."""
        if tokens.dtype != np.uint16:
            raise ValueError(f"tokens of type {tokens.dtype}, expected uint16")
        self.num_tokens += len(tokens)
        while len(tokens):
            part = tokens[:len(self.buffer) - self.filled]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part):]
            if self.filled == len(self.buffer):
                self._flush()

    def _flush(self) -> None:
        number = FIRST_NUMBER[self.split] + len(self.paths)
        path = self.directory / f"{self.prefix}_{self.split}_{number:06d}.bin"
        write_shard(path, self.buffer[:self.filled], self.vocab_size)
        self.paths.append(path)
        self.filled = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None and self.filled:
            self._flush()


def verify_shard(path: str | Path, vocab_size: int | None = None) -> ShardInfo:
    """Read a whole shard and count. Raises UserError on a bad header, a wrong size or an id not below vocab_size.

    The end-of-text token is the last of the vocabulary. Without vocab_size it is that of the track whose file this is,
    by its name and folder; or else of the smallest track's that has the ids.
    """
    tokens, place = open_shard(path), Path(path).absolute()
    chunks = [tokens[start:start + 2**24] for start in range(0, len(tokens), 2**24)]  # no copy: views of the file
    max_id = max((int(chunk.max()) for chunk in chunks), default=-1)
    if vocab_size is None:
        sizes = sorted(track.vocab_size for track in TRACKS.values())
        own = [track.vocab_size for track in TRACKS.values()
               if place.match(track.train_files) or place.match(track.val_files)]
        vocab_size = [*own, *(size for size in sizes if max_id < size), sizes[-1]][0]
    if max_id >= vocab_size:
        raise UserError(f"{path} holds token id {max_id}, expected ids below {vocab_size}; it was made with another "
                        "vocabulary (name its size with --vocab_size), or delete it and make it again")
    end_of_text = vocab_size - 1
    return ShardInfo(len(tokens), sum(int(np.count_nonzero(chunk == end_of_text)) for chunk in chunks), max_id)


def verify(paths: list[str], vocab_size: int | None) -> None:
    """Print a line for each shard. Raises UserError at the first bad one."""
    for path in paths:
        info = verify_shard(path, vocab_size)
        print(f"{path}: {info.num_tokens:,} tokens, {info.num_documents:,} documents, max id {info.max_id}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m data.shards`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.shards", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FILE", help="a .bin shard")
    parser.add_argument("--vocab_size", type=int, help="ids must lie below it (the track's of "
                        "that name, else the largest track's)")
    args = parser.parse_args(argv)
    return run_as_program(verify, args.paths, args.vocab_size)


if __name__ == "__main__":
    sys.exit(main())

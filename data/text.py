"""Tokenizes one's own text into shards.

    python -m data.text PATH... --name mine                    # data/mine/mine_{train,val}_*.bin, GPT-2 tokens
    python -m data.text PATH... --name mine --encoding bytes   # 256 bytes and the end-of-text token

A PATH is a file or a folder of them, taken in sorted order: .txt is one document in UTF-8, .jsonl has {"text": ...} a
line, .parquet a column "text" (needs pyarrow). Documents keep their order, each preceded by the end-of-text token;
empty ones are left out and counted. Which go to validation: the next document does whenever validation has less than
--val_fraction of the tokens so far. So the share is exact to one document, spread over the corpus and the same in every
run. A .txt file of more than 65,536 characters counts there as several documents, so that one long book gives both; no
GPT-2 token would cross the cuts. --processes does not change the result. Memory: two shards and some long documents.

The last lines printed are the track for TRACKS in train_gpt.py, where `--track mine` finds it.
"""
import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import escape
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.encoders import (
    ENCODINGS,
    READERS,
    Encoding,
    InputError,
    Piece,
    encode_texts,
    find_files,
    load_encoding,
    start_worker,
)

# train_gpt and data.shards are imported inside functions: each worker process imports this module, and torch with it
# would cost every worker 2 s and 200 MB.

BATCH = 2**18  # bytes of text that a worker gets at a time


def read_batches(files: list[Path], key: str, skip_bad: bool, count: Counter) -> Iterator[list[Piece]]:
    """All pieces of the files in order, in lists of about BATCH bytes; count is told of what is left out.

    Raises InputError on a file that can't be read, and on a bad document unless skip_bad.
    """
    def bad(problem: str) -> None:
        if not skip_bad:
            raise InputError(f"{problem}, or leave such documents out with --skip_bad")
        count["bad"] += 1

    batch, size = [], 0
    for path in files:
        try:
            for piece in READERS[path.suffix.lower()](path, key, bad):
                if piece.begins and not piece.text.strip():
                    count["empty"] += 1
                    continue
                batch.append(piece)
                size += piece.num_bytes
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        except (OSError, ValueError) as error:  # ValueError: not a parquet file
            raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if batch:
        yield batch


def encode_batches(batches: Iterable[list[Piece]], encoding: str, processes: int,
                   ) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Each batch with the uint16 ids of its pieces, in order. At most 2 * processes + 1 batches are held at a time."""
    if processes == 1:
        for batch in batches:
            yield batch, encode_texts(encoding, [piece.text for piece in batch])
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (encoding,))  # fork: unsafe with threads
    waiting: deque = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encode_texts, encoding, [piece.text for piece in batch])))
            if len(waiting) > 2 * processes:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise InputError("a worker process was killed, perhaps for lack of memory; use fewer --processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_corpus(files: list[Path], directory: Path, args: argparse.Namespace) -> str:
    """Tokenize files into shards in directory. Returns a line on what was written, and the track to paste.

    Raises InputError, UserError.
    """
    from data.shards import ShardWriter

    encoding, count, total_bytes = load_encoding(args.encoding), Counter(), sum(path.stat().st_size for path in files)
    end_of_text = np.array([encoding.end_of_text], np.uint16)
    batches = read_batches(files, args.text_key, args.skip_bad, count)
    last, last_line = None, time.monotonic()
    with (ShardWriter(directory, args.name, "train", args.shard_tokens, encoding.vocab_size) as train,
          ShardWriter(directory, args.name, "val", args.shard_tokens, encoding.vocab_size) as val,
          tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar):
        for pieces, ids in encode_batches(batches, args.encoding, args.processes):
            for piece, tokens in zip(pieces, ids, strict=True):
                writer = val if val.num_tokens < args.val_fraction * (train.num_tokens + val.num_tokens) else train
                if piece.begins or writer is not last:  # also where a document changes sides in the middle
                    writer.write(end_of_text)
                writer.write(tokens)
                last = writer
                count["documents"] += piece.begins
                count["bytes"] += piece.num_bytes
            bar.update(sum(piece.num_bytes for piece in pieces))
            if bar.disable and time.monotonic() - last_line > 10:  # no terminal, no bar
                print(f"tokenized {count['bytes'] / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB", flush=True)
                last_line = time.monotonic()
        if not val.num_tokens:
            raise InputError(f"the input has {count['documents']} documents with text, expected at least 2, or a .txt "
                             "file of more than 65,536 characters: one part trains, one validates; give more text")
    return (f"{train.num_tokens:,} tokens for training in {len(train.paths)} shards, {val.num_tokens:,} for "
            f"validation, {count['documents']:,} documents ({count['empty']:,} empty, {count['bad']:,} bad left out)\n"
            + track_to_paste(args, encoding, train.num_tokens, val.num_tokens))


def track_to_paste(args: argparse.Namespace, encoding: Encoding, train_tokens: int, val_tokens: int) -> str:
    """The lines for TRACKS in train_gpt.py that make the corpus a track, or what it lacks to be one.

    A track without rows of its own runs with the laptop's preset. So it validates on as many tokens as that, or on as
    many whole sequences as there are.
    """
    from train_gpt import ROOT, TRACKS, parse_arguments

    hp = parse_arguments(["--track", "laptop"])
    for split, given, least in (("training", train_tokens, hp.batch_size * hp.sequence_length),
                                ("validation", val_tokens, hp.val_length)):
        if given <= least:
            return (f"too little to train on: {given:,} tokens for {split}, expected more than {least:,}; give more "
                    "text, or another --val_fraction")
    val_tokens = min(TRACKS["laptop"].val_tokens, (val_tokens - 1) // hp.val_length * hp.val_length)
    folder = os.path.relpath(args.dir or ROOT / "data" / args.name, ROOT)
    train_files, val_files = (escape(f"{folder}/{args.name}_{split}_") + "*.bin" for split in ("train", "val"))
    words = ["python", "-m", "data.text", *map(str, args.paths), "--name", args.name, "--encoding", args.encoding]
    words[3:-4] = words[3:-4] if len(shlex.join(words)) < 88 else ["..."]  # the script has 100 columns
    return (f"to train on it, put these lines below `TRACKS = {{` in train_gpt.py, then: ./run.sh --track {args.name}\n"
            f"    {args.name!r}: Track({train_files!r},\n        {val_files!r},\n"
            f"        {val_tokens:_}, {encoding.vocab_size:_}, {encoding.end_of_text:_}, True, 0.0,  # the target\n"
            f"        {shlex.join(words)!r}),")


def check(args: argparse.Namespace, directory: Path) -> None:
    """Raises InputError where the command line can't be followed."""
    if Path(args.name).name != args.name:
        raise InputError(f"--name is {args.name!r}, expected a plain file name")
    if not (0 < args.val_fraction < 1 and 1 <= args.shard_tokens < 2**31 and args.processes >= 1):
        raise InputError(f"--val_fraction {args.val_fraction} --shard_tokens {args.shard_tokens} --processes "
                         f"{args.processes}: expected between 0 and 1, 1 to {2**31 - 1}, and at least 1")
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty, expected a new folder; choose another --name or --dir")


def build(args: argparse.Namespace) -> None:
    """Write the corpus that the command line asks for: all of it or nothing. Raises UserError."""
    from train_gpt import ROOT, UserError

    directory = (args.dir or ROOT / "data" / args.name).resolve()
    staging = None
    try:
        check(args, directory)
        files = find_files(args.paths)
        load_encoding(args.encoding)  # before anything is written, and before workers try it
        print(f"tokenizing {len(files):,} files into {directory}, {args.processes} processes", flush=True)
        staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
        staging.mkdir(parents=True)
        report = write_corpus(files, staging, args)
        os.replace(staging, directory)  # in one step: the shards of a broken-off run must not pass for a corpus
        print(f"{directory}: {report}")
    except InputError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}; use --dir") from error
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Command line of `python -m data.text`. Returns the exit code."""
    from train_gpt import run_as_program

    parser = argparse.ArgumentParser(prog="python -m data.text", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a file or a folder of text")
    parser.add_argument("--name", required=True, help="of the corpus: folder and first part of the file names")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="(gpt2)")
    parser.add_argument("--text_key", default="text", help="where .jsonl and .parquet have the text (text)")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="share of the tokens for validation (0.01)")
    parser.add_argument("--shard_tokens", type=int, default=10**8, help="tokens a shard (100000000)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(all cores)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out what is not UTF-8 or not JSON, and count it")
    parser.add_argument("--dir", type=Path, help="folder for the shards (data/NAME)")
    return run_as_program(build, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

"""Tokenizes your own text into shards.

    python -m data.text PATH... --name mine                     # data/mine/mine_{train,val}_*.bin
    python -m data.text PATH... --name mine --encoding bytes    # bytes instead of GPT-2 tokens

A PATH is a file, or a folder whose files are taken in sorted order. A .txt file is one document in
UTF-8. A .jsonl file has one document per line, {"text": "..."}. A .parquet file has one document
per row in its column "text" (this needs pyarrow). Documents keep their order, and each one is
preceded by the end-of-text token. Empty documents are left out and counted.

The next document goes to the validation set whenever that set has less than --val_fraction of the
tokens so far. So the validation set is spread over the corpus, and it is the same in every run. For
this purpose each 65,536 characters of a .txt file count as a document, so that one long book gives
both sets. The result does not depend on --processes. Memory holds two shards and a few batches.

At the end the command prints the lines that make the corpus a track of train_gpt.py.
"""
import argparse
import os
import shlex
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from glob import escape
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import DATA_FOLDER, UserError, run_as_program, usable_cores
from data.documents import READERS, Piece, find_files
from data.encoders import ENCODINGS, Encoding, encode_texts, load_encoding, start_worker
from data.shards import ShardWriter

BATCH = 2**18  # bytes of text that a worker process gets at a time

# A track without settings of its own takes the laptop track's, where a step reads STEP_TOKENS and
# validation reads sequences of VAL_LENGTH, MAX_VAL_TOKENS in all.
STEP_TOKENS = 8 * 256
VAL_LENGTH = 2048
MAX_VAL_TOKENS = 262_144


def read_batches(files: list[Path], key: str, skip_bad: bool,
                 count: Counter) -> Iterator[list[Piece]]:
    """Yield the pieces of all files in order, in lists of about BATCH bytes.

    count["empty"] and count["bad"] count the documents that are left out. Raises UserError if a
    file cannot be read, and on a bad document unless skip_bad is set.
    """
    def bad(problem: str) -> None:
        if not skip_bad:
            raise UserError(f"{problem}, or leave such documents out with --skip_bad")
        count["bad"] += 1

    batch = []
    batch_bytes = 0
    for path in files:
        read = READERS[path.suffix.lower()]
        try:
            for piece in read(path, key, bad):
                if piece.begins and not piece.text.strip():
                    count["empty"] += 1
                    continue
                batch.append(piece)
                batch_bytes += piece.num_bytes
                if batch_bytes >= BATCH:
                    yield batch
                    batch = []
                    batch_bytes = 0
        except (OSError, ValueError) as error:  # ValueError: a damaged parquet file
            raise UserError(f"cannot read {path}: {error}") from error
    if batch:
        yield batch


def encode_batches(batches: Iterable[list[Piece]], encoding: str,
                   processes: int) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Yield each batch with the (n,) uint16 ids of its pieces, in order.

    At most 2 * processes + 1 batches are in memory at a time. Raises UserError if a worker dies.
    """
    if processes == 1:
        for batch in batches:
            yield batch, encode_texts(encoding, [piece.text for piece in batch])
        return
    # Not a fork, which is unsafe in a process with threads.
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"),
                               initializer=start_worker, initargs=(encoding,))
    pending = deque()  # (batch, future of its ids)
    try:
        for batch in batches:
            texts = [piece.text for piece in batch]
            pending.append((batch, pool.submit(encode_texts, encoding, texts)))
            if len(pending) > 2 * processes:
                first_batch, future = pending.popleft()
                yield first_batch, future.result()
        for batch, future in pending:
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps because the memory was full; use "
                        "fewer --processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_corpus(files: list[Path], directory: Path, args: argparse.Namespace) -> str:
    """Tokenize files into shards in directory. Returns a report with the track to paste.

    Raises UserError.
    """
    encoding = load_encoding(args.encoding)
    end_of_text = np.array([encoding.end_of_text], np.uint16)
    total_bytes = sum(path.stat().st_size for path in files)
    count = Counter()
    batches = read_batches(files, args.text_key, args.skip_bad, count)
    last_writer = None
    train = ShardWriter(directory, args.name, "train", args.shard_tokens, encoding.vocab_size)
    val = ShardWriter(directory, args.name, "val", args.shard_tokens, encoding.vocab_size)
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with train, val, bar:
        for pieces, ids in encode_batches(batches, args.encoding, args.processes):
            for piece, tokens in zip(pieces, ids, strict=True):
                num_tokens = train.num_tokens + val.num_tokens
                writer = val if val.num_tokens < args.val_fraction * num_tokens else train
                # A document that changes sides in the middle begins anew there.
                if piece.begins or writer is not last_writer:
                    writer.write(end_of_text)
                writer.write(tokens)
                last_writer = writer
                if piece.begins:
                    count["documents"] += 1
                bar.update(piece.num_bytes)
        if val.num_tokens == 0:
            raise UserError(f"the input has {count['documents']} documents with text, which leaves "
                            "none to validate on; expected at least 2, or a .txt file of more than "
                            "65,536 characters")
    report = (f"{train.num_tokens:,} tokens in {len(train.paths)} training shards, "
              f"{val.num_tokens:,} validation tokens, {count['documents']:,} documents "
              f"({count['empty']:,} empty and {count['bad']:,} bad ones left out)")
    return f"{report}\n{track_to_paste(args, encoding, train.num_tokens, val.num_tokens)}"


def track_to_paste(args: argparse.Namespace, encoding: Encoding, train_tokens: int,
                   val_tokens: int) -> str:
    """Return the lines that make the corpus a track, or a sentence that says what it lacks.

    The track validates on as many tokens as the laptop track, or on as many complete sequences as
    there are.
    """
    for split, found, needed in (("training", train_tokens, STEP_TOKENS),
                                 ("validation", val_tokens, VAL_LENGTH)):
        if found <= needed:
            return (f"this is too little to train on: {found:,} {split} tokens, expected more than "
                    f"{needed:,}; use more text, or another --val_fraction")
    # The target of the last token is one token further on.
    val_tokens = min(MAX_VAL_TOKENS, (val_tokens - 1) // VAL_LENGTH * VAL_LENGTH)
    folder = os.path.relpath(args.dir or DATA_FOLDER / args.name, DATA_FOLDER.parent)
    prefix = escape(f"{folder}/{args.name}")
    paths = [str(path) for path in args.paths]
    command = ["python", "-m", "data.text", *paths, "--name", args.name,
               "--encoding", args.encoding]
    if len(shlex.join(command)) > 80:  # the lines of the script should not be longer than 100
        command[3:3 + len(paths)] = ["..."]
    return "\n".join([
        "to train on it, paste these lines below `TRACKS = {` in train_gpt.py, then run: "
        f"./run.sh --track {args.name}",
        f"    {args.name!r}: Track(",
        f"        train_files={prefix + '_train_*.bin'!r},",
        f"        val_files={prefix + '_val_*.bin'!r},",
        f"        val_tokens={val_tokens:_},",
        f"        vocab_size={encoding.vocab_size:_},",
        f"        eot_token={encoding.end_of_text:_},",
        "        shuffled=True,",
        "        target=0.0,",
        f"        get_data={shlex.join(command)!r}),"])


def check(args: argparse.Namespace, directory: Path) -> None:
    """Raises UserError if the command line cannot be carried out."""
    if Path(args.name).name != args.name:
        raise UserError(f"--name is {args.name!r}, expected a plain file name")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction is {args.val_fraction}, expected a number between 0 and 1")
    if not 1 <= args.shard_tokens < 2**31:
        raise UserError(f"--shard_tokens is {args.shard_tokens}, expected 1 to {2**31 - 1}")
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}, expected at least 1")
    if directory.is_dir() and any(directory.glob("*.bin")):
        raise UserError(f"{directory} already has shards; choose another --name or --dir, or "
                        "delete them")


def build(args: argparse.Namespace) -> None:
    """Write the corpus that the command line asks for, or nothing at all. Raises UserError."""
    directory = (args.dir or DATA_FOLDER / args.name).resolve()
    check(args, directory)
    files = find_files(args.paths)
    load_encoding(args.encoding)  # a missing vocabulary should be reported before the work begins
    processes = "1 process" if args.processes == 1 else f"{args.processes} processes"
    print(f"tokenizing {len(files):,} files into {directory} with {processes}", flush=True)

    is_new = not directory.exists()
    # Inside the final folder, which may be a mount point: a rename cannot cross file systems.
    unfinished = directory / f".unfinished-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        report = write_corpus(files, unfinished, args)
        # The validation shards come last: without them a folder does not pass for a corpus.
        for path in sorted(unfinished.iterdir()):
            os.replace(path, directory / path.name)
        print(f"{directory}: {report}")
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}; free disk space or "
                        "choose another folder with --dir") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it stays if it has shards
                directory.rmdir()


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m data.text`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.text", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH",
                        help="a text file, or a folder with text files")
    parser.add_argument("--name", required=True,
                        help="name of the corpus: its folder, and the beginning of its file names")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="(%(default)s)")
    parser.add_argument("--text_key", default="text",
                        help="where .jsonl and .parquet files have the text (%(default)s)")
    parser.add_argument("--val_fraction", type=float, default=0.01,
                        help="fraction of the tokens for validation (%(default)s)")
    parser.add_argument("--shard_tokens", type=int, default=10**8,
                        help="tokens per shard (%(default)s)")
    parser.add_argument("--processes", type=int, default=usable_cores(),
                        help="(as many as this process has cores: %(default)s)")
    parser.add_argument("--skip_bad", action="store_true",
                        help="leave out and count documents that are not UTF-8 or not JSON")
    parser.add_argument("--dir", type=Path, help="folder for the shards (data/NAME)")
    return run_as_program(build, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

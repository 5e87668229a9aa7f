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

At the end the command prints the lines that make the corpus a track of train_gpt.py. For a corpus
that exists it prints them again, and builds nothing.
"""
import argparse
import os
import shlex
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from glob import escape
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from tqdm import tqdm

from data import DATA_FOLDER, UserError, path_argument, run_as_program, say, usable_cores
from data.documents import READERS, Bad, Piece, find_files
from data.encoders import (
    ENCODINGS,
    VOCAB_SIZES,
    VOCABULARIES,
    encode_texts,
    load_encoding,
    start_worker,
)
from data.fineweb import VARIANTS
from data.shards import UNFINISHED, ShardWriter, make_folder, name_leftovers, open_shard

# Names of tracks and folders that train_gpt.py and other commands have for themselves.
TAKEN_NAMES = ["laptop", "fineweb", *(variant.folder for variant in VARIANTS.values())]

BATCH = 2**18  # bytes of text that a worker process gets at a time

# A track without settings of its own takes the laptop track's, where a step reads STEP_TOKENS and
# validation reads sequences of VAL_LENGTH, MAX_VAL_TOKENS in all.
STEP_TOKENS = 8 * 256
VAL_LENGTH = 2048
MAX_VAL_TOKENS = 262_144


def read_batches(files: list[Path], key: str, bad: Bad,
                 count: Counter) -> Iterator[list[Piece]]:
    """Yield the pieces of all files in order, in lists of about BATCH bytes.

    count["empty"] counts the documents that are left out. `bad` gets a description of each document
    that cannot be read, and of each file whose rest cannot be read.
    """
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
        # a damaged parquet file, or one with a type or a compression that pyarrow cannot read
        except (OSError, ValueError, TypeError, NotImplementedError) as error:
            bad(f"cannot read {path} ({error}); replace it")
    if batch:
        yield batch


def encode_batches(batches: Iterable[list[Piece]], encoding: str,
                   processes: int) -> Iterator[tuple[list[Piece], list[np.ndarray | str]]]:
    """Yield each batch with what encode_texts returns for its pieces, in order.

    At most 2 * processes + 1 batches are in memory at a time. Raises UserError if a worker dies.
    """
    if processes == 1:
        for batch in batches:
            yield batch, encode_texts(encoding, [piece.text for piece in batch])
        return
    with terminal_signals_blocked():
        # Not a fork, which is unsafe in a process with threads.
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"),
                                   initializer=start_worker, initargs=(encoding,))
    pending = deque()  # (batch, future of its ids)
    try:
        for batch in batches:
            texts = [piece.text for piece in batch]
            with terminal_signals_blocked():
                pending.append((batch, pool.submit(encode_texts, encoding, texts)))
            if len(pending) > 2 * processes:
                yield pending[0][0], pending[0][1].result()
                pending.popleft()
        while pending:
            yield pending[0][0], pending[0][1].result()
            pending.popleft()
    except BrokenProcessPool as error:
        place = f" near {pending[0][0][0].where}" if pending else ""
        raise UserError(f"a worker process was killed{place}, perhaps because the memory was full; "
                        "use fewer --processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """Leave Ctrl-C and SIGHUP to this process: those that it starts meanwhile never get them.

    A terminal sends them to all of its processes.
    """
    signals = [signal.SIGINT, signal.SIGHUP]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def write_corpus(files: list[Path], directory: Path, args: argparse.Namespace) -> str:
    """Tokenize files into shards in directory. Returns a report with the track to paste.

    Raises UserError.
    """
    def bad(problem: str) -> None:
        if not args.skip_bad:
            raise UserError(f"{problem}, or leave such documents out with --skip_bad")
        count["bad"] += 1

    vocab_size = VOCAB_SIZES[args.encoding]
    end_of_text = np.array([vocab_size - 1], np.uint16)
    total_bytes = sum(path.stat().st_size for path in files)
    count = Counter()
    batches = read_batches(files, args.text_key, bad, count)
    last_writer = None
    train = ShardWriter(directory, args.name, "train", args.shard_tokens, vocab_size)
    val = ShardWriter(directory, args.name, "val", args.shard_tokens, vocab_size)
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with train, val, bar:
        for pieces, results in encode_batches(batches, args.encoding, args.processes):
            for piece, tokens in zip(pieces, results, strict=True):
                if isinstance(tokens, str):
                    bad(f"{piece.where} cannot be tokenized ({tokens}); change the text")
                    last_writer = None  # what follows is no continuation
                    continue
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
            raise UserError(f"the input has {documents_of(count)}, which leaves none to validate "
                            "on; expected at least 2, or a .txt file of more than 65,536 "
                            "characters")
    report = (f"{train.num_tokens:,} tokens in {len(train.paths)} training shards, "
              f"{val.num_tokens:,} validation tokens, {documents_of(count)}")
    return f"{report}\n{track_to_paste(args, train.num_tokens, val.num_tokens)}"


def documents_of(count: Counter) -> str:
    """Return how many documents were taken and left out."""
    return (f"{count['documents']:,} documents ({count['empty']:,} empty and {count['bad']:,} bad "
            "ones left out)")


def track_of_shards(args: argparse.Namespace, directory: Path) -> str | None:
    """Return track_to_paste of a corpus that was built before; None if it has none of its shards.

    Raises UserError if a shard is damaged.
    """
    num_tokens = []
    for split in ("train", "val"):
        paths = sorted(directory.glob(f"{escape(args.name)}_{split}_*.bin"))
        if not paths:
            return None
        num_tokens.append(sum(len(open_shard(path)) for path in paths))
        # Each split begins with the end-of-text token, which tells the encoding.
        for encoding, vocab_size in VOCAB_SIZES.items():
            if open_shard(paths[0])[:1].tolist() == [vocab_size - 1]:
                args.encoding = encoding
    return track_to_paste(args, *num_tokens)


def track_to_paste(args: argparse.Namespace, train_tokens: int, val_tokens: int) -> str:
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
    folder = f"data/{args.name}"
    place = []
    if args.dir:
        folder = os.path.relpath(os.path.realpath(args.dir), DATA_FOLDER.parent)
        place = ["--dir", str(args.dir)]
    vocab_size = VOCAB_SIZES[args.encoding]
    prefix = escape(f"{folder}/{args.name}")
    paths = [str(path) for path in args.paths]
    command = ["python", "-m", "data.text", *paths, "--name", args.name,
               "--encoding", args.encoding, *place]
    if len(shlex.join(command)) > 80:  # the lines of the script should not be longer than 100
        command[3:3 + len(paths)] = ["..."]
    return "\n".join([
        "to train on it, paste these lines below `TRACKS = {` in train_gpt.py, then run: "
        f"./run.sh --track {shlex.quote(args.name)}",
        f"    {args.name!r}: Track(",
        f"        train_files={prefix + '_train_*.bin'!r},",
        f"        val_files={prefix + '_val_*.bin'!r},",
        f"        val_tokens={val_tokens:_},",
        f"        vocabulary={VOCABULARIES[args.encoding]!r},",
        f"        vocab_size={vocab_size:_},",
        f"        eot_token={vocab_size - 1:_},",
        "        shuffled=True,",
        "        target=0.0,",
        f"        get_data={shlex.join(command)!r}),"])


def check(args: argparse.Namespace) -> None:
    """Raises UserError if the command line cannot be carried out."""
    plain = args.name.isprintable() and "/" not in args.name and args.name[:1] not in ("", ".", "-")
    if not plain:
        raise UserError(f"--name is {args.name!r}, expected the name of a new folder, such as mine")
    if args.name in TAKEN_NAMES:
        raise UserError(f"--name is {args.name!r}, which this project uses itself; choose another")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction is {args.val_fraction}, expected a number between 0 and 1")
    if not 1 <= args.shard_tokens < 2**31:
        raise UserError(f"--shard_tokens is {args.shard_tokens}, expected 1 to {2**31 - 1}")
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}, expected at least 1")


def build(args: argparse.Namespace) -> None:
    """Write the corpus that the command line asks for, or nothing at all. Raises UserError."""
    check(args)
    directory = Path(os.path.realpath(args.dir or DATA_FOLDER / args.name))
    if has_shards(directory):
        track = track_of_shards(args, directory)
        if track:
            say(track)
        raise UserError(f"{directory} already has shards; choose another --name or --dir, or "
                        "delete them")
    files = find_files(args.paths)
    load_encoding(args.encoding)  # a missing vocabulary should be reported before the work begins
    name_leftovers(directory)
    processes = "1 process" if args.processes == 1 else f"{args.processes} processes"
    say(f"tokenizing {len(files):,} files into {directory} with {processes}")

    is_new = not directory.exists()
    try:
        make_folder(directory)
        unfinished = Path(mkdtemp(prefix=UNFINISHED, dir=directory))
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}; choose another folder with "
                        "--dir") from error
    try:
        report = write_corpus(files, unfinished, args)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                directory.rmdir()
        raise
    move_shards(unfinished, directory)
    say(f"{directory}: {report}")


def has_shards(directory: Path) -> bool:
    """Whether a folder exists and has shards, of whatever name."""
    return any(directory.glob("*.bin"))


def move_shards(unfinished: Path, directory: Path) -> None:
    """Move a finished corpus to its folder. Raises UserError; what is not moved stays."""
    try:
        if has_shards(directory):
            raise FileExistsError(0, "another command has written shards into it")
        # The validation shards come last: without them a folder does not pass for a corpus.
        for path in sorted(unfinished.iterdir()):
            os.replace(path, directory / path.name)
        unfinished.rmdir()
    except OSError as error:
        raise UserError(f"the shards are finished, but cannot be moved to {directory}: "
                        f"{error.strerror}; they are kept in {unfinished}: move them") from error


def command(argv: list[str] | None) -> None:
    """Build the corpus that the command line asks for. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m data.text", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=path_argument, metavar="PATH",
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
                        help="leave out and count what is not UTF-8, not JSON, damaged, or more "
                             "than the encoding can take")
    parser.add_argument("--dir", type=path_argument, help="folder for the shards (data/NAME)")
    build(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m data.text`. Returns the exit code."""
    return run_as_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())

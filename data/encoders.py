"""Documents and their token ids, without torch: all that the worker processes of data.text need of the project."""
import codecs
import json
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 2**16  # characters of a .txt file after which it is cut


class InputError(Exception):
    """Text that can't be tokenized, for a reason the user can mend: data.text shows it as one line."""


class Encoding(NamedTuple):
    """A vocabulary."""
    encode: Callable[[str], np.ndarray]  # a text to uint16 ids of shape (n,), none of them end_of_text
    end_of_text: int                     # the id that stands before each document
    vocab_size: int                      # ids lie below it


def _bytes() -> Encoding:
    def encode(text: str) -> np.ndarray:
        # JSON can carry half of a surrogate pair, which UTF-8 can't: it becomes "?"
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)
    return Encoding(encode, end_of_text=256, vocab_size=257)


def _gpt2() -> Encoding:
    try:
        import tiktoken
        gpt2 = tiktoken.get_encoding("gpt2")
    except ImportError as error:
        raise InputError("tiktoken is not installed: pip install -r requirements.txt") from error
    except (OSError, ValueError) as error:  # all network errors of requests are OSErrors; ValueError: a wrong hash
        raise InputError(f"GPT-2's vocabulary is not on this machine and can't be downloaded ({type(error).__name__}); "
                         "run once with a network, set TIKTOKEN_CACHE_DIR to a folder that holds it, or use "
                         "--encoding bytes") from error
    # encode_ordinary: the characters "<|endoftext|>" in a text are text, not the end of a document
    return Encoding(lambda text: np.array(gpt2.encode_ordinary(text), np.uint16), gpt2.eot_token, gpt2.n_vocab)


ENCODINGS = {"gpt2": _gpt2, "bytes": _bytes}


@lru_cache
def load_encoding(name: str) -> Encoding:
    """The encoding of that name in ENCODINGS, loaded once a process. Raises InputError if it can't be."""
    return ENCODINGS[name]()


def start_worker(encoding: str) -> None:
    """First call in a worker process: load the vocabulary once, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_encoding(encoding)


def encode_texts(encoding: str, texts: list[str]) -> list[np.ndarray]:
    """The uint16 ids of each text, without end-of-text tokens."""
    return [load_encoding(encoding).encode(text) for text in texts]


class Piece(NamedTuple):
    """A document, or a part of one."""
    text: str
    begins: bool    # a document
    num_bytes: int  # of the file, for the progress


def cut_blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """Join chunks and cut the text again, into blocks of about size characters that are tokenized alike alone.

    A cut lies before a white space that follows something else. There every piece of GPT-2's splitting pattern ends:
    none of them goes from a visible character to white space. So the tokens of the blocks are those of the whole.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        last = range(len(text) - 1, max(0, len(text) - size), -1) if len(text) >= size else ()
        cut = next((i for i in last if text[i] in " \n\r\t" and not text[i - 1].isspace()), 0)
        if cut:
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def read_txt(path: Path, key: str, bad: Callable[[str], None]) -> Iterator[Piece]:
    """One document, in blocks. The whole file is decoded first, so that a bad one gives nothing."""
    def chunks(decoder) -> Iterator[str]:
        with open(path, "rb") as file:
            while chunk := file.read(BLOCK):
                yield decoder.decode(chunk)
            yield decoder.decode(b"", True)

    utf8 = codecs.getincrementaldecoder("utf-8-sig")  # drops the mark that some editors put first
    try:
        deque(chunks(utf8()), maxlen=0)
    except UnicodeDecodeError as error:
        return bad(f"{path} is not UTF-8 ({error.reason}); convert it with iconv")
    begins = True
    for block in cut_blocks(chunks(utf8())):
        yield Piece(block, begins, len(block.encode()))
        begins = False
    if begins:
        yield Piece("", True, 0)


def read_jsonl(path: Path, key: str, bad: Callable[[str], None]) -> Iterator[Piece]:
    """One document a line; blank lines are passed over."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[key]
                problem = "" if isinstance(text, str) else f'"{key}" is no string'
            except (ValueError, KeyError, TypeError, RecursionError) as error:  # bad JSON or UTF-8, no key, no object
                problem = f"{type(error).__name__}: {error}"
            if problem:
                bad(f'{path}:{number} is no JSON object with a string "{key}" ({problem}); mend it or set --text_key')
            else:
                yield Piece(text, True, len(line))


def read_parquet(path: Path, key: str, bad: Callable[[str], None]) -> Iterator[Piece]:
    """One document a row."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow, which is not installed: pip install pyarrow") from error
    with parquet.ParquetFile(path) as file:
        if key not in file.schema_arrow.names:
            raise InputError(f'{path} has no column "{key}"; set --text_key to one of {file.schema_arrow.names}')
        row_bytes, row = max(1, path.stat().st_size // max(1, file.metadata.num_rows)), 0
        for batch in file.iter_batches(batch_size=1024, columns=[key]):
            for text in batch.column(0).to_pylist():
                row += 1
                if isinstance(text, str):
                    yield Piece(text, True, row_bytes)
                else:
                    bad(f'{path}, row {row}: "{key}" is no string')


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def find_files(paths: list[Path]) -> list[Path]:
    """The files among paths and, sorted, below the folders among them. Raises InputError where a path gives none."""
    files: list[Path] = []
    for path in paths:
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in candidates if file.suffix.lower() in READERS and file.is_file()]
        if not found:
            problem = "is no text file and holds none" if path.exists() else "does not exist"
            raise InputError(f"{path} {problem}; expected {', '.join(READERS)} files or a folder of them")
        files += found
    return list(dict.fromkeys(files))

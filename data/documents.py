"""Finds text files and reads the documents in them: .txt, .jsonl, .parquet."""
import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import UserError, say

BLOCK = 2**16  # characters after which a .txt file is cut

# UTF-16 and UTF-32 without a byte order mark are often valid UTF-8, with NUL characters.
HAS_NUL = "contains NUL characters, so it is probably UTF-16, UTF-32 or not text at all"

# Where a text may be cut, in order of preference: before white space that follows a visible
# character, and after a letter or digit that something else follows. Every match of GPT-2's
# splitting pattern ends there, so the tokens stay the same.
CUTS = (re.compile(r"(?s).*\S(?=[ \n\r\t])"), re.compile(r"(?s).*[^\W_](?=[\W_])"))


class Piece(NamedTuple):
    """A document, or a part of one."""
    text: str
    begins: bool    # whether a document begins here
    num_bytes: int  # size in the file, for the progress bar
    where: str      # file, and line or row, for messages


# A reader yields the pieces of a file in order. It calls `bad` with a description of each document
# that cannot be read; what `bad` raises ends it, otherwise it continues with the next document.
Bad = Callable[[str], None]


def find_files(paths: list[Path]) -> list[Path]:
    """Return the files among paths and, sorted, all text files below the folders among them.

    Links are followed, and a file that is reached twice is returned once. Raises UserError if a
    path gives no file, or if something cannot be read.
    """
    files = {}  # resolved path to path
    num_others = 0
    for path in paths:
        found = False
        try:
            candidates = sorted(files_below(path)) if path.is_dir() else [path]
            for file in candidates:
                if not file.is_file():
                    say_why_left_out(file)
                elif file.suffix.lower() not in READERS:
                    num_others += 1
                else:
                    open(file, "rb").close()  # to fail now, and not after hours of work
                    if file.suffix.lower() == ".parquet":
                        load_parquet(file)
                    files.setdefault(file.resolve(), file)
                    found = True
            problem = "has no text files" if path.exists() else "does not exist"
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        if not found:
            raise UserError(f"{path} {problem}; expected files that end in {', '.join(READERS)}, "
                            "or a folder with such files")
    if num_others:
        say(f"left out {num_others:,} files that do not end in {', '.join(READERS)}")
    return list(files.values())


def say_why_left_out(path: Path) -> None:
    """Name a link that leads nowhere, a pipe, a socket or a device."""
    if path.exists():
        say(f"left out {path}: it is not a regular file")
    elif path.is_symlink():
        say(f"left out {path}: the link leads nowhere")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder that is not a folder. Each folder is visited once.

    Links to folders are followed last, so that they name only what lies nowhere else. Raises
    OSError if a folder cannot be read.
    """
    def fail(error: OSError):
        raise error

    visited = set()
    tops = [folder]
    for top in tops:  # which grows
        for here, folders, files in os.walk(top, onerror=fail):
            resolved = os.path.realpath(here)
            if resolved in visited:  # a link to a folder above would lead in circles
                folders.clear()
                continue
            visited.add(resolved)
            folders.sort()
            below = [Path(here, name) for name in folders]
            tops += [path for path in below if path.is_symlink()]
            yield from (Path(here, name) for name in files)


def cut_blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """Join chunks of text and cut them into blocks of about `size` characters."""
    text = ""
    for chunk in chunks:
        text += chunk
        if len(text) >= size:
            cut = last_cut(text, size)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def last_cut(text: str, size: int) -> int:
    """Return the last position in the last `size` characters where text may be cut.

    That is the end if there is no such position, as in a million equal letters.
    """
    for pattern in CUTS:
        match = pattern.match(text, max(0, len(text) - size))
        if match:
            return match.end()
    return len(text)


def decoded(path: Path) -> Iterator[str]:
    """Yield a UTF-8 file in chunks of text, without a byte order mark.

    Raises UnicodeDecodeError if it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        while chunk := file.read(BLOCK):
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)


def read_txt(path: Path, key: str, bad: Bad) -> Iterator[Piece]:
    """The file is one document, which comes in blocks. `key` is not used."""
    # The whole file is decoded first, so that a bad one yields nothing.
    try:
        has_nul = any("\0" in chunk for chunk in decoded(path))
    except UnicodeDecodeError as error:
        bad(f"{path} is not UTF-8 ({error.reason}); convert it with iconv")
        return
    if has_nul:
        bad(f"{path} {HAS_NUL}; convert it with iconv")
        return
    begins = True
    blank = ""  # white space at the beginning goes with the first block that has more
    for block in cut_blocks(decoded(path)):
        if begins and not block.strip():
            blank += block
            continue
        yield Piece(blank + block, begins, len(block.encode()), str(path))
        begins = False
        blank = ""
    if begins:  # an empty document is counted, too
        yield Piece("", True, 0, str(path))


def read_jsonl(path: Path, key: str, bad: Bad) -> Iterator[Piece]:
    """Each line is an object whose `key` holds one document. Blank lines are skipped."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            problem = None
            try:
                text = json.loads(line.decode("utf-8-sig"))[key]
                if not isinstance(text, str):
                    problem = f'"{key}" is not a string'
            # bad JSON or UTF-8, no such key, not an object, nested too deeply
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                problem = f"{type(error).__name__}: {error}"
                if b"\0" in line:
                    problem = f"it {HAS_NUL}"
            if problem is None:
                yield Piece(text, True, len(line), where)
            else:
                bad(f'{where} is not a JSON object with a string "{key}" ({problem}); '
                    "correct it or set --text_key")


def load_parquet(path: Path):
    """Return pyarrow's module for parquet files. Raises UserError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow, which is not installed: "
                        "pip install pyarrow") from error
    return parquet


def read_parquet(path: Path, key: str, bad: Bad) -> Iterator[Piece]:
    """Each row has one document in the column `key`."""
    parquet = load_parquet(path)
    with parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if key not in columns:
            bad(f'{path} has no column "{key}"; set --text_key to one of {columns}')
            return
        bytes_per_row = max(1, path.stat().st_size // max(1, file.metadata.num_rows))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[key]):
            for value in batch.column(0):
                number += 1
                where = f"{path}, row {number}"
                try:
                    text = value.as_py()
                except ValueError:  # not UTF-8
                    text = None
                if isinstance(text, str):
                    yield Piece(text, True, bytes_per_row, where)
                else:
                    bad(f'{where}: "{key}" is not a string of UTF-8')


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}

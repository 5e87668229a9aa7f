"""Finds text files and reads the documents in them: .txt, .jsonl, .parquet."""
import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import UserError

BLOCK = 2**16  # characters after which a .txt file is cut
CUT_BEFORE = " \n\r\t"


class Piece(NamedTuple):
    """A document, or a part of one."""
    text: str
    begins: bool    # whether a document begins here
    num_bytes: int  # size in the file, for the progress bar


# A reader yields the pieces of a file in order. It calls `bad` with a description of each document
# that cannot be read; what `bad` raises ends it, otherwise it continues with the next document.
Bad = Callable[[str], None]


def find_files(paths: list[Path]) -> list[Path]:
    """Return the files among paths and, sorted, all text files below the folders among them.

    Links are followed, and a file that is reached twice is returned once. Raises UserError if a
    path gives no file, or if a folder cannot be read.
    """
    files = {}  # resolved path to path
    num_others = 0
    for path in paths:
        candidates = sorted(files_below(path, set())) if path.is_dir() else [path]
        found = False
        for file in candidates:
            if file.suffix.lower() not in READERS:
                num_others += 1
                continue
            if file.is_file():
                files.setdefault(file.resolve(), file)
                found = True
            elif file.is_symlink():
                print(f"left out {file}: the link leads nowhere")
        if not found:
            problem = "has no text files" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}; expected files that end in {', '.join(READERS)}, "
                            "or a folder with such files")
    if num_others:
        print(f"left out {num_others:,} files that do not end in {', '.join(READERS)}")
    return list(files.values())


def files_below(folder: Path, visited: set[Path]) -> Iterator[Path]:
    """Yield all files below a folder, and links that lead nowhere. Each folder is visited once."""
    resolved = folder.resolve()
    if resolved in visited:  # a link to a folder above would lead in circles
        return
    visited.add(resolved)
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir():
            yield from files_below(entry, visited)
        else:
            yield entry


def cut_blocks(chunks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """Join chunks of text and cut them into blocks of about `size` characters.

    A cut lies before white space that follows a visible character. Every match of GPT-2's splitting
    pattern ends there, so the tokens of the blocks are those of the whole text.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        cut = last_cut(text, size) if len(text) >= size else 0
        if cut:
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def last_cut(text: str, size: int) -> int:
    """Return the last position in the last `size` characters where text may be cut; 0: nowhere."""
    for i in range(len(text) - 1, max(0, len(text) - size), -1):
        if text[i] in CUT_BEFORE and not text[i - 1].isspace():
            return i
    return 0


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
    if has_nul:  # UTF-16 without a byte order mark is often valid UTF-8, with NULs
        bad(f"{path} contains NUL characters, so it is probably UTF-16 or not text at all; convert "
            "it with iconv")
        return
    begins = True
    for block in cut_blocks(decoded(path)):
        yield Piece(block, begins, len(block.encode()))
        begins = False
    if begins:  # an empty document is counted, too
        yield Piece("", True, 0)


def read_jsonl(path: Path, key: str, bad: Bad) -> Iterator[Piece]:
    """Each line is an object whose `key` holds one document. Blank lines are skipped."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            problem = None
            try:
                text = json.loads(line)[key]
                if not isinstance(text, str):
                    problem = f'"{key}" is not a string'
            # bad JSON or UTF-8, no such key, not an object, nested too deeply
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is None:
                yield Piece(text, True, len(line))
            else:
                bad(f'{path}:{number} is not a JSON object with a string "{key}" ({problem}); '
                    "correct it or set --text_key")


def read_parquet(path: Path, key: str, bad: Bad) -> Iterator[Piece]:
    """Each row has one document in the column `key`."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow, which is not installed: "
                        "pip install pyarrow") from error
    with parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        if key not in columns:
            raise UserError(f'{path} has no column "{key}"; set --text_key to one of {columns}')
        bytes_per_row = max(1, path.stat().st_size // max(1, file.metadata.num_rows))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[key]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield Piece(text, True, bytes_per_row)
                else:
                    bad(f'{path}, row {number}: "{key}" is not a string')


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}

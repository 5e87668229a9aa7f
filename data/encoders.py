"""Encodings of text: bytes and GPT-2 tokens.

Worker processes of data.text import this module, so it imports little.
"""
import re
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data import UserError
from data.shards import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE

# What the regular expressions of tiktoken call \s. Python's \s has other characters, too.
WHITE_SPACE = r"[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"

# tiktoken fails at about a million white-space characters in a row, so longer runs than this are
# cut. The lookbehind makes the search linear: it tries each run only from its beginning.
LONG_WHITE_SPACE = re.compile(rf"(?<!{WHITE_SPACE}){WHITE_SPACE}{{10000,}}")


class Encoding(NamedTuple):
    """A vocabulary and the function that encodes with it."""
    encode: Callable[[str], np.ndarray]  # a text to (n,) uint16 ids, none of them end_of_text
    end_of_text: int                     # id that precedes each document
    vocab_size: int                      # all ids are below it


def byte_encoding() -> Encoding:
    """Each byte of the UTF-8 text is one token."""
    def encode(text: str) -> np.ndarray:
        # JSON can contain half of a surrogate pair, which UTF-8 cannot express: it becomes "?".
        encoded = text.encode("utf-8", errors="replace")
        return np.frombuffer(encoded, np.uint8).astype(np.uint16)

    return Encoding(encode, end_of_text=BYTE_VOCAB_SIZE - 1, vocab_size=BYTE_VOCAB_SIZE)


def gpt2_encoding() -> Encoding:
    """The vocabulary of GPT-2. Raises UserError if it cannot be loaded."""
    try:
        import tiktoken
        gpt2 = tiktoken.get_encoding("gpt2")
    except ImportError as error:
        raise UserError("the package tiktoken is not installed: "
                        "pip install -r requirements.txt") from error
    # All network errors of requests are OSErrors. A ValueError means that the hash is wrong.
    except (OSError, ValueError) as error:
        raise UserError("the GPT-2 vocabulary is not on this machine and cannot be downloaded "
                        f"({type(error).__name__}); run this once with a network, set "
                        "TIKTOKEN_CACHE_DIR to a folder that has the vocabulary, or use "
                        "--encoding bytes") from error

    def encode(text: str) -> np.ndarray:
        parts = []
        for part in split_long_white_space(text):
            try:
                # "ordinary": the characters <|endoftext|> are text, not the end of a document
                parts.append(gpt2.encode_ordinary(part))
            # A panic of tiktoken's Rust code arrives as a PanicException, which is no Exception.
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                raise UserError("tiktoken cannot encode the document that begins with "
                                f"{text[:60]!r}; remove it from the input") from None
        return np.concatenate([np.array(part, np.uint16) for part in parts])

    return Encoding(encode, end_of_text=gpt2.eot_token, vocab_size=GPT2_VOCAB_SIZE)


def split_long_white_space(text: str) -> list[str]:
    """Cut a text in long runs of white space so that the GPT-2 tokens stay the same.

    Before a visible character, GPT-2's splitting pattern separates the last character of a run from
    the rest of it. The cut lies there.
    """
    parts = []
    start = 0
    for run in LONG_WHITE_SPACE.finditer(text):
        if run.end() < len(text):
            cut = run.end() - 1
            parts.append(text[start:cut])
            start = cut
    parts.append(text[start:])
    return parts


ENCODINGS = {"gpt2": gpt2_encoding, "bytes": byte_encoding}


@lru_cache
def load_encoding(name: str) -> Encoding:
    """Return the encoding with this name, loaded once per process. Raises UserError."""
    return ENCODINGS[name]()


def start_worker(encoding: str) -> None:
    """Prepare a worker process: load the vocabulary, and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load_encoding(encoding)


def encode_texts(encoding: str, texts: list[str]) -> list[np.ndarray]:
    """Return the (n,) uint16 ids of each text, without end-of-text tokens."""
    encode = load_encoding(encoding).encode
    return [encode(text) for text in texts]

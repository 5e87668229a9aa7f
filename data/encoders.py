"""Encodings of text: bytes and GPT-2 tokens.

Worker processes of data.text import this module, so it imports little.
"""
import os
from collections.abc import Callable
from functools import lru_cache
from multiprocessing import parent_process
from threading import Thread

import numpy as np

from data import UserError
from data.documents import cut_blocks
from data.shards import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE

# tiktoken fails at about a million white-space characters in a row, so it gets less at a time.
MOST_CHARACTERS = 2**18

Encode = Callable[[str], np.ndarray]  # a text to (n,) uint16 ids, none of them the end of text


def byte_encoding() -> Encode:
    """Each byte of the UTF-8 text is one token."""
    def encode(text: str) -> np.ndarray:
        # JSON can contain half of a surrogate pair, which UTF-8 cannot express: it becomes "?".
        encoded = text.encode("utf-8", errors="replace")
        return np.frombuffer(encoded, np.uint8).astype(np.uint16)

    return encode


def gpt2_encoding() -> Encode:
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
                        f"({type(error).__name__}: {str(error)[:200]}); run this once with a "
                        "network, set TIKTOKEN_CACHE_DIR to a folder that has the vocabulary, or "
                        "use --encoding bytes") from error

    def encode(text: str) -> np.ndarray:
        starts = range(0, len(text), MOST_CHARACTERS)
        chunks = (text[start:start + MOST_CHARACTERS] for start in starts)
        # "ordinary": the characters <|endoftext|> are text, not the end of a document
        parts = [np.array(gpt2.encode_ordinary(block), np.uint16)
                 for block in cut_blocks(chunks, MOST_CHARACTERS)]
        return np.concatenate([np.empty(0, np.uint16), *parts])

    return encode


ENCODINGS = {"gpt2": gpt2_encoding, "bytes": byte_encoding}
VOCABULARIES = {"gpt2": "data/gpt2_vocabulary.txt", "bytes": ""}  # Track.vocabulary of train_gpt.py
VOCAB_SIZES = {"gpt2": GPT2_VOCAB_SIZE, "bytes": BYTE_VOCAB_SIZE}  # the last id is the end of text


@lru_cache
def load_encoding(name: str) -> Encode:
    """Return the encoding with this name, loaded once per process. Raises UserError."""
    return ENCODINGS[name]()


def start_worker(encoding: str) -> None:
    """Prepare a worker process: load the vocabulary, and watch the main process."""
    Thread(target=end_with_parent, daemon=True).start()
    load_encoding(encoding)


def end_with_parent() -> None:
    """End this process when its parent has ended, even if that was killed."""
    parent_process().join()
    os._exit(1)


def encode_texts(encoding: str, texts: list[str]) -> list[np.ndarray | str]:
    """Return the (n,) uint16 ids of each text, without end-of-text tokens.

    Where the encoding fails, its message takes the place of the ids; the other texts keep theirs.
    """
    encode = load_encoding(encoding)
    results = []
    for text in texts:
        try:
            results.append(encode(text))
        except (KeyboardInterrupt, SystemExit):
            raise
        # A panic of tiktoken's Rust code arrives as a PanicException, which is no Exception.
        except BaseException as error:
            results.append(f"{type(error).__name__}: {error}")
    return results

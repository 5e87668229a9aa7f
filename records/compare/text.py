"""Text: figures and words as people read them."""
import math
import os
import re
import sys

# What is not seen, or changes how its neighbours are seen: control and bidirectional characters, lone halves of pairs.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
                    "\U000e0000-\U000e007f]")


def visible(text: str) -> str:
    """text with each character that would not be seen as its number, \\u202e."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def count(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def shortened(text: str, length: int) -> str:
    """text in at most length characters, the last a … where some are left out."""
    return text if len(text) <= length else text[:length - 1] + "…"


def finite(value: float | None) -> float | None:
    """JSON knows no NaN."""
    return value if value is not None and math.isfinite(value) else None


def seconds(ms: float | None, digits: int = 1) -> str:
    """Milliseconds for people, in seconds; empty where unknown."""
    return "" if ms is None else f"{ms / 1000:.{digits}f} s"


def paint(text: str, colour: int) -> str:
    """text in an ANSI colour, where a terminal shows it."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"

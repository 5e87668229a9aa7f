"""Numbers and text as people read them."""
import os
import re
import sys

# Characters that are invisible or change how their neighbours look: control characters, marks of
# writing direction, zero-width characters, halves of surrogate pairs.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e"
                       "\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]")


def visible(text: str) -> str:
    """Replaces each invisible character by its code, such as \\u202e."""
    return INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shortened(text: str, length: int) -> str:
    """Cuts a text to at most `length` characters; an ellipsis marks the cut."""
    return text if len(text) <= length else text[:length - 1] + "…"


def seconds(ms: float | None, digits: int = 1) -> str:
    """Milliseconds as a text in seconds; empty for None."""
    return "" if ms is None else f"{ms / 1000:.{digits}f} s"


def paint(text: str, colour: int) -> str:
    """The text in an ANSI colour if stdout is a terminal and NO_COLOR is not set."""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"

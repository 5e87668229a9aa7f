"""Numbers and text as people read them."""
import os
import sys

from data import visible


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
    """The visible text, in an ANSI colour if stdout is a terminal and NO_COLOR is not set."""
    text = visible(text)
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"

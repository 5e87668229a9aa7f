"""Text: figures and words as people read them."""
import math
import os
import sys


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

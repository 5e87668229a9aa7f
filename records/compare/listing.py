"""Listing: two scripts side by side, what changed marked, the rest folded."""
import itertools
import os
import re

from .difference import matcher
from .markup import Markup, element, joined
from .text import count

CONTEXT = 3                          # lines around a change that are not folded
LINE, CODE_LINES = 1_000, 20_000     # characters of a line, lines of a script
ALIGNED = 40_000                     # pairs of lines that are looked at, for a change


def side_by_side(a: list[str], b: list[str]) -> Markup:
    """Two scripts in columns; what is far from a change is folded."""
    cut = max(len(a), len(b)) > CODE_LINES
    sides = [[(number, line) for number, line in enumerate(lines[:CODE_LINES], 1) if line.strip()] for lines in (a, b)]
    blocks = matcher(*([line for _, line in side] for side in sides)).get_opcodes()
    parts, rows = [], []

    def flush():
        if rows:
            parts.append(code_table(rows))
            rows.clear()

    for kind, i1, i2, j1, j2 in blocks:
        left, right = sides[0][i1:i2], sides[1][j1:j2]
        if kind != "equal":
            rows += [(old, new, False) for old, new in aligned(left, right)]
            continue
        pairs = [(old, new, True) for old, new in zip(left, right, strict=True)]
        before = CONTEXT if (i1, j1) != (0, 0) else 0
        after = CONTEXT if (i2, j2) != (len(sides[0]), len(sides[1])) else 0
        if len(pairs) <= before + after + 1:
            rows += pairs
            continue
        rows += pairs[:before]
        flush()
        folded = pairs[before:len(pairs) - after]
        parts.append(element("details", element("summary", count(len(folded), "unchanged line")), code_table(folded),
                             class_="fold"))
        rows += pairs[len(pairs) - after:]
    flush()
    if cut:
        parts.append(element("p", f"Only the first {CODE_LINES:,} lines of each are shown."))
    return element("div", *parts, class_="diff")


def aligned(left: list, right: list) -> list[tuple]:
    """Pairs of the lines that were changed into each other, by the words that they have in common; between such pairs
    one after the other.
    """
    if len(left) * len(right) > ALIGNED:
        return list(itertools.zip_longest(left, right))
    words = [[set(re.findall(r"\w+", line[:LINE])) for _, line in side] for side in (left, right)]
    alike = [[len(a & b) / len(a | b) if a | b else 0.0 for b in words[1]] for a in words[0]]
    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]  # of what follows
    for i, j in itertools.product(range(len(left) - 1, -1, -1), range(len(right) - 1, -1, -1)):
        paired = best[i + 1][j + 1] + alike[i][j] if alike[i][j] > 0.4 else 0.0
        best[i][j] = max(paired, best[i + 1][j], best[i][j + 1])
    rows, i, j, begin = [], 0, 0, (0, 0)
    while i < len(left) and j < len(right):
        if alike[i][j] > 0.4 and best[i][j] == best[i + 1][j + 1] + alike[i][j]:
            rows += [*itertools.zip_longest(left[begin[0]:i], right[begin[1]:j]), (left[i], right[j])]
            i, j = begin = (i + 1, j + 1)
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return rows + list(itertools.zip_longest(left[begin[0]:], right[begin[1]:]))


def code_table(rows: list[tuple]) -> Markup:
    """Rows of (old, new, whether they are the same); where blank lines were left out there is a gap."""
    made, last = [], [None, None]
    for old, new, same in rows:
        gap = any(side and before and side[0] > before + 1 for side, before in zip((old, new), last, strict=True))
        last = [side[0] if side else before for side, before in zip((old, new), last, strict=True)]
        made.append(diff_row(old, new, same, gap))
    return element("table", *made, class_="code")


def diff_row(old: tuple[int, str] | None, new: tuple[int, str] | None, same: bool, gap: bool) -> Markup:
    """A line of each side: its number and text; where both changed, what they do not have in common is marked."""
    cells = []
    texts = [None if side is None else shortened_line(side[1]) for side in (old, new)]
    begin = end = 0
    if not same and None not in texts:
        begin = len(os.path.commonprefix(texts))
        end = len(os.path.commonprefix([text[begin:][::-1] for text in texts]))
        if begin + end < 0.4 * max(map(len, texts)):
            begin = end = 0
    for side, text, kind in ((old, texts[0], "del"), (new, texts[1], "ins")):
        if text is None:
            cells += [element("td"), element("td", class_="none")]
            continue
        middle = text[begin:len(text) - end]
        shown = text if not (begin or end) or not middle else joined(
            [text[:begin], element("mark", middle), text[len(text) - end:] if end else ""])
        cells += [element("td", side[0]), element("td", shown, class_=None if same else kind)]
    return element("tr", *cells, class_=" ".join(["same"] * same + ["gap"] * gap) or None)


def shortened_line(line: str) -> str:
    """A line as far as anyone reads it."""
    return line if len(line) <= LINE else f"{line[:LINE]} … ({len(line) - LINE:,} more characters)"

"""Markup: HTML in which whatever is not Markup is escaped where it is put into an element."""
import html
import json
import os
from urllib.parse import quote

from .text import visible


class Markup(str):
    """HTML."""


def element(name: str, *children, **attributes) -> Markup:
    """An element; children and attributes are escaped unless they are Markup. An attribute of None is left out."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"' for key, value in attributes.items()
                   if value is not None)
    return Markup(f"<{name}{told}>{joined(children)}</{name}>")


def joined(children) -> Markup:
    """Children one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children))


def escaped(text) -> Markup:
    """Text as it is shown: what would not be seen as its number."""
    return Markup(html.escape(visible(str(text))))


def script_data(value) -> str:
    """JSON that can stand in a script element: no character in it means anything to HTML."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def sortable(names: list[str], rows: list[list], **attributes) -> Markup:
    """A table that a click on a column's name sorts; a cell is a text, or a pair of it and the value it sorts by."""
    def cell(content, name):
        shown, value = content if isinstance(content, tuple) else (content, None)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        return element("td", shown, data_v=f"{value:.12g}" if numeric else None, class_="number" if numeric else None)
    head = element("tr", *(element("th", element("button", name, type="button"), scope="col") for name in names))
    body = [element("tr", *map(cell, row, names)) for row in rows]
    table = element("table", element("thead", head), element("tbody", *body), class_="sortable")
    return element("div", table, class_="wide", **attributes)


def link(path: str, out: str, text: str | None = None) -> Markup:
    """A link from the page to a file."""
    where = os.path.relpath(path, os.path.dirname(os.path.abspath(out)))
    return element("a", text or os.path.basename(path), href="./" + quote(os.fsencode(where)))

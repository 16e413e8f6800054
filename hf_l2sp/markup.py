"""HTML and SVG as balanced elements, in which everything is escaped that was not made here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_BREAKS = re.compile(r"([_./])")


class Safe(str):
    """Markup that is taken as it is; every other string is text and gets escaped."""


class Cell(NamedTuple):
    """A table cell with a class, and what it says when a screen reader comes to it."""

    content: object
    class_: str | None = None
    label: str | None = None


def escaped(content: object) -> str:
    """Markup as it is, anything else as escaped text; None is nothing."""
    if isinstance(content, Safe):
        return content
    return "" if content is None else html.escape(str(content))


def join(parts: Iterable[object]) -> Safe:
    """All parts in a row."""
    return Safe("".join(map(escaped, parts)))


def element(name: str, /, *content: object, **attributes: object) -> Safe:
    """An element with its content.

    Args:
        name: Of the element.
        content: Text, which is escaped, and other elements.
        attributes: By name, with `_` for `-` and one at the end after a word of Python's; None leaves one out.

    >>> element("p", "a < b", class_="note", aria_label=None)
    '<p class="note">a &lt; b</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Safe(f"<{name}{given}>{join(content)}</{name}>")


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], class_: str | None = None) -> Safe:
    """A table in a box of its own, which scrolls where the page is narrow.

    Args:
        caption: What it shows.
        head: Headers of the columns.
        rows: Cells; the first of each row is its header.
        class_: For the style.
    """
    columns = [head_cell if _is_header(head_cell) else element("th", head_cell, scope="col") for head_cell in head]
    body = [element("tr", element("th", named(first), scope="row"), *map(_cell, others)) for first, *others in rows]
    content = (element("caption", caption), element("thead", element("tr", *columns)), element("tbody", *body))
    # A box that scrolls must be reachable with the keyboard.
    box = {"class_": "scroll", "role": "region", "tabindex": "0", "aria_label": caption}
    return element("div", element("table", *content, class_=class_), **box)


def named(name: object) -> Safe:
    """A name in its own direction of writing, which may be broken after `_`, `.` and `/`."""
    if isinstance(name, Safe):
        return name
    return element("bdi", Safe(_BREAKS.sub(r"\1<wbr>", escaped(name))))


def _is_header(cell: object) -> bool:
    return isinstance(cell, Safe) and cell.startswith("<th")


def _cell(cell: object) -> Safe:
    if not isinstance(cell, Cell):
        return element("td", cell)
    return element("td", cell.content, class_=cell.class_, aria_label=cell.label)


def details(summary: str, *content: object) -> Safe:
    """What is shown on demand."""
    return element("details", element("summary", summary), *content)


def section(title: str, *content: object) -> Safe:
    """A part of the page under a title."""
    return element("section", element("h2", title), *content)


def note(*content: object) -> Safe:
    """A remark on what is shown, or why something is not."""
    return element("p", *content, class_="note")

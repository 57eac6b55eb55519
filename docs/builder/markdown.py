"""Markdown from values: tables, anchors, and blocks between markers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

BEGIN, END = "<!-- generated: {name} -->", "<!-- end of {name} -->"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; None is an empty cell."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [f"| {' | '.join(cell(value) for value in row)} |" for row in rows]


def cell(value: object) -> str:
    """What a cell shows: one line, with no bar that would end it."""
    return "" if value is None else re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(value).split()))


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs both make it of plain titles."""
    return re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")


def replace_block(text: str, name: str, lines: Sequence[str]) -> str:
    """``text`` with these lines between the markers of the block ``name``.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    begin, end = BEGIN.format(name=name), END.format(name=name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page has no single block {name!r}: write {begin} and {end} once, on lines of their own")
    before, rest = text.split(begin)
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}"

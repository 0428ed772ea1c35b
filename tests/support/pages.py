"""Reading a report's page as a program does."""

from __future__ import annotations

import re
from html.parser import HTMLParser

#: Elements that have no end tag.
_VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Text, attributes and pictures of a page; raises AssertionError where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("td", "th", "dt", "dd", "li", "p"):
            self.words.append(" ")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content."""
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        """An element ends: it must be the innermost."""
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text but the style sheet's, with white space made one space."""
        return re.sub(r"\s+", " ", "".join(w for w in self.words if "prefers-color-scheme" not in w))

    def having(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of every such element whose attributes are these."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


def painted(path: str, rows: int, columns: int) -> list[list[bool]]:
    """The rows of a picture whose stripes are ``M column row.5 h length`` and ``m gap 0 h length``."""
    cells = [[False] * columns for _ in range(rows)]
    row = at = 0
    for kind, x, y, length in re.findall(r"([Mm])(\d+) ([\d.]+)h(\d+)", path):
        row, at = (int(float(y)), int(x)) if kind == "M" else (row, at + int(x))
        for column in range(at, at + int(length)):
            assert not cells[row][column]
            cells[row][column] = True
        at += int(length)
    return cells

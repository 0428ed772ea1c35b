"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["escaped", "table"]


def table(header: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table; with ``numbers`` all columns but the first are set right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(escaped, cells)) + " |" for cells in (header, rule, *lines)) + "\n"


def escaped(text: str) -> str:
    """Text as it may stand in a cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

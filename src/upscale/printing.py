"""What the reports have in common when they are printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

__all__ = ["as_text", "barrier_lines", "listed"]

_WIDEST = 250  # characters; a table takes what it needs
_MOST_LISTED = 5


def listed(names: Iterable[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    everything = list(names)
    more = len(everything) - _MOST_LISTED
    return ", ".join(everything[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def as_text(parts: Iterable[Table | str], width: int | None, widest: int = _WIDEST) -> str:
    """Tables and paragraphs one below the other, ``width`` characters wide; None: paragraphs are not broken, and tables
    are up to ``widest``. Names come from the user's model: nothing in them is markup."""
    buffer = StringIO()
    console = Console(file=buffer, width=width or widest, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part, soft_wrap=width is None and isinstance(part, str))
    return buffer.getvalue().rstrip("\n")


def barrier_lines(barriers: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """A line for each (where, operator, reason), with how often it is there."""
    for (place, operator, reason), times in Counter(barriers).items():
        count = f" ({times} times)" if times > 1 else ""
        yield f"barrier     {operator} at {place}: {reason}{count}"

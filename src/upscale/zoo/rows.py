"""One line of the coverage table, what it was made with, and the CSV that the lines live in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .table import BadTableError, columns_of, read_table, write_table

#: Largest relative error that counts as equal, by dtype.
MIXED = "float64, float32 inside"  # a float64 model that goes through float32, as many language models' norms do
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, MIXED: 1e-5}


@dataclass(frozen=True)
class Settings:
    """How every model of a run is masked and exported. Rows of equal settings can be compared, and are not redone."""

    amount: float = 0.25
    side: str = "input"  # "input", "output" or "both"
    method: str = "unconstrained"
    reads: str = "auto"
    dtype: str = "auto"  # "auto": float64 where the model is small enough and runs in it
    seed: int = 0


@dataclass
class Row:
    """One model. ``None`` and "" are what was not reached; ``reason`` says why."""

    suite: str
    model: str
    exported: str = "no"
    equal: str = ""  # "yes" or "no", once compared
    error: float | None = None  # largest relative error against the masked model
    sensitivity: float | None = None  # how much the output differs from one random input to another, relatively
    batches: str = ""  # batch sizes compared, "2 3"
    dtype: str = ""
    parameters_before: int | None = None
    parameters_after: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None
    flops_removed: float | None = None  # share
    masked_channels: int | None = None
    channels_removed: float | None = None  # share of the masked (weight, channel) pairs that are gone
    reads: str = ""  # "view:3 whole:7"
    barriers: str = ""  # "aten.unfold:2"
    capture_s: float | None = None  # torch.export
    export_s: float | None = None  # everything after it but verification
    verify_s: float | None = None
    peak_mb: float | None = None
    reason: str = ""
    stage: str = ""  # where it failed
    amount: float = 0.0
    side: str = ""
    method: str = ""
    reads_asked: str = ""
    dtype_asked: str = ""
    seed: int = 0
    version: str = ""

    @classmethod
    def blank(cls, suite: str, model: str, settings: Settings, version: str) -> Row:
        """A row that says only what is about to be tried."""
        return cls(
            suite,
            model,
            amount=settings.amount,
            side=settings.side,
            method=settings.method,
            reads_asked=settings.reads,
            dtype_asked=settings.dtype,
            seed=settings.seed,
            version=version,
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same experiment."""
        asked = (self.amount, self.side, self.method, self.reads_asked, self.dtype_asked, self.seed, self.version)
        return (self.suite, self.model, *asked)

    @property
    def good(self) -> bool:
        """Exported, and equal to the masked model."""
        return self.exported == "yes" and self.equal == "yes"


COLUMNS = columns_of(Row)

__all__ = ["COLUMNS", "MIXED", "TOLERANCE", "BadTableError", "Row", "Settings", "merged", "read_rows", "write_rows"]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no such file. Raises ``BadTableError`` for another kind of file."""
    return read_table(path, Row, "a coverage table")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the CSV as a whole, atomically: at no time is half a table on the disk."""
    write_table(path, Row, rows)


def merged(rows: Sequence[Row], new: Row) -> list[Row]:
    """``rows`` with ``new`` at the place of the row of the same experiment, or at the end."""
    keys = [row.key for row in rows]
    if new.key not in keys:
        return [*rows, new]
    place = keys.index(new.key)
    return [*rows[:place], new, *rows[place + 1 :]]

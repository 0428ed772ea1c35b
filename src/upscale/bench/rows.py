"""One line of the speed table, the setting it was measured in, and the CSV that the lines live in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..zoo.table import columns_of, read_table, write_table

#: In the order in which they are shown. ``unpruned`` is what all others are compared with.
VARIANTS = ("unpruned", "constrained", "baseline", "gather", "auto", "contiguous", "ideal")
MEMORY_FORMATS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Setting:
    """What is the same for all variants of a model that are timed together.

    ``amount``: share of each layer's channels. ``size``: height and width of images; 0: as the suite has them.
    ``round_to``: see :class:`upscale.Target`.
    """

    amount: float = 0.25
    batch: int = 1
    memory_format: str = "contiguous"
    backend: str = "eager"
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    size: int = 224
    side: str = "input"
    seed: int = 0
    round_to: int = 1

    def __str__(self) -> str:
        shown = f"{100 * self.amount:g} % b{self.batch} {self.memory_format} {self.backend} t{self.threads}"
        shown += f" r{self.round_to}" if self.round_to > 1 else ""
        return shown if (self.device, self.dtype) == ("cpu", "float32") else f"{shown} {self.dtype} on {self.device}"


@dataclass(frozen=True)
class Place:
    """Where a row was measured: numbers of two places cannot be compared."""

    version: str  # of upscale
    torch: str
    machine: str


@dataclass
class Row:
    """One variant of one model in one setting. ``None`` and "" are what was not measured; ``reason`` says why."""

    suite: str
    model: str
    variant: str
    amount: float
    batch: int
    memory_format: str
    backend: str
    threads: int
    device: str
    dtype: str
    size: int
    side: str
    seed: int
    version: str
    torch: str
    machine: str
    input: str = ""  # shape of what the model was called with, "1x3x224x224"
    median_ms: float | None = None  # of one call
    iqr_ms: float | None = None  # third less first quartile
    best_ms: float | None = None
    runs: int | None = None
    ratio: float | None = None  # median over rounds of time / time of unpruned in the same round
    control: float | None = None  # the same of the unpruned model under a second name: 1, but for noise
    copied_bytes: int | None = None  # by copying operators in one call (eager only)
    copies: int | None = None
    kernels: int | None = None
    parameters: int | None = None
    flops: int | None = None  # of one call
    error: float | None = None  # relative, against the masked model; none of the ideal, whose values are wrong
    denormal_weights: int | None = None
    denormal_activations: float | None = None  # share of all values that operators write
    export_s: float | None = None
    peak_mb: float | None = None  # of the process, all variants together
    warning: str = ""
    reason: str = ""  # why there is no time
    stage: str = ""  # in which it failed
    round_to: int = 1

    @classmethod
    def blank(cls, suite: str, model: str, variant: str, setting: Setting, place: Place) -> Row:
        """A row that says only what is about to be measured."""
        return cls(suite, model, variant, **asdict(setting), **asdict(place))

    @property
    def setting(self) -> Setting:
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})

    @property
    def place(self) -> Place:
        return Place(self.version, self.torch, self.machine)

    @property
    def group(self) -> tuple[Any, ...]:
        """What all variants have in common that were timed together."""
        return (self.suite, self.model, self.setting, self.place)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same measurement."""
        return (*self.group, self.variant)


COLUMNS = columns_of(Row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no such file. Raises ``BadTableError`` for another kind of file."""
    return read_table(path, Row, "a speed table")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the CSV as a whole, atomically."""
    write_table(path, Row, rows)


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``rows`` with each of ``new`` at the place of the row of the same measurement, or at the end."""
    by_key = {row.key: row for row in rows}
    by_key.update((row.key, row) for row in new)
    return list(by_key.values())


def grouped(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Rows that were timed together, by variant, in order of appearance."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.group, {})[row.variant] = row
    return list(groups.values())

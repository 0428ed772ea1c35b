"""One line of the accuracy table, and the CSV that the lines live in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..zoo.table import read_table, write_table

__all__ = [
    "DENSE",
    "EVEN",
    "GLOBAL",
    "IMPORTANCES",
    "METHODS",
    "RANKINGS",
    "RIDGE",
    "Combination",
    "Row",
    "Source",
    "blank",
    "described",
    "merged",
    "ranked",
    "read_rows",
    "write_rows",
]

DENSE = "dense"
METHODS = ("unconstrained", "constrained", "contiguous")
EVEN, GLOBAL = RANKINGS = ("even", "global")
RIDGE = "ridge"
IMPORTANCES = ("l1", "l2", "lamp", "fpgm", "hrank", "bn_scale", "activation", "obs", "random")


@dataclass(frozen=True)
class Source:
    """A network and what it is tried on. ``weights``, ``data``: paths. ``images``: how many are evaluated on; 0: all.
    ``calibration``: how many more for scores that need data. ``mean``, ``std``, ``size``: of a network that is not of
    the table; empty and 0 for those that are."""

    model: str
    weights: str
    data: str
    images: int = 2000
    calibration: int = 256
    seed: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: int = 0

    @property
    def images_seen(self) -> str:
        """The name of the images, and what of their use is not as usual: rows that differ in it do not compare."""
        told = [f"{self.size} px"] if self.size else []
        for name, values in (("mean", self.mean), ("std", self.std)):
            told += [f"{name} {' '.join(f'{value:g}' for value in values)}"] if values else []
        told += [f"{self.calibration} to calibrate"] if self.calibration != type(self).calibration else []
        return ", ".join([Path(self.data).stem, *told])


@dataclass(frozen=True)
class Combination:
    """How a network is masked. ``amount``: share of the channels; 0, with ``DENSE`` for the method: not masked.
    ``repaired``: "ridge" where :func:`upscale.repair` then fits what is left, "" where it does not. ``ranking``: "even"
    where each layer loses that share of its own, "global" where all layers' channels are ranked together."""

    importance: str = ""
    side: str = "input"
    method: str = DENSE
    amount: float = 0.0
    repaired: str = ""
    ranking: str = EVEN

    def __str__(self) -> str:
        if not self.amount:
            return DENSE
        how = described(self.method, self.ranking, repair=self.repaired)
        return f"{self.importance} {self.side} {how} {100 * self.amount:g} %"


def ranked(ranking: str) -> str:
    """The ranking in titles, which do not tell what is usual: "global", or ""."""
    return ranking if ranking != EVEN else ""


def described(method: str, ranking: str, side: str = "", repair: str = "") -> str:
    """What was done, in titles: "unconstrained, global + ridge"; what is empty or usual is left out."""
    how = ", ".join(filter(None, (method, side, ranked(ranking))))
    return f"{how} + {repair}" if repair else how


@dataclass
class Row:
    """One network masked in one way, exported. ``None`` and "" are what was not measured; ``reason`` says why."""

    model: str
    weights: str  # the file's name, without its ending
    data: str  # see ``Source.images_seen``
    images: int  # that were asked for; 0: all
    seed: int
    importance: str
    side: str
    method: str
    amount: float
    version: str  # of upscale
    torch: str
    machine: str
    evaluated: int | None = None  # images
    top1: float | None = None  # percent, of the exported model
    parameters: int | None = None
    flops: int | None = None  # of one image
    latency_ms: float | None = None  # median, one image, processor time of one thread
    parameters_left: float | None = None  # share of the dense network's
    flops_left: float | None = None
    latency_left: float | None = None  # median over rounds of time / the dense network's in the same round
    error: float | None = None  # greatest difference from the masked model, relative, over the images compared
    channels: int | None = None  # that masks zeroed, over all layers
    seconds: float | None = None
    reason: str = ""  # why there is no accuracy
    repaired: str = ""  # how what is left was fitted to the dense network's outputs: "ridge", or not at all
    calibration: int | None = None  # images that the repair was given
    ranking: str = EVEN  # what amount is a share of: each layer's channels, or, "global", all layers' together

    @property
    def combination(self) -> Combination:
        return Combination(self.importance, self.side, self.method, self.amount, self.repaired, self.ranking)

    @property
    def repair(self) -> str:
        """How the row was repaired, for titles: "ridge (1,024 images)", or ""."""
        return f"{self.repaired} ({self.calibration:,} images)" if self.repaired else ""

    @property
    def use(self) -> str:
        """How many images were set aside, where it is not the usual number: others were evaluated on then."""
        return next((told for told in self.data.split(", ") if told.endswith(" to calibrate")), "")

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same measurement."""
        how = (self.importance, self.side, self.method, self.amount, self.repaired, self.calibration, self.ranking)
        return (*self.group, *how)

    @property
    def group(self) -> tuple[Any, ...]:
        """What rows have in common that may be compared: network, weights and images, seed and version."""
        return (self.model, self.weights, self.data, self.images, self.seed, self.version)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no such file. Raises ``BadTableError`` for another kind of file."""
    return read_table(path, Row, "an accuracy table")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the CSV as a whole, atomically."""
    write_table(path, Row, rows)


def merged(rows: Sequence[Row], new: Row) -> list[Row]:
    """``rows`` with ``new`` at the place of the row of the same measurement, or at the end."""
    by_key = {row.key: row for row in rows}
    by_key[new.key] = new
    return list(by_key.values())


def blank(source: Source, combination: Combination, version: str, torch: str, machine: str) -> Row:
    """A row that says only what is about to be measured."""
    return Row(
        source.model,
        Path(source.weights).stem,
        source.images_seen,
        source.images,
        source.seed,
        **asdict(combination),
        version=version,
        torch=torch,
        machine=machine,
        calibration=source.calibration if combination.repaired else None,
    )

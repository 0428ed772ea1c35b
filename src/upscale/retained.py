"""What masks leave of the importance: contiguous masks beside constrained and unconstrained ones of the same sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["Retained", "SpaceRetained"]


@dataclass(frozen=True)
class SpaceRetained:
    """One space: its layers, and the sum of the scores that they keep.

    ``total``: of all channels; ``constrained``, ``contiguous`` and ``unconstrained``: of those that the three methods
    keep, every layer as many. ``sizes``: for each layer the numbers of channels that it keeps and that it reads.
    """

    layers: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    total: float
    constrained: float
    contiguous: float
    unconstrained: float


@dataclass(frozen=True)
class Retained:
    """The spaces in which several layers share channels, and those of a single layer; sums over all of them."""

    spaces: tuple[SpaceRetained, ...]

    @property
    def total(self) -> float:
        """The scores of all channels that a layer with a mask reads."""
        return sum(s.total for s in self.spaces)

    @property
    def constrained(self) -> float:
        """Kept if all layers on a space agreed about its channels."""
        return sum(s.constrained for s in self.spaces)

    @property
    def contiguous(self) -> float:
        """Kept by these masks."""
        return sum(s.contiguous for s in self.spaces)

    @property
    def unconstrained(self) -> float:
        """Kept if every layer chose for itself."""
        return sum(s.unconstrained for s in self.spaces)

    @property
    def closed(self) -> float:
        """Share of the gap between constrained and unconstrained masks that these close; 1 where there is none."""
        return _closed(self.constrained, self.contiguous, self.unconstrained)

    def __str__(self) -> str:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("space", overflow="fold")
        for title in ("layers", "constrained", "contiguous", "unconstrained", "gap closed"):
            table.add_column(title, justify="right", no_wrap=True)
        shared = [s for s in self.spaces if len(s.layers) > 1]
        for space in shared:
            table.add_row(space.layers[0], *_cells(len(space.layers), [space]))
        alone = [s for s in self.spaces if len(s.layers) == 1]
        if alone:
            table.add_row("layers on their own", *_cells(len(alone), alone))
        table.add_row("together", *_cells(sum(len(s.layers) for s in self.spaces), self.spaces))
        console = Console(width=100, color_system=None, markup=False, emoji=False)
        with console.capture() as captured:
            console.print("Retained importance, in percent of all", table, sep="\n")
        return captured.get().rstrip()


def _closed(low: float, value: float, high: float) -> float:
    """How much of the way from ``low`` to ``high`` is made; where they differ by rounding only, all of it."""
    gap = high - low
    return (value - low) / gap if gap > 1e-9 * max(abs(high), abs(low)) else 1.0


def _cells(layers: int, spaces: Sequence[SpaceRetained]) -> list[str]:
    total = sum(s.total for s in spaces)
    sums = [sum(getattr(s, name) for s in spaces) for name in ("constrained", "contiguous", "unconstrained")]
    percent = [f"{100 * value / total:.2f}" if total else "-" for value in sums]
    return [str(layers), *percent, f"{100 * _closed(*sums):.0f} %"]

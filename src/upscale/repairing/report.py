"""What a repair did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..printing import as_text

__all__ = ["LayerRepair", "RepairReport", "RepairWarning"]

_WIDEST = 10_000


class RepairWarning(UserWarning):
    """The data is thin for what is to be solved from it."""


@dataclass(frozen=True)
class LayerRepair:
    """One layer.

    ``before``, ``after``: mean square of the difference to the target on held-out examples, with the masked weights
    and with the new ones, on the same inputs, divided by the target's mean square about its mean; behind the
    activation, where one follows and the weights were solved for. ``ridge``: the one
    that was chosen, None where the old weights were kept. ``samples``, ``unknowns``: rows of the regression, weights
    of one output.
    """

    name: str
    before: float
    after: float
    ridge: float | None
    samples: int
    unknowns: int


@dataclass(frozen=True)
class RepairReport:
    """``layers`` in the order of repair; ``left``: layers that were not repaired, with the reason.

    ``outputs``: mean square of the difference between the network's outputs and the original's on held-out examples,
    divided by the original's mean square about its mean, before and after. ``recalibrated``: how far the batch norms'
    statistics were moved to those of the calibration data, 0 (not at all) to 1; None where that was not tried.
    ``blocks``: of ``method="blockwise"``, the error of each block after ridge regression and after the fit.
    """

    layers: tuple[LayerRepair, ...]
    left: dict[str, str]
    outputs: tuple[float, float]
    recalibrated: float | None = None
    blocks: tuple[tuple[str, float, float], ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        return self.render()

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (str(self),))  # a pickled model needs nothing of this library

    def __deepcopy__(self, memo: Any) -> RepairReport:
        return self

    def summary(self) -> str:
        """What was done, in one line."""
        fitted = sum(row.ridge is not None for row in self.layers)
        moved = sum(after != before for _, before, after in self.blocks)
        blocks = f", then {moved} of {len(self.blocks)} blocks" if self.blocks else ""
        before, after = self.outputs
        return (
            f"error of the outputs {before:.3g} -> {after:.3g} on held-out examples; "
            f"{fitted} of {len(self.layers)} layers fitted, {len(self.left)} left out{blocks}; {self.seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return {
            "outputs": {"before": self.outputs[0], "after": self.outputs[1]},
            "layers": [asdict(row) for row in self.layers],
            "left": dict(self.left),
            "recalibrated": self.recalibrated,
            "blocks": [{"end": end, "before": before, "after": after} for end, before, after in self.blocks],
            "seconds": round(self.seconds, 3),
        }

    def render(self, width: int | None = None) -> str:
        """The report as text, ``width`` characters wide; None: no line is broken."""
        parts: list[Table | str] = [self._table()]
        if self.blocks:
            parts.append(self._block_table())
        parts += [f"left as it is: {name} ({reason})" for name, reason in self.left.items()]
        if self.recalibrated is not None:
            parts.append(f"batch norm statistics moved by {self.recalibrated:.0%}")
        before, after = self.outputs
        parts.append(f"error of the network's outputs: {before:.4g} before, {after:.4g} after; {self.seconds:.1f} s")
        return as_text(parts, width, _WIDEST)

    def _table(self) -> Table:
        table = Table(title="Repair: error of each layer on held-out examples")
        table.add_column("layer")
        for title in ("before", "after", "ridge", "samples", "unknowns"):
            table.add_column(title, justify="right")
        for row in self.layers:
            ridge = "kept" if row.ridge is None else f"{row.ridge:.0e}"
            cells = (f"{row.before:.3g}", f"{row.after:.3g}", ridge, f"{row.samples:,}", f"{row.unknowns:,}")
            table.add_row(row.name, *cells)
        return table

    def _block_table(self) -> Table:
        table = Table(title="Error of each block on held-out examples")
        table.add_column("up to")
        for title in ("ridge", "fitted"):
            table.add_column(title, justify="right")
        for name, before, after in self.blocks:
            table.add_row(name, f"{before:.3g}", f"{after:.3g}")
        return table

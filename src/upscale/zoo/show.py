"""The coverage table as text: one line a model while it runs, all of them and a summary at the end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from .rows import Row


@dataclass(frozen=True)
class Totals:
    """What many rows say together; None where no row says it."""

    models: int
    exported: int
    equal: int
    masked: int  # (weight, channel) pairs
    removed: float | None  # share of them that is gone
    parameters: float | None  # share removed, median over models
    flops: float | None
    ratio: float | None  # seconds after capture / seconds of torch.export, all models together
    error: float | None  # the largest

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Totals:
        good = [row for row in rows if row.good]
        pairs = [(row.masked_channels or 0, row.channels_removed) for row in good if row.channels_removed is not None]
        masked = sum(count for count, _ in pairs)
        captured = sum(row.capture_s or 0.0 for row in good)
        return cls(
            models=len(rows),
            exported=sum(row.exported == "yes" for row in rows),
            equal=len(good),
            masked=masked,
            removed=sum(count * share for count, share in pairs) / masked if masked else None,
            parameters=_median(parameters_removed(row) for row in good),
            flops=_median(row.flops_removed for row in good),
            ratio=sum(row.export_s or 0.0 for row in good) / captured if captured else None,
            error=max((row.error for row in good if row.error is not None), default=None),
        )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def parameters_removed(row: Row) -> float | None:
    """Share of the parameters that is gone."""
    if row.parameters_after is None or not row.parameters_before:
        return None
    return 1 - row.parameters_after / row.parameters_before


def percent(share: float | None) -> str:
    """``"27.3 %"``, or "" for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def seconds(value: float | None) -> str:
    """``"1.5"``, or "" for None."""
    return "" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def verdict(row: Row) -> str:
    """``"equal 3e-16"``, ``"NOT EQUAL"`` or ``"failed"``."""
    if row.good:
        return f"equal {row.error:.0e}"
    return "NOT EQUAL" if row.exported == "yes" else "failed"


def line(row: Row) -> str:
    """One model in one line, for a console of rich's."""
    color = "green" if row.good else "red"
    if row.good:
        removed = f"{percent(row.channels_removed)} of {row.masked_channels} masked channels removed"
        told = f"parameters -{percent(parameters_removed(row))}, {removed}, {seconds(row.export_s)} s"
    else:
        told = f"{row.stage}: {row.reason}" if row.stage else row.reason
    return f"[{color}]{escape(row.model):40}[/] {verdict(row):12} {escape(told)}"


def table(rows: Sequence[Row]) -> Table:
    """All rows, as a table of rich's."""
    shown = Table(title="coverage", title_justify="left")
    for name in ("suite", "model", "result", "dtype", "parameters", "FLOPs", "masked", "reads", "barriers", "s", "MB"):
        # one line a model; the file has it all
        shown.add_column(name, overflow="ellipsis", no_wrap=True, min_width={"model": 26, "result": 11}.get(name))
    for row in rows:
        cells = [row.suite, row.model, verdict(row), row.dtype]
        if row.good:
            cells += [f"-{percent(parameters_removed(row))}", f"-{percent(row.flops_removed)}"]
            cells += [f"{percent(row.channels_removed)} of {row.masked_channels}", row.reads, row.barriers]
            cells += [f"{seconds(row.capture_s)} + {seconds(row.export_s)}", f"{row.peak_mb or 0:.0f}"]
        else:
            cells += ["", "", "", "", "", "", f"{row.peak_mb or 0:.0f}"]
        shown.add_row(*(escape(cell) for cell in cells), style=None if row.good else "red")
    return shown


def failures(rows: Sequence[Row]) -> str:
    """One line for each model that failed: where, and why."""
    return "\n".join(f"{r.model}: {r.stage + ': ' if r.stage else ''}{r.reason}" for r in rows if not r.good)


def summary(rows: Sequence[Row]) -> str:
    """What all rows say together, in a line or two."""
    totals = Totals.of(rows)
    text = f"{totals.models} models: {totals.exported} exported, {totals.equal} equal to the masked model"
    if totals.error is not None:
        text += f" (largest relative error {totals.error:.0e})"
    if totals.removed is not None:
        text += f"; {percent(totals.removed)} of {totals.masked:,} masked channels removed"
    if totals.ratio is not None:
        text += f"; the export takes {totals.ratio:.2f} times the time of torch.export"
    return text

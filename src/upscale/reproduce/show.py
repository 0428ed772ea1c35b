"""The accuracy table as text: a line for each combination while it runs, all of them at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .gains import AXES, Gain, curves, gains, mean_gain
from .rows import DENSE, METHODS, Row, described

__all__ = ["gains_table", "line", "points", "table"]

_SHORT = {"amount": "equal amount", "flops_left": "equal FLOPs", "latency_left": "equal latency"}


def points(value: float | None) -> str:
    """``"+1.2"``, or "" for nothing known."""
    return "" if value is None or math.isnan(value) else f"{value:+.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def line(row: Row) -> str:
    """One combination in one line, for a console of rich's."""
    head = f"{escape(row.model):20} {escape(str(row.combination)):36}"
    if row.reason:
        return f"[red]{head}[/] {escape(row.reason)}"
    told = f"top-1 {row.top1:5.1f}  FLOPs {_share(row.flops_left)}  latency {_share(row.latency_left)}"
    return f"[green]{head}[/] {told}"


def table(rows: Sequence[Row]) -> Table:
    """Top-1 by network and importance: a line for each method, a column for each amount."""
    amounts = sorted({row.amount for row in rows if row.amount})
    shown = Table(title="top-1 in percent, by share of channels masked", title_justify="left", box=SIMPLE_HEAD)
    for name in ("model", "importance", "method"):
        shown.add_column(name, no_wrap=name != "model")
    for amount in (0.0, *amounts):
        shown.add_column(f"{100 * amount:g} %", justify="right", no_wrap=True)
    dense = {row.model: row.top1 for row in rows if row.method == DENSE}
    lines: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for row in rows:
        if row.method != DENSE:
            how = described(row.method, row.ranking, "" if row.side == "input" else f"{row.side}s", row.repair)
            lines.setdefault((row.model, row.importance, how), {})[row.amount] = row.top1
    for (model, importance, how), found in lines.items():
        cells = [dense.get(model), *(found.get(amount) for amount in amounts)]
        shown.add_row(model, importance, how, *("" if value is None else f"{value:.1f}" for value in cells))
    return shown


def gains_table(rows: Sequence[Row]) -> Table:
    """What each method gains over constrained masks, for each network in the mean over importances."""
    found = curves(rows)
    shown = Table(title="points of top-1 above constrained masks", title_justify="left", box=SIMPLE_HEAD)
    for name in ("model", "method", *(_SHORT[axis] for axis in AXES)):
        shown.add_column(name, justify="left" if name in ("model", "method") else "right")
    for method in (name for name in METHODS if name != "constrained"):
        every = gains(found, method)
        for way in dict.fromkeys(one.better.way for one in every):
            some = [one for one in every if one.better.way == way]
            models = list(dict.fromkeys(one.better.model for one in some))
            for model in models:
                shown.add_row(model, way, *_means([one for one in some if one.better.model == model]))
            if len(models) > 1:
                shown.add_row("mean", way, *_means(some), style="bold")
    return shown


def _means(found: Sequence[Gain]) -> list[str]:
    return [points(mean_gain(found, axis, alive=False)) for axis in AXES]

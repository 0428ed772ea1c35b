"""What a notebook shows of a report: totals, reads, remarks and a folded table of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ..report import Report
from .data import as_data
from .numbers import change, microseconds, percent, short

CELL = ' style="text-align:left;padding:2px 14px 2px 0"'
MOST_LAYERS = 200
MOST_REMARKS = 20


def as_cell(report: Report) -> str:
    """An HTML fragment without script or style sheet; it takes the notebook's own colours."""
    data = as_data(report)
    totals = _table(
        ("", "before", "after", "left"),
        [_total("parameters", data["parameters"]), _total("FLOPs per example", data["flops"])],
    )
    reads = _table(
        ("reads", "", "number", "modelled cost"),
        [(r["kind"], r["meaning"], r["count"], _cost(r["nanoseconds"])) for r in data["reads"]],
    )
    layers = data["layers"]
    rows = [
        (r["name"], r["kind"], *map(change, (r["inputs"], r["outputs"], r["parameters"])), r["read"])
        for r in layers[:MOST_LAYERS]
    ]
    more = f"<p>and {len(layers) - MOST_LAYERS} more</p>" if len(layers) > MOST_LAYERS else ""
    table = _table(("layer", "type", "in", "out", "parameters", "read"), rows)
    return (
        f"<div>{totals}{reads}{_remarks(data)}"
        f"<details><summary>{len(layers)} layers</summary>{table}{more}</details></div>"
    )


def _total(name: str, pair: dict[str, int]) -> tuple[str, ...]:
    return (name, short(pair["before"]), short(pair["after"]), percent(pair["after"], pair["before"]))


def _cost(nanoseconds: float | None) -> str:
    return "–" if nanoseconds is None else microseconds(nanoseconds)


def _remarks(data: dict[str, Any]) -> str:
    lines = [f"barrier: {b['operator']} at {b['where']}: {b['reason']}" for b in data["barriers"]]
    lines += [f"kept: {k['channels']} {k['side']} channels of {k['layer']}: {k['reason']}" for k in data["kept"]]
    lines += [f"note: {note}" for note in data["notes"]]
    if data["verification"] is not None:
        error = data["verification"]["error"]
        lines.insert(0, f"verified: largest relative error {'not finite' if error is None else f'{error:.1e}'}")
    if len(lines) > MOST_REMARKS:
        lines[MOST_REMARKS:] = [f"and {len(lines) - MOST_REMARKS} more"]
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th{CELL}>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td{CELL}>{escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"

"""The accuracy table as one Markdown document: gains, losses, and every number."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from ..markdown import escaped
from ..markdown import table as markdown_table
from .gains import AXES, Gain, curves, gains, mean_gain
from .models import KNOWN
from .rows import DENSE, METHODS, Row, described, ranked
from .show import points

__all__ = ["document", "write_summary"]

_TITLES = {"amount": "equal amount", "flops_left": "equal FLOPs", "latency_left": "equal latency"}

_INTRODUCTION = """\
# Accuracy of masked networks

Last written by `{command}`.

Every network is masked, exported and verified, and the exported network is evaluated: nothing is trained. Where it says
*+ ridge*, the weights that masks have left were fitted by `upscale.repair` to what the dense network computes, without
labels, on images that are not evaluated on; elsewhere nothing is repaired.

*Unconstrained*: every layer masks channels of its own. *Constrained*: layers on a shared tensor mask the same channels.
*Contiguous*: every layer its own, as long as one order gives each of them a slice. Every layer loses the same share of
its channels; where it says *global*, all layers' are ranked together, and it is the share of them all.

**Gain**: points of top-1 above constrained masks of the same network, importance, side, ranking and repair, in the mean
over the amounts (*equal amount*), or over the range of FLOPs or latency that both curves have, linear between their
points and the dense network (*equal FLOPs*, *equal latency*). *Alive* takes only the part in which one of the two still
has half of the dense accuracy: beyond it both are near chance, and differences mean little. Latency is that of one
image relative to the dense network, timed in turns, in processor time of one thread.
"""


def write_summary(folder: Path, rows: Sequence[Row], pictures: Sequence[Path], command: str) -> Path:
    """Write the document of all rows as ``summary.md``; returns its path."""
    path = folder / "summary.md"
    shown = [Path(os.path.relpath(picture, folder)).as_posix() for picture in pictures]
    with replacing(path) as draft:
        draft.write_text(document(rows, shown, command), encoding="utf-8")
    return path


def document(rows: Sequence[Row], pictures: Sequence[str], command: str) -> str:
    """The whole document."""
    parts = [_INTRODUCTION.format(command=command)]
    for data in dict.fromkeys(_data_of(row) for row in rows):
        parts.append(_section([row for row in rows if _data_of(row) == data]))
    parts += [f"![{Path(name).stem}]({name})\n" for name in pictures]
    return "\n".join(parts).rstrip() + "\n"


def _data_of(row: Row) -> tuple[Any, ...]:
    """What the rows of a section have in common: whole sets or parts, how they are used, the machine, the version."""
    return (row.images, row.use, row.version, row.torch, row.machine)


def _section(rows: Sequence[Row]) -> str:
    first = rows[0]
    counts = ", ".join(
        f"{model} {images:,}" for model, images in dict.fromkeys((r.model, r.evaluated or 0) for r in rows)
    )
    parts = [
        f"## On {f'{first.images:,}' if first.images else 'all'} images{first.use and f' ({first.use})'}\n\n"
        f"Evaluated on: {counts}. "
        f"{first.machine}, torch {first.torch}, upscale {first.version}.\n"
    ]
    found = curves(rows)
    for method in (name for name in METHODS if name != "constrained"):
        every = gains(found, method)
        for how in dict.fromkeys(map(_alike, every)):
            parts.append(_gains(method, *how, [one for one in every if _alike(one) == how]))
    parts.append(_numbers(rows))
    notes = [f"- {row.model}: {KNOWN[row.model].note}." for row in rows if row.method == DENSE and row.model in KNOWN]
    parts += [note + "\n" for note in notes if not note.endswith(": .")]
    parts += [f"- {row.model}, {row.combination}: {escaped(row.reason)}\n" for row in rows if row.reason]
    return "\n".join(parts)


def _alike(one: Gain) -> tuple[str, str]:
    """What both curves have in common that not all gains do: ranking and repair."""
    return one.better.ranking, one.better.repair


def _gains(method: str, ranking: str, repair: str, every: Sequence[Gain]) -> str:
    header = ["", *_TITLES.values(), *(f"{title}, alive" for title in _TITLES.values())]
    lines = []
    for kind in ("model", "importance"):
        for name in dict.fromkeys(getattr(one.better, kind) for one in every):
            some = [one for one in every if getattr(one.better, kind) == name]
            lines.append([name, *_means(some)])
    lines.append(["**mean**", *(f"**{cell}**" for cell in _means(every))])
    both = " and ".join(filter(None, (ranked(ranking), f"with {repair}" if repair else "")))
    title = f"What {method} masks gain{both and f', both {both}'}"
    return f"### {title}\n\n{markdown_table(header, lines)}\n{_losses(method, every)}"


def _means(some: Sequence[Gain]) -> list[str]:
    return [points(mean_gain(some, axis, alive)) for alive in (False, True) for axis in AXES]


def _losses(method: str, every: Sequence[Gain]) -> str:
    """Where constrained masks are better: by axis, and the worst single amount."""
    lines = []
    for one in every:
        lost = [f"{points(one.everywhere[axis])} at {_TITLES[axis]}" for axis in AXES if one.everywhere[axis] < -0.05]
        if lost:
            difference, amount = one.worst
            worst = f"worst single amount: {points(difference)} at {100 * amount:g} %"
            lines.append(f"- {one.better.model}, {one.better.importance}: {', '.join(lost)} ({worst})\n")
    if not lines:
        return f"{method.capitalize()} masks lose nowhere in the mean over amounts, FLOPs or latency.\n"
    return f"Where {method} masks lose ({len(lines)} of {len(every)} curves):\n\n" + "".join(lines)


def _numbers(rows: Sequence[Row]) -> str:
    amounts = sorted({row.amount for row in rows if row.amount})
    header = ["model", "importance", "method", "dense", *(f"{100 * amount:g} %" for amount in amounts)]
    dense = {row.model: row.top1 for row in rows if row.method == DENSE}
    found: dict[tuple[str, str, str], dict[float, Row]] = {}
    for row in rows:
        if row.method != DENSE:
            found.setdefault((row.model, row.importance, _how(row)), {})[row.amount] = row
    parts = []
    for title, field in (("Top-1", "top1"), ("FLOPs left", "flops_left"), ("Latency left", "latency_left")):
        digits = 1 if field == "top1" else 2
        lines = []
        for (model, importance, method), by_amount in found.items():
            start = dense.get(model) if field == "top1" else 1.0
            values = [getattr(by_amount[a], field) if a in by_amount else None for a in amounts]
            lines.append([model, importance, method, *(_number(value, digits) for value in (start, *values))])
        parts.append(f"### {title}\n\n{markdown_table(header, lines)}")
    return "\n".join(parts)


def _how(row: Row) -> str:
    return described(row.method, row.ranking, "" if row.side == "input" else f"{row.side} side", row.repair)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

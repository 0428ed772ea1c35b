"""Pictures of the accuracy table: accuracy against amount, FLOPs and latency, by importance, ranking and method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from .gains import AXES, Curve, curves
from .rows import METHODS, Row, ranked

__all__ = ["write_plots"]

#: Colours that colour-blind readers tell apart (Okabe and Ito), and marks that differ too.
_STYLE = {
    "unconstrained": ("#0072B2", "o", "-"),
    "constrained": ("#D55E00", "s", "--"),
    "contiguous": ("#009E73", "^", "-."),
}
_FILLS = ("full", "none", "right", "bottom")  # of marks: not repaired, then one for each way of repair
_LABELS = {
    "amount": "channels masked",
    "flops_left": "FLOPs / dense",
    "latency_left": "latency / dense (one image, one thread)",
}
_COLOURS = 48  # of a picture
_GRID = 41  # places of an average curve

Line = tuple[np.ndarray, np.ndarray]
Panel = tuple[str, str, str]  # title (importance and ranking), method, repair


def write_plots(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A picture for each network (and side, and set of images), and one of the mean over networks. Written atomically.

    Of an average curve, FLOPs and latency are a common scale on which each network's curve is interpolated."""
    import matplotlib

    matplotlib.use("Agg")
    found = curves(rows)
    written = []
    sets = list(dict.fromkeys(_set_of(curve) for curve in found))
    for name in sets:
        some = [curve for curve in found if _set_of(curve) == name]
        models = list(dict.fromkeys(curve.model for curve in some))
        for model in models:
            every = [curve for curve in some if curve.model == model]
            for number, data in enumerate(dict.fromkeys(curve.points[0].data for curve in every)):  # of sizes, say
                mine = [curve for curve in every if curve.points[0].data == data]
                title = f"{model}: top-1 in percent on {mine[0].points[0].evaluated:,} images"
                path = folder / f"{'-'.join([_safe(model), *name, *([str(number + 1)] if number else [])])}.png"
                _draw(path, title, {_panel_of(curve): _along(curve) for curve in mine}, mine[0].dense)
                written.append(path)
        if len(models) > 1:
            path = folder / f"{'-'.join(['mean', *name])}.png"
            title = f"top-1 / dense top-1, mean of {len(models)} networks"
            first = {model: next(c.points[0].data for c in some if c.model == model) for model in models}
            some = [curve for curve in some if curve.points[0].data == first[curve.model]]
            _draw(path, title, _averages(some, len(models)), 1.0)
            written.append(path)
    return written


def _set_of(curve: Curve) -> tuple[str, ...]:
    """What pictures are of: curves of one side, on as many images, used alike."""
    row = curve.points[0]
    return (curve.side, str(row.images or "all"), *([_safe(row.use)] if row.use else []))


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def _panel_of(curve: Curve) -> Panel:
    title = ", ".join(filter(None, (curve.importance, ranked(curve.ranking))))
    return title, curve.method, curve.repair


def _along(curve: Curve) -> dict[str, Line]:
    return {axis: curve.along(axis) for axis in AXES}


def _averages(found: Sequence[Curve], models: int) -> dict[Panel, dict[str, Line]]:
    """By panel, the mean of the networks' relative accuracies, where all networks have some."""
    averages = {}
    for key in dict.fromkeys(map(_panel_of, found)):
        some = [curve for curve in found if _panel_of(curve) == key]
        if len(some) == models:
            averages[key] = {axis: _average([curve.along(axis) for curve in some], some) for axis in AXES}
    return averages


def _average(lines: Sequence[Line], found: Sequence[Curve]) -> Line:
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.linspace(low, high, _GRID)
    means = [np.interp(grid, x, y) / curve.dense for (x, y), curve in zip(lines, found, strict=True)]
    return grid, np.mean(means, axis=0)


def _draw(path: Path, title: str, lines: Mapping[Panel, Mapping[str, Line]], dense: float) -> None:
    from matplotlib import pyplot
    from PIL import Image

    titles = list(dict.fromkeys(title for title, _, _ in lines))
    ways = [(method, repair) for repair in dict.fromkeys(repair for _, _, repair in lines) for method in METHODS]
    down = max(1, len(titles))
    figure, axes = pyplot.subplots(down, len(AXES), figsize=(12, 1.1 + 2.5 * down), squeeze=False, sharey=True)
    for row, name in zip(axes, titles, strict=False):
        here = {key[1:]: line for key, line in lines.items() if key[0] == name}
        for panel, axis in zip(row, AXES, strict=True):
            _panel(panel, axis, {way: here[way][axis] for way in ways if way in here}, dense)
        row[0].set_ylabel(name, fontweight="bold")
    for panel, axis in zip(axes[-1], AXES, strict=True):
        panel.set_xlabel(_LABELS[axis])
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    across = min(len(handles), len(METHODS)) or 1
    figure.legend(list(handles.values()), list(handles), loc="upper right", ncols=across, frameon=False)
    above = 0.1 + 0.2 * max(1, -(-len(handles) // across))
    figure.tight_layout(rect=(0, 0, 1, 1 - above / figure.get_figheight()))
    try:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, format="png")
        with replacing(path) as draft, Image.open(drawn) as image:
            image.convert("RGB").quantize(_COLOURS).save(draft, format="png", optimize=True)  # a third of the size
    finally:
        pyplot.close(figure)


def _panel(panel: Any, axis: str, lines: Mapping[tuple[str, str], Line], dense: float) -> None:
    panel.axhline(dense, color="#888888", linewidth=1)
    repairs = list(dict.fromkeys(["", *(repair for _, repair in lines)]))
    for (method, repair), (x, y) in lines.items():
        color, mark, dash = _STYLE[method]
        which = repairs.index(repair)
        marks: dict[str, Any] = {"marker": mark, "markersize": 4 + which, "fillstyle": _FILLS[which % len(_FILLS)]}
        label = f"{method} + {repair}" if repair else method
        every = 5 if len(x) == _GRID else 1  # places of average curves are close
        panel.plot(x, y, dash, color=color, label=label, markevery=every, linewidth=1.5 - 0.5 * bool(which), **marks)
    if axis != "amount":
        panel.invert_xaxis()  # masked more to the right, as with amounts
    panel.set_ylim(bottom=0)
    panel.grid(color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)

"""A picture of the speed table: a panel for each setting, a line for each model, a mark for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .rows import VARIANTS, Row, grouped

#: Colours that colour-blind readers tell apart (Okabe and Ito), and marks that differ too.
_STYLE = {
    "constrained": ("#009E73", "s"),
    "baseline": ("#D55E00", "X"),
    "gather": ("#E69F00", "D"),
    "auto": ("#0072B2", "o"),
    "contiguous": ("#CC79A7", "^"),
    "ideal": ("#000000", "|"),
}


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw the rows that have a time into ``path``; its ending names the format. Written atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.ratio is not None]
    settings = list(dict.fromkeys(str(row.setting) for row in timed)) or [""]
    models = list(dict.fromkeys(row.model for row in timed))
    across = min(2, len(settings))
    down = -(-len(settings) // across)
    size = (1 + 5.5 * across, 1.3 + down * (0.8 + 0.32 * max(1, len(models))))
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, sharex=True, sharey=True)
    for axis, name in zip(axes.flat, settings, strict=False):
        _panel(axis, name, models, grouped([row for row in timed if str(row.setting) == name]))
    for axis in axes.flat[len(settings) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("time / time of the unpruned model")
    handles, labels = _legend(axes.flat)
    lines = 1 if across > 1 else 2
    figure.legend(handles, labels, loc="upper center", ncols=-(-len(labels) // lines) or 1, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 * lines / size[1]))
    try:
        with replacing(path) as draft:
            figure.savefig(draft, dpi=130, format=path.suffix[1:].lower())
    finally:
        pyplot.close(figure)


def _panel(axis: Any, title: str, models: Sequence[str], groups: Sequence[Mapping[str, Row]]) -> None:
    axis.axvline(1, color="#888888", linewidth=1)
    for variant, (color, mark) in _STYLE.items():
        found = [group[variant] for group in groups if variant in group]
        if not found:
            continue
        times = [row.ratio for row in found]
        places = [models.index(row.model) for row in found]
        # half the interquartile range to each side, on the scale of the ratio
        spread = [(row.ratio or 0) * (row.iqr_ms or 0) / (row.median_ms or 1) / 2 for row in found]
        axis.errorbar(times, places, xerr=spread, fmt="none", ecolor=color, alpha=0.35, linewidth=2)
        filled = {} if mark == "|" else {"edgecolors": "white", "linewidths": 0.5}
        size = 160 if mark == "|" else 48
        axis.scatter(times, places, color=color, marker=mark, s=size, label=variant, zorder=3, **filled)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_yticks(range(len(models)), models)
    axis.set_ylim(len(models) - 0.5, -0.5)
    axis.grid(axis="x", color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Each variant once, in the order of ``VARIANTS``."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = [name for name in VARIANTS if name in found]
    return [found[name] for name in names], names

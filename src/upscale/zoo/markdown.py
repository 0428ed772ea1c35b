"""Coverage tables as one Markdown document: a summary, what failed and why, then every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..markdown import table as markdown_table
from .rows import Row
from .show import Totals, parameters_removed, percent, seconds

_INTRODUCTION = """\
# Which models can be pruned?

Every model has random weights, with random batch norm statistics, and is masked by magnitude, exported with
`upscale.export` and compared with the masked model itself on random inputs at the traced batch size and at another.
*equal* is the largest relative error over all outputs: at most 1e-10 in float64, 1e-4 in float32, 1e-5 where a
float64 model goes through float32 inside (marked "float32 inside").
*masked channels removed* counts pairs of a layer and a masked channel: how many the exported layers lack.
*seconds* are those of `torch.export` and of everything after it, verification left out, on one thread.
*barriers* are operations whose channels were kept.

Made by `upscale zoo`, see `upscale zoo --help`.
"""

_SUMMARY = (
    "suite",
    "models",
    "exported",
    "equal",
    "largest error",
    "masked channels removed",
    "parameters removed (median)",
    "FLOPs removed (median)",
    "export / torch.export (time)",
)
_MODEL = (
    "model",
    "equal",
    "dtype",
    "parameters",
    "FLOPs",
    "masked channels removed",
    "reads",
    "barriers",
    "seconds",
    "MB",
)


def write_markdown(path: Path, rows: Sequence[Row]) -> None:
    """Write the document of ``rows`` to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(rows), encoding="utf-8")


def document(rows: Sequence[Row]) -> str:
    """The whole document. Rows of different settings get sections of their own."""
    parts = [_INTRODUCTION]
    settings = list(dict.fromkeys(_settings(row) for row in rows))
    parts += [_section(name, [row for row in rows if _settings(row) == name]) for name in settings]
    return "\n".join(parts).rstrip() + "\n"


def _settings(row: Row) -> str:
    sides = {"input": "inputs", "output": "outputs", "both": "inputs and outputs"}
    reads = "" if row.reads_asked == "auto" else f", reads: {row.reads_asked}"
    return f"{100 * row.amount:g} % of each layer's {sides[row.side]}, {row.method}{reads} (version {row.version})"


def _section(settings: str, rows: Sequence[Row]) -> str:
    suites = list(dict.fromkeys(row.suite for row in rows))
    by_suite = {suite: [row for row in rows if row.suite == suite] for suite in suites}
    lines = [_total(name, Totals.of(some)) for name, some in by_suite.items()]
    if len(suites) > 1:
        lines.append(_total("**all**", Totals.of(rows)))
    parts = [f"## {settings}\n", markdown_table(_SUMMARY, lines, numbers=False), _failures(rows)]
    for suite, some in by_suite.items():
        good = [row for row in some if row.good]
        if good:
            parts.append(f"### {suite}\n\n{markdown_table(_MODEL, map(_model, good), numbers=False)}")
    return "\n".join(part for part in parts if part)


def _total(name: str, totals: Totals) -> list[str]:
    return [
        name,
        str(totals.models),
        str(totals.exported),
        str(totals.equal),
        "" if totals.error is None else f"{totals.error:.0e}",
        "" if totals.removed is None else f"{percent(totals.removed)} of {totals.masked:,}",
        percent(totals.parameters),
        percent(totals.flops),
        "" if totals.ratio is None else f"{totals.ratio:.2f}",
    ]


def _failures(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if not row.good]
    if not bad:
        return ""
    kinds = Counter(row.reason.partition(":")[0] for row in bad)
    order = sorted(bad, key=lambda row: (-kinds[row.reason.partition(":")[0]], row.reason, row.suite, row.model))
    cells = ([row.suite, row.model, row.exported, row.stage, row.reason] for row in order)
    header = ("suite", "model", "exported", "stage", "reason")
    return "### Not equal, or not exported\n\n" + markdown_table(header, cells, numbers=False)


def _model(row: Row) -> list[str]:
    return [
        row.model,
        f"{row.error:.0e}",
        row.dtype,
        f"{_millions(row.parameters_before)} M, -{percent(parameters_removed(row))}",
        f"-{percent(row.flops_removed)}" if row.flops_removed is not None else "",
        f"{percent(row.channels_removed)} of {row.masked_channels}",
        row.reads.replace(":", " "),
        row.barriers.replace(":", " ").replace("aten.", ""),
        f"{seconds(row.capture_s)} + {seconds(row.export_s)}",
        f"{row.peak_mb or 0:.0f}",
    ]


def _millions(count: int | None) -> str:
    return f"{(count or 0) / 1e6:.2f}"

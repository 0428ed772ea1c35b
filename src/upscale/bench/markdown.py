"""The speed table as one Markdown document: a section for each setting, a line for each model."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..markdown import escaped
from ..markdown import table as markdown_table
from .rows import VARIANTS, Place, Row, Setting, grouped
from .show import QUOTIENTS, kilobytes, milliseconds, quotient, ratio, remarks

_INTRODUCTION = """\
# How fast is a pruned model?

Made by `{command}`.

Every model has random weights that keep the signal up, with batch norm statistics near what they see, and is masked by
L2 magnitude. Its variants are timed side by side in a process of its own: every round runs each of them once, in
rotated order, after rounds of warm-up. A number is the median over rounds of (the variant's time / the unpruned
model's in the same round): below 1 is faster than unpruned. The unpruned model runs under a second name too: what
*noise* differs from 1 by is what the machine adds.

- **unpruned**: the model as it was, in milliseconds a call.
- **constrained**: layers on a shared tensor mask the same channels; no copies, but a worse choice of channels.
- **baseline**, **gather**, **auto**: every layer masks channels of its own, and the export reads them channel by
  channel, by one `index_select` each, or as the planner chooses.
- **contiguous**: masks chosen so that every read is a contiguous slice, exported with auto.
- **ideal**: the floor. The operators and shapes of auto, with every read of a subset replaced by a compact tensor over
  the same memory, without a copy; its values are wrong.
- **copied**: kB written by copying operators in one call, counted by torch's profiler (a model's own concatenations
  are among them).

glibc is told to keep freed memory (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`), as jemalloc and tcmalloc do:
otherwise page faults, not the model, decide about the time at batch 8.

Empty cells: not measured; the reasons stand below each table, as does every warning. *Mean* is the geometric one.
"""

_HEADER = (
    "model",
    "unpruned ms",
    *VARIANTS[1:],
    *(f"{over} / {under}" for over, under in QUOTIENTS),
    "copied kB: gather",
    "auto",
    "kernels: unpruned",
    "gather",
    "auto",
    "noise",
)


def write_markdown(path: Path, rows: Sequence[Row], command: str, picture: Path | None = None) -> None:
    """Write the document of ``rows`` to ``path``. ``picture``: of the same rows, shown on top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = "" if picture is None else Path(os.path.relpath(picture, path.parent)).as_posix()
    path.write_text(document(rows, command, shown), encoding="utf-8")


def document(rows: Sequence[Row], command: str, picture: str = "") -> str:
    """The whole document; rows of another machine or version get sections of their own."""
    parts = [_INTRODUCTION.format(command=command)]
    if picture:
        parts.append(f"![Time of each variant over that of the unpruned model]({picture})\n")
    for place in dict.fromkeys(row.place for row in rows):
        here = [row for row in rows if row.place == place]
        parts.append(_place(place))
        for key in dict.fromkeys(_of_section(row.setting) for row in here):
            parts.append(_section([row for row in here if _of_section(row.setting) == key]))
    return "\n".join(parts).rstrip() + "\n"


def _place(place: Place) -> str:
    return f"## {place.machine}\n\ntorch {place.torch}, upscale {place.version}\n"


def _of_section(setting: Setting) -> tuple[object, ...]:
    """What the lines of one table have in common: all but the size of images."""
    s = setting
    return (s.amount, s.batch, s.memory_format, s.backend, s.threads, s.device, s.dtype, s.side, s.seed, s.round_to)


def _section(rows: Sequence[Row]) -> str:
    first = rows[0]
    groups = grouped(rows)
    lines = [_line(group) for group in groups]
    if len(lines) > 1:
        lines.append(_mean(groups))
    notes = [f"- {escaped(text)}" for text in remarks(rows)]
    parts = [f"### {_title(first)}\n", markdown_table(_HEADER, lines)]
    return "\n".join([*parts, *([*notes, ""] if notes else [])])


def _title(row: Row) -> str:
    threads = "one thread" if row.threads == 1 else f"{row.threads} threads"
    format_ = row.memory_format.replace("_", " ")
    what = f"{100 * row.amount:g} % of each layer's {row.side}s, batch {row.batch}, {format_}"
    multiples = f", channels in multiples of {row.round_to}" if row.round_to > 1 else ""
    return f"{what}, {row.backend}, {threads}, {row.dtype} on {row.device}{multiples}"


def _line(group: Mapping[str, Row]) -> list[str]:
    first = next(iter(group.values()))
    unpruned = group.get("unpruned")
    cells = [first.model, milliseconds(unpruned.median_ms if unpruned else None)]
    cells += [ratio(group[name].ratio) if name in group else "" for name in VARIANTS[1:]]
    cells += [ratio(quotient(group, over, under)) for over, under in QUOTIENTS]
    cells += [kilobytes(group[name].copied_bytes) if name in group else "" for name in ("gather", "auto")]
    kernels = [group[name].kernels if name in group else None for name in ("unpruned", "gather", "auto")]
    cells += ["" if count is None else str(count) for count in kernels]
    return [*cells, ratio(unpruned.control if unpruned else None)]


def _mean(groups: Sequence[Mapping[str, Row]]) -> list[str]:
    """Geometric means over the models that have the number."""
    cells = ["**mean**", ""]
    cells += [_geometric(group[name].ratio for group in groups if name in group) for name in VARIANTS[1:]]
    cells += [_geometric(quotient(group, over, under) for group in groups) for over, under in QUOTIENTS]
    return [*cells, *[""] * (len(_HEADER) - len(cells))]


def _geometric(values: Iterable[float | None]) -> str:
    known = [value for value in values if value]
    return ratio(statistics.geometric_mean(known)) if known else ""

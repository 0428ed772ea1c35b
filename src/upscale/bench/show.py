"""The speed table as text: one line a job while it runs, all of them and what is doubtful at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .rows import VARIANTS, Row, grouped

#: Quotients of two variants' ratios that are shown.
QUOTIENTS = (("auto", "ideal"), ("auto", "baseline"), ("auto", "gather"))


def quotient(group: Mapping[str, Row], over: str, under: str) -> float | None:
    """How one variant's time compares with another's; None where one of them has none."""
    first, second = (group[name].ratio if name in group else None for name in (over, under))
    return None if first is None or not second else first / second


def ratio(value: float | None) -> str:
    """``"0.83"``, or "" for None."""
    return "" if value is None else f"{value:.2f}"


def milliseconds(value: float | None) -> str:
    """Three digits, or "" for None."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def kilobytes(value: int | None) -> str:
    """``"1,204"``, or "" for None."""
    return "" if value is None else f"{value / 1000:,.0f}"


def line(rows: Sequence[Row]) -> str:
    """What was measured together in one line, for a console of rich's."""
    (group,) = grouped(rows)
    first = rows[0]
    head = f"{escape(first.model):24} {str(first.setting):38}"
    timed = [row for row in rows if row.median_ms is not None]
    if not timed:
        return f"[red]{head}[/] {escape(first.stage)}: {escape(first.reason)}"
    told = [f"{row.variant} {ratio(row.ratio)}" for row in timed if row.variant != "unpruned"]
    color = "yellow" if any(row.warning for row in timed) else "green"
    return f"[{color}]{head}[/] {milliseconds(group['unpruned'].median_ms)} ms; " + ", ".join(told)


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table of rich's for each setting: time relative to the unpruned model's."""
    titles = dict.fromkeys(_title(row) for row in rows)
    return [_table(title, [row for row in rows if _title(row) == title]) for title in titles]


def _title(row: Row) -> str:
    return f"{row.setting}: time / unpruned"


def _table(title: str, rows: Sequence[Row]) -> Table:
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("model", overflow="fold")  # it gives way, numbers do not
    headings = ("ms", "constr.", "base", "gather", "auto", "contig.", "ideal", "/ideal")
    for name in headings:
        shown.add_column(name, justify="right", no_wrap=True)
    for group in grouped(rows):
        unpruned = group.get("unpruned")
        cells = [escape(next(iter(group.values())).model), milliseconds(unpruned.median_ms if unpruned else None)]
        cells += [ratio(group[name].ratio) if name in group else "" for name in VARIANTS[1:]]
        cells += [ratio(quotient(group, "auto", "ideal"))]
        shown.add_row(*cells)
    return shown


def remarks(rows: Sequence[Row]) -> list[str]:
    """What went wrong and what is doubtful, each once: "setting, variants: text (models)"."""
    said: dict[tuple[str, str, str], list[str]] = {}
    for group in grouped(rows):
        told: dict[str, list[str]] = {}
        for name, row in group.items():
            for text in (_failure(row), *row.warning.split("; ")):
                if text:
                    told.setdefault(text, []).append(name)
        first = next(iter(group.values()))
        timed = [name for name, row in group.items() if row.median_ms is not None]
        for text, names in told.items():
            who = "all variants" if len(names) == len(timed) > 1 else ", ".join(names)
            said.setdefault((str(first.setting), who, text), []).append(first.model)
    return [f"{setting}, {who}: {text} ({', '.join(models)})" for (setting, who, text), models in said.items()]


def _failure(row: Row) -> str:
    return f"{row.stage}: {row.reason}" if row.stage and row.stage != "make" else row.reason


def failed(rows: Sequence[Row]) -> bool:
    """Whether a model could not be measured at all, or gave wrong values: not, whether a variant is not there."""
    return any(row.reason and (row.variant in ("unpruned", "auto")) for row in rows)

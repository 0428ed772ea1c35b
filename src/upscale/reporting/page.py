"""A report as one self-contained page. The template is jinja2's, which escapes whatever comes from the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import replacing
from ..report import Report
from .data import as_data
from .numbers import change, microseconds, percent, short

OPEN = 40  # spaces whose pictures are unfolded at first


def write_page(report: Report, path: str | os.PathLike[str], latency: Mapping[str, float] | None = None) -> None:
    """See :meth:`upscale.report.Report.to_html`.

    Raises:
        InputError: as there, or ``report`` is no report (one that was pickled comes back as its text).
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target} is a folder: give the name of a file, such as {target / 'report.html'}")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target.name}: the folder {target.parent} does not exist; make it first")
    text = render_page(report, latency)
    try:
        with replacing(target) as draft:
            draft.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error


def render_page(report: Report, latency: Mapping[str, float] | None = None) -> str:
    """The page as text; see :func:`write_page`."""
    if isinstance(report, str):
        raise InputError(
            "this report is its text only: pickling keeps no more. Write the page where the model is exported, or "
            "export it again"
        )
    if not isinstance(report, Report):
        raise InputError(f"a page is made of the report of an exported model, not of a {type(report).__name__}")
    times = _checked_latency(latency)
    template = _template()
    return template.render(_contents(report, times))


def _checked_latency(latency: Mapping[str, float] | None) -> dict[str, float]:
    times = {}
    for name, value in (latency or {}).items():
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if not isinstance(name, str) or not (0 < number < math.inf):
            raise InputError(f"latency[{name!r}] = {value!r}: give names and positive numbers of milliseconds")
        times[name] = float(number)
    return times


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("report.to_html needs jinja2: pip install 'upscale-pruning[report]'") from error
    here = resources(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
    )
    environment.filters.update(short=short, us=microseconds, change=change)
    environment.globals.update(percent=percent)
    return environment.get_template("page.html.j2")


def _contents(report: Report, latency: dict[str, float]) -> dict[str, Any]:
    """What the template shows. Pictures need markupsafe, which comes with jinja2."""
    from markupsafe import Markup

    from .chart import draw_chart

    data = as_data(report)
    cards = _cards(report, data)
    return {
        "style": Markup((resources(__package__) / "page.css").read_text(encoding="utf-8")),
        "data": data,
        "latency": latency,
        "chart": Markup("") if report.plan is None else draw_chart(report.plan, report.layers),
        "shared": [card for card in cards if card["shared"]],
        "others": [card for card in cards if not card["shared"]],
        "copies": sum(r["count"] for r in data["reads"] if r["copies"]),
        "reads": sum(r["count"] for r in data["reads"]),
        "cost": sum(r["nanoseconds"] or 0.0 for r in data["reads"]),
        "most": {
            "parameters": max((row["parameters"]["before"] for row in data["layers"]), default=0) or 1,
            "flops": max((row["flops"]["before"] for row in data["layers"]), default=0) or 1,
            "cost": max((r["nanoseconds"] or 0.0 for r in data["reads"]), default=0.0) or 1,
            "latency": max(latency.values(), default=0.0) or 1,
        },
        "bound": sum(order["bound"] for order in data["orders"]),
        "unserved": sum(order["cost"] for order in data["orders"]),
        "proven": sum(order["proven"] for order in data["orders"]),
    }


def _cards(report: Report, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Each space with its pictures. ``shared``: several readers, one of which picks channels."""
    from .matrix import after, before, columns_for, sampling

    spaces = () if report.plan is None else report.plan.spaces
    columns = columns_for(spaces)
    cards = []
    for number, (space, facts) in enumerate(zip(spaces, data["spaces"], strict=True)):
        picks = any(r["wanted"] < r["present"] for r in facts["readers"])
        parts = {side: sum(r["slices"][side] for r in facts["readers"]) for side in ("before", "after")}
        label = f"{space.name}: channels that each of {len(space.readers)} readers takes, in {{}}: {{}} slices in all"
        cards.append(
            {
                **facts,
                "anchor": f"space-{number}",
                "shared": picks and len(space.readers) > 1,
                "slices": parts,
                "step": sampling(space, columns),
                "before": before(space, columns, label.format("original order", parts["before"])),
                "after": after(space, columns, label.format("chosen order", parts["after"])),
                "width": 100 * len(space.order) / max(1, space.channels),
            }
        )
    folded = [card["anchor"] for card in cards if card["shared"]][OPEN:]
    return [{**card, "open": card["anchor"] not in folded} for card in cards]

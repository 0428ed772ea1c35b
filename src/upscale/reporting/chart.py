"""The network as a graph of its spaces, drawn like live ranges: a row per call, a lane per space.

A lane runs from the first call that makes channels of its space to the last that reads any. A disc is a call that
makes channels, a ring one that reads them where they lie, a diamond one that copies them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from ..plan import Plan
from ..report import LayerRow
from .data import FREE
from .numbers import change

ROW, LANE, LEFT = 20, 14, 10  # pixels
LETTER = 7.3  # pixels, of the widest usual monospaced font at the page's size
LONGEST = 44  # letters of a name


@dataclass
class _Row:
    """A call: the spaces that it makes channels of, and those it reads, with whether it copies."""

    layer: str
    writes: list[int] = field(default_factory=list)
    reads: dict[int, bool] = field(default_factory=dict)


def draw_chart(plan: Plan, layers: Sequence[LayerRow]) -> Markup:
    """An SVG element; its lanes are links to ``#space-0``, ``#space-1``, ... Empty where there are no spaces."""
    sizes = {row.name: f"in {change(row.inputs)}, out {change(row.outputs)}" for row in layers}
    rows = _rows(plan)
    if not rows:
        return Markup("")
    spans = _spans(rows)
    lanes = _lanes(spans)
    x = {space: LEFT + LANE * lane for space, lane in lanes.items()}
    text = LEFT + LANE * (max(lanes.values()) + 1) + 4
    side = round(text + LETTER * min(LONGEST, max(len(r.layer) for r in rows)) + 12)
    shown = {number: size for number, row in enumerate(rows) if (size := sizes.get(row.layer))}
    width = round(side + LETTER * max(map(len, shown.values()), default=0) + 8)
    height = ROW * len(rows) + 4
    parts = [_lane(x[s], a, b, s, plan.spaces[s].name) for s, (a, b) in spans.items()]
    parts += [_call(row, _height(number), x, text) for number, row in enumerate(rows)]
    parts += [
        Markup('<text class="size" x="{}" y="{}">{}</text>').format(side, _height(number) + 4, size)
        for number, size in shown.items()
    ]
    return Markup(
        '<svg class="chart" role="group" aria-label="The calls of the network in order, and the shared tensors they '
        'read and write" width="{w}" height="{h}" viewBox="0 0 {w} {h}">{body}</svg>'
    ).format(w=width, h=height, body=Markup("").join(parts))


def _rows(plan: Plan) -> list[_Row]:
    """Calls in the order of the captured graph."""
    rows: dict[int, _Row] = {}
    for number, space in enumerate(plan.spaces):
        for port in space.producers:
            rows.setdefault(port.step, _Row(port.layer)).writes.append(number)
        for reader in space.readers:
            read = plan.reads.get(reader.key[0], {}).get(reader.key[1])
            reads = rows.setdefault(reader.step, _Row(reader.layer)).reads
            reads[number] = reads.get(number, False) or (read is not None and read.kind not in FREE)
    return [rows[step] for step in sorted(rows)]


def _spans(rows: list[_Row]) -> dict[int, tuple[int, int]]:
    """First and last row of every space, in the order of their first."""
    touched: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        for space in dict.fromkeys([*row.reads, *row.writes]):
            touched[space].append(number)
    return {space: (numbers[0], numbers[-1]) for space, numbers in touched.items()}


def _lanes(spans: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """The leftmost lane that is free for all of a span; spans that touch in a row get two lanes."""
    ends: list[int] = []
    lanes = {}
    for space, (first, last) in sorted(spans.items(), key=lambda item: (item[1][0], -item[1][1])):
        lane = next((i for i, end in enumerate(ends) if end < first), len(ends))
        if lane == len(ends):
            ends.append(last)
        ends[lane] = last
        lanes[space] = lane
    return lanes


def _height(row: int) -> int:
    """The middle of a row, in pixels from the top."""
    return row * ROW + ROW // 2 + 2


def _lane(x: int, first: int, last: int, space: int, name: str) -> Markup:
    top, bottom = _height(first), _height(last)
    return Markup(
        '<a href="#space-{space}"><title>{name}</title>'
        '<path class="touch" d="M{x} {top}V{bottom}"/><path class="lane" d="M{x} {top}V{bottom}"/></a>'
    ).format(space=space, name=name, x=x, top=top, bottom=bottom)


def _call(row: _Row, y: int, x: Mapping[int, int], text: int) -> Markup:
    places = [x[s] for s in (*row.reads, *row.writes)]
    parts = [Markup('<path class="link" d="M{} {y}H{}"/>').format(min(places), text - 4, y=y)]
    for space, copies in row.reads.items():
        shape = '<path class="copies" d="M{x} {top}l5 5-5 5-5-5z"/>' if copies else '<circle class="reads" {at} r="4"/>'
        at = Markup('cx="{}" cy="{}"').format(x[space], y)
        parts.append(Markup(shape).format(x=x[space], top=y - 5, at=at))
    for space in row.writes:
        radius = 2 if space in row.reads else 4
        parts.append(Markup('<circle class="writes" cx="{}" cy="{}" r="{}"/>').format(x[space], y, radius))
    name = row.layer if len(row.layer) <= LONGEST else "…" + row.layer[1 - LONGEST :]
    parts.append(
        Markup('<text x="{}" y="{}"><title>{}</title>{}</text>').format(text, y + 4, row.layer, name),
    )
    return Markup("<g>{}</g>").format(Markup("").join(parts))

"""Pictures of a space: which reader takes which channels, as rows of rectangles painted run by run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from markupsafe import Markup

from ..plan import Space

COLUMNS = (96, 480)  # fewest and most that one picture has
STRIPES = 500_000  # columns times rows painted in one page, about


def columns_for(spaces: Sequence[Space]) -> int:
    """How many columns a picture may have at most, so that the page stays small whatever the network."""
    rows = sum(len(space.readers) for space in spaces)
    return max(COLUMNS[0], min(COLUMNS[1], STRIPES // max(1, rows)))


def sampling(space: Space, columns: int) -> int:
    """Every how many-th channel is painted: 1 where all of them have room."""
    return -(-space.channels // columns)


def before(space: Space, columns: int, label: str) -> Markup:
    """All channels in original order; those that went leave a gap."""
    stays = set(space.order)
    return _picture(space, [c if c in stays else -1 for c in range(space.channels)], sampling(space, columns), label)


def after(space: Space, columns: int, label: str) -> Markup:
    """The channels that stay, in their order."""
    return _picture(space, list(space.order), sampling(space, columns), label)


def _picture(space: Space, order: list[int], step: int, label: str) -> Markup:
    """Rows are one unit high, columns one unit wide; the page stretches both. Stripes are strokes: short to write."""
    shown = order[::step]
    held, wanted = [], []
    for row, reader in enumerate(space.readers):
        present = set(space.order if reader.present is None else reader.present)
        mine = set(reader.wanted)
        held.append(_stripes(row, [c in present for c in shown]))
        wanted.append(_stripes(row, [c in mine for c in shown]))
    return Markup(
        '<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" preserveAspectRatio="none">'
        '<path class="held" d="{held}"/><path class="wanted" d="{wanted}"/></svg>'
    ).format(
        label=label,
        width=max(1, len(shown)),
        height=len(space.readers),
        held="".join(held),
        wanted="".join(wanted),
    )


def _stripes(row: int, flags: Iterable[bool]) -> str:
    """One path command per run of set flags."""
    parts, place, last = [], 0, None
    for flag, run in groupby(flags):
        length = sum(1 for _ in run)
        if flag:
            parts.append(f"M{place} {row}.5h{length}" if last is None else f"m{place - last} 0h{length}")
            last = place + length
        place += length
    return "".join(parts)

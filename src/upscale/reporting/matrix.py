"""Pictures of a space: which reader takes which channels, as rows of rectangles painted run by run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from ..plan import Space
from ..plan.shared import flags

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
    every = np.arange(space.channels)
    return _picture(space, np.where(flags(every, space.order), every, -1), columns, label)


def after(space: Space, columns: int, label: str) -> Markup:
    """The channels that stay, in their order."""
    return _picture(space, np.array(space.order, dtype=np.int64), columns, label)


def _picture(space: Space, order: np.ndarray, columns: int, label: str) -> Markup:
    """Rows are one unit high, columns one unit wide; the page stretches both. Stripes are strokes: short to write."""
    shown = order[:: sampling(space, columns)]
    held = [_stripes(row, flags(shown, reader.present)) for row, reader in enumerate(space.readers)]
    wanted = [_stripes(row, flags(shown, reader.wanted)) for row, reader in enumerate(space.readers)]
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


def _stripes(row: int, chosen: np.ndarray) -> str:
    """One path command per run of set flags: to its first column, and along it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))).tolist()
    parts: list[str] = []
    last = 0
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        parts.append(f"m{start - last} 0h{end - start}" if parts else f"M{start} {row}.5h{end - start}")
        last = end
    return "".join(parts)

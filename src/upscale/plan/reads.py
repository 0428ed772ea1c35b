"""Choosing how a read is done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cost import ReadCost
from .model import Mode, Piece

# A smaller layer is worth something by itself: reading more than is wanted must save this share of what picking costs,
# and this many nanoseconds, less than which cannot be told from noise.
ADVANTAGE, NOTICEABLE = 0.2, 5000.0


def choose_read(
    sources: Sequence[str],
    sizes: Sequence[int],
    which: np.ndarray,
    indices: np.ndarray,
    fill: np.ndarray,
    mode: Mode,
    cost: ReadCost,
) -> tuple[str, tuple[Piece, ...]]:
    """Kind and pieces of a read.

    ``which[j]``, ``indices[j]``: tensor (index into ``sources``, -1 for a constant ``fill[j]``) and place of the
    j-th wanted channel. ``sizes``: channels each source holds. ``cost``: of reading from the first source.
    """
    pieces = _cut(sources, which, indices, fill)
    if not (which >= 0).any():
        return "concat", (Piece(sources[0], ()), *pieces)
    if len(pieces) == 1 and pieces[0].source is not None:
        whole = len(pieces[0].indices) == sizes[0] and pieces[0].indices[0] == 0
        if whole:
            return "whole", pieces
        if mode == "auto":
            return "view", pieces
    if all(p.source is None or len(p.indices) == sizes[sources.index(p.source)] for p in pieces):
        return "concat", pieces  # whole tensors joined: what the original does
    if mode == "baseline":
        return "channelwise", _singles(pieces)
    single, constant = len(sources) == 1, bool((which < 0).any())
    if constant:
        return "concat", pieces
    picking = cost.gather(len(which)) if single else cost.gather(len(which)) + cost.join(len(sources), sum(sizes))
    if mode == "auto" and cost.join(len(pieces), len(which)) < picking:
        return "concat", pieces
    if single:
        return "gather", (Piece(sources[0], tuple(indices.tolist())),)
    return "collect", _collected(sources, sizes, which, indices)


def price_of(kind: str, pieces: Sequence[Piece], sizes: Sequence[int], cost: ReadCost) -> float:
    """Nanoseconds of a read as chosen; ``sizes`` as for :func:`choose_read`."""
    count = sum(len(p.indices) for p in pieces)
    if kind == "whole":
        return 0.0
    if kind == "view":
        return cost.view(count)
    if kind == "gather":
        return cost.gather(count)
    if kind == "collect":
        return cost.join(len(sizes), sum(sizes)) + cost.gather(len(pieces[-1].indices))
    return cost.join(len(pieces), count)


def is_worth(saved: float, spent: float) -> bool:
    """Whether ``saved`` nanoseconds are enough to give up ``spent`` by way of larger layers."""
    return saved - spent > max(ADVANTAGE * saved, NOTICEABLE)


def widest_worth(stored: np.ndarray, wanted: np.ndarray, extra: float, cost: ReadCost) -> np.ndarray:
    """``wanted``, or the slice of ``stored`` around it (or all of ``stored``) where reading more costs less.

    ``stored``: the channels as they stand in memory; ``wanted``: those of them that are needed, in that order.
    ``extra``: nanoseconds of computing with one more channel, with zero weights.
    """
    places = np.flatnonzero(np.isin(stored, wanted))
    pieces = 1 + int((np.diff(places) > 1).sum())
    if not len(places) or len(places) == len(stored):
        return wanted
    picked = cost.view(len(places)) if pieces == 1 else min(cost.gather(len(places)), cost.join(pieces, len(places)))
    slices = [stored, stored[places[0] : places[-1] + 1]]
    prices = [(len(s) - len(places)) * extra + (cost.view(len(s)) if len(s) < len(stored) else 0.0) for s in slices]
    best = int(np.argmin(prices))
    return slices[best] if is_worth(picked, prices[best]) else wanted


def _cut(sources: Sequence[str], which: np.ndarray, indices: np.ndarray, fill: np.ndarray) -> tuple[Piece, ...]:
    """Maximal runs of neighbouring channels of one source."""
    if not len(which):
        return ()
    step = (np.diff(which) != 0) | ((which[1:] >= 0) & (np.diff(indices) != 1)) | (np.diff(fill) != 0)
    bounds = np.concatenate([[0], np.flatnonzero(step) + 1, [len(which)]])
    pieces = []
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        source = sources[int(which[a])] if which[a] >= 0 else None
        pieces.append(Piece(source, tuple(indices[a:b].tolist()), float(fill[a]) if source is None else 0.0))
    return tuple(pieces)


def _singles(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    return tuple(Piece(p.source, (i,), p.fill) for p in pieces for i in p.indices)


def _collected(
    sources: Sequence[str], sizes: Sequence[int], which: np.ndarray, indices: np.ndarray
) -> tuple[Piece, ...]:
    """Each source whole, then one piece without a source name "*" holding the places in their concatenation."""
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    whole = tuple(Piece(s, tuple(range(n))) for s, n in zip(sources, sizes, strict=True))
    return (*whole, Piece("*", tuple((offsets[which] + indices).tolist())))

"""Choosing how a read is done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .model import Mode, Piece

# Cutting one more slice costs about as much as copying this many elements (eager dispatch, measured on CPU).
SLICE_COST = 2000.0

MOST_EXTRA = 0.125  # of the wanted channels: more than that is never read for nothing
# The rates of one CPU core in float32, in nanoseconds: a multiply-add, an element gathered, a gather's call.
MULTIPLY_COST, GATHER_COST, CALL_COST = 0.1, 1.5, 5000.0


def whole_is_cheaper(extra: int, wanted: int, per_channel: float, elements: float) -> bool:
    """Whether to read ``extra`` channels too, with zero weights, rather than to gather the ``wanted`` ones.

    ``per_channel``: multiply-adds of one more channel for one example. ``elements``: elements of one channel.
    """
    if extra > MOST_EXTRA * wanted:
        return False
    return extra * per_channel * MULTIPLY_COST < wanted * elements * GATHER_COST + CALL_COST


def choose_read(
    sources: Sequence[str],
    sizes: Sequence[int],
    which: np.ndarray,
    indices: np.ndarray,
    fill: np.ndarray,
    mode: Mode,
    elements: float,
) -> tuple[str, tuple[Piece, ...]]:
    """Kind and pieces of a read.

    ``which[j]``, ``indices[j]``: tensor (index into ``sources``, -1 for a constant ``fill[j]``) and place of the
    j-th wanted channel. ``sizes``: channels each source holds. ``elements``: elements per channel.
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
    if len(sources) == 1 and (which >= 0).all():
        return "gather", (Piece(sources[0], tuple(indices.tolist())),)
    if (which < 0).any():
        return "concat", pieces
    joined = float(sum(sizes)) * elements + (len(sources) + 1) * SLICE_COST
    if mode == "gather" or joined < len(pieces) * SLICE_COST:
        return "collect", _collected(sources, sizes, which, indices)
    return "concat", pieces


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

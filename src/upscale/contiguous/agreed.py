"""Constrained masks of given sizes: what the readers of a channel retain if they all agree about it.

The lowest channels by the sum of all readers' scores are *dead*: nobody keeps them. Readers of the same channels that
mask equally many then read all that is stored. A reader that masks more than the others masks, beyond the dead ones,
the next channels of the same ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .model import Chain, Reader, Space

__all__ = ["Agreed"]


class Agreed:
    """Constrained masks as an arrangement.

    ``orders``: for each chain its stored channels; ``dead``: for each chain and block the others (within a chain, dead
    channels at its two ends count as stored); ``starts`` and
    ``sizes``: for each reader the interval of each of its pieces, in the order of what it sees.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self.totals = [np.zeros(chain.size) for chain in space.chains]
        for reader in space.readers:
            for piece in reader.pieces:
                self.totals[piece.chain] += piece.scores
        gone = _dead(space, self.totals)
        self.orders: list[np.ndarray] = []
        self.dead: list[tuple[np.ndarray, ...]] = []
        for chain, total, flags in zip(space.chains, self.totals, gone, strict=True):
            order, dead = _laid_out(chain, total, flags)
            self.orders.append(order)
            self.dead.append(dead)
        self.starts, self.sizes = [], []
        for reader in space.readers:
            starts, sizes = self._intervals(reader, gone)
            self.starts.append(starts)
            self.sizes.append(sizes)

    def _intervals(self, reader: Reader, gone: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
        """The interval of each piece: all that lives but for as many at its front as the reader still masks."""
        seen = [self.orders[p.chain][p.sees[self.orders[p.chain]]] for p in reader.pieces]
        alive = [~gone[p.chain][s] for p, s in zip(reader.pieces, seen, strict=True)]
        front = [int(np.argmax(a)) if a.any() else 0 for a in alive]  # the dead are at the ends
        left = [s[a] for s, a in zip(seen, alive, strict=True)]
        extra = sum(map(len, left)) - reader.keep
        if all(len(self.space.chains[p.chain].blocks) == 1 for p in reader.pieces):
            ranking = np.concatenate([self.totals[p.chain][s] for p, s in zip(reader.pieces, left, strict=True)])
            owner = np.repeat(np.arange(len(left)), [len(s) for s in left])
            more = np.bincount(owner[np.argsort(ranking, kind="stable")[:extra]], minlength=len(left))
        else:  # masks in the middle of several blocks would part what is kept: the first blocks come first
            before = np.concatenate([[0], np.cumsum([len(s) for s in left])[:-1]])
            more = np.clip(extra - before, 0, [len(s) for s in left])
        starts = [f + int(m) for f, m in zip(front, more, strict=True)]
        return starts, [len(s) - int(m) for s, m in zip(left, more, strict=True)]


def _laid_out(chain: Chain, total: np.ndarray, gone: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Each block by rising total. Dead channels stand at the two ends of the chain, where they are in nobody's way and
    may be called back to life; those of blocks in the middle are not stored."""
    blocks = [block[np.lexsort((total[block], ~gone[block]))] for block in chain.blocks]
    dead = [b[:0] if i in (0, len(blocks) - 1) else b[gone[b]] for i, b in enumerate(blocks)]
    stored = [b[len(d) :] for b, d in zip(blocks, dead, strict=True)]
    if len(blocks) > 1:
        stored[-1] = stored[-1][np.argsort(gone[stored[-1]], kind="stable")]
    return np.concatenate(stored), tuple(dead)


def _dead(space: Space, totals: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Channels that nobody keeps: as many as the least mask of those who see the same; who sees fewest comes first."""
    dead = [np.zeros(chain.size, dtype=bool) for chain in space.chains]
    met = [np.zeros(chain.size, dtype=bool) for chain in space.chains]
    groups = _groups(space)
    budgets = [min(space.readers[r].sees - space.readers[r].keep for r in group) for group in groups]
    views = [_views(space, group[0]) for group in groups]
    for number, view in enumerate(views):
        candidates = [
            (float(totals[k][c]), k, int(c))
            for k, seen in view.items()
            for c in np.flatnonzero((seen > 0) & ~met[k] & ~space.chains[k].pinned)
        ]
        for _, k, c in sorted(candidates):
            if budgets[number] <= 0:
                break
            needs = [(g, int(v[k][c])) for g, v in enumerate(views) if k in v and v[k][c]]
            if all(budgets[g] >= times for g, times in needs):
                dead[k][c] = True
                for g, times in needs:
                    budgets[g] -= times
        for k, seen in view.items():
            met[k] |= seen > 0
    return dead


def _groups(space: Space) -> list[list[int]]:
    """Readers that see the same channels, those that see fewest first."""
    found: dict[tuple[tuple[int, bytes], ...], list[int]] = {}
    for number, reader in enumerate(space.readers):
        key = tuple(sorted((piece.chain, piece.sees.tobytes()) for piece in reader.pieces))
        found.setdefault(key, []).append(number)
    return sorted(found.values(), key=lambda group: (space.readers[group[0]].sees, group[0]))


def _views(space: Space, reader: int) -> dict[int, np.ndarray]:
    """For each chain how often a reader sees each channel."""
    views: dict[int, np.ndarray] = {}
    for piece in space.readers[reader].pieces:
        views[piece.chain] = views.get(piece.chain, np.zeros(len(piece.sees), dtype=np.int64)) + piece.sees
    return views

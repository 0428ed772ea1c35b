"""What the optimiser is given and what it answers: arrays only, no network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Arrangement", "Chain", "Piece", "Reader", "Space"]


@dataclass(frozen=True, eq=False)
class Chain:
    """Channels 0, 1, ..., n - 1 that are laid out together.

    ``blocks``: int64 arrays that share out the channels, in the order in which the blocks stand; a block (the channels
    of one producer of a concatenation) stays together, its channels may stand in any order. ``pinned``: bool (n,),
    channels that somebody else reads, so that they are stored though none of our readers keeps them.
    """

    blocks: tuple[np.ndarray, ...]
    pinned: np.ndarray

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.pinned)


@dataclass(frozen=True, eq=False)
class Piece:
    """A reader's view of one chain: ``sees``, bool (n,), the channels it may keep; ``scores``, float64 (n,), what each
    is worth to it (0 where it does not see it)."""

    chain: int
    scores: np.ndarray
    sees: np.ndarray


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that keeps ``keep`` (at least 1) of the channels that it sees: of each piece one interval."""

    pieces: tuple[Piece, ...]
    keep: int

    @property
    def sees(self) -> int:
        """Number of channels that it sees in all pieces together."""
        return sum(int(piece.sees.sum()) for piece in self.pieces)


@dataclass(frozen=True, eq=False)
class Space:
    """Chains, and all the readers that read any of them."""

    chains: tuple[Chain, ...]
    readers: tuple[Reader, ...]


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where every channel stands, and what every reader keeps.

    ``orders``: for each chain the channels that are stored, in their order; the others nobody keeps. ``intervals``: for
    each reader and each of its pieces ``(start, stop)``: of the stored channels that the piece sees, in their order, it
    keeps those from ``start`` on and before ``stop``. ``retained``: float64 (readers,), sum of the scores kept.
    """

    orders: tuple[np.ndarray, ...]
    intervals: tuple[tuple[tuple[int, int], ...], ...]
    retained: np.ndarray

    def kept(self, space: Space, reader: int) -> tuple[np.ndarray, ...]:
        """The channels that a reader keeps, for each of its pieces, in their order."""
        found = []
        for piece, (start, stop) in zip(space.readers[reader].pieces, self.intervals[reader], strict=True):
            order = self.orders[piece.chain]
            found.append(order[piece.sees[order]][start:stop])
        return tuple(found)

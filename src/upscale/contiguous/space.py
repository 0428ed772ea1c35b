"""A whole space: chains whose readers share out what they keep among their pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .agreed import Agreed
from .chain import ChainProblem, ChainState, search, settled, stacked, valued, window_sums
from .model import Arrangement, Reader, Space

__all__ = ["agreed", "arrange", "free", "narrowed"]

_WORK = 400_000  # channels times readers times climbs: some seconds at most
_MOST_ROUNDS = 4  # of sharing out anew and searching again
_LEAST_GAIN = 0.01  # of what is left to gain: a round that gains less is the last


@dataclass(frozen=True, eq=False)
class _State:
    """``sizes``: for each reader how many channels it keeps of each piece; ``chains``: the state of each."""

    sizes: tuple[tuple[int, ...], ...]
    chains: tuple[ChainState, ...]

    @property
    def value(self) -> float:
        return sum(chain.value for chain in self.chains)


def arrange(space: Space) -> Arrangement:
    """Orders and intervals that retain much: never less than :func:`agreed`, never more than :func:`free`.

    Exact for one or two readers of one block, and where the combinations of intervals are few. Deterministic.
    """
    first = _agreed_state(space)
    coupled = any(len(reader.pieces) > 1 for reader in space.readers)
    found = _improved(space, _elastic(space, first) if coupled else first)
    return _arrangement(space, max(first, found, key=lambda state: state.value))


def agreed(space: Space) -> Arrangement:
    """The constrained masks of the same sizes (see :mod:`upscale.contiguous.agreed`) as an arrangement."""
    return _arrangement(space, _agreed_state(space))


def free(space: Space) -> np.ndarray:
    """What every reader retains if it keeps its best channels wherever they stand: float64 (readers,)."""
    retained = []
    for reader in space.readers:
        scores = np.concatenate([piece.scores[piece.sees] for piece in reader.pieces])
        retained.append(float(np.sort(scores)[len(scores) - reader.keep :].sum()))
    return np.array(retained)


def narrowed(space: Space, earlier: Arrangement) -> Arrangement:
    """In the order of an earlier arrangement of the same readers, which kept more, the best intervals inside theirs.

    Exact: of each reader the windows that retain most. What the earlier arrangement masks stays masked.
    """
    kept: list[list[tuple[int, np.ndarray]]] = []
    for number, reader in enumerate(space.readers):
        inside = earlier.kept(space, number)
        scores = [piece.scores[channels] for piece, channels in zip(reader.pieces, inside, strict=True)]
        kept.append([])
        for piece, channels, worth, size in zip(
            reader.pieces, inside, scores, _shared_out(scores, reader.keep), strict=True
        ):
            start = int(window_sums(worth, size).argmax()) if size else 0
            kept[-1].append((piece.chain, channels[start : start + size]))
    return _stored(space, earlier.orders, kept)


def _improved(space: Space, state: _State) -> _State:
    """Search every chain, share out anew, and so on until nothing is gained."""
    coupled = any(len(reader.pieces) > 1 for reader in space.readers)
    load = sum(problem.scores.size for problem in _problems(space, state.sizes))
    bound = float(free(space).sum())
    for _ in range(_MOST_ROUNDS if coupled else 1):
        before = state.value
        chains = tuple(
            search(problem, chain, _WORK * problem.scores.size // max(1, load))
            for problem, chain in zip(_problems(space, state.sizes), state.chains, strict=True)
        )
        state = _State(state.sizes, chains)
        if coupled:
            state = _resized(space, state, tuple(_sizes(r, state.chains) for r in space.readers))
        if state.value - before <= _LEAST_GAIN * (bound - before):
            break
    return state


def _elastic(space: Space, state: _State) -> _State:
    """Orders found with intervals of any size, every reader paying a price for each channel that it keeps: what the
    least of the channels is worth that it would keep if it chose freely. Its number is kept again afterwards."""
    sizes = _free_sizes(space, state)
    load = sum(problem.scores.size for problem in _problems(space, sizes))
    found = []
    for number, (problem, chain) in enumerate(zip(_problems(space, sizes), state.chains, strict=True)):
        prices = np.array([_price(r) for r in space.readers for p in r.pieces if p.chain == number])
        priced = np.where(problem.sees, problem.scores - prices[:, None], 0.0)
        elastic = replace(problem, scores=priced, elastic=True)
        found.append(search(elastic, settled(elastic, chain.order, chain.dead), _WORK * priced.size // max(1, load)))
    shares = tuple(_sizes(reader, found) for reader in space.readers)
    return _resized(space, _State(sizes, tuple(found)), shares)


def _price(reader: Reader) -> float:
    scores = np.concatenate([piece.scores[piece.sees] for piece in reader.pieces])
    return float(np.sort(scores)[len(scores) - reader.keep])


def _problems(space: Space, sizes: Sequence[Sequence[int]]) -> list[ChainProblem]:
    """For each chain the pieces of it, readers in order."""
    problems = []
    for number, chain in enumerate(space.chains):
        mine = [
            (piece, size)
            for reader, shares in zip(space.readers, sizes, strict=True)
            for piece, size in zip(reader.pieces, shares, strict=True)
            if piece.chain == number
        ]
        problems.append(stacked(chain, [(p.scores, p.sees) for p, _ in mine], [size for _, size in mine]))
    return problems


def _by_chain(space: Space, values: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Numbers given by reader and piece, as one array for each chain."""
    found: list[list[int]] = [[] for _ in space.chains]
    for reader, numbers in zip(space.readers, values, strict=True):
        for piece, number in zip(reader.pieces, numbers, strict=True):
            found[piece.chain].append(number)
    return [np.array(numbers, dtype=np.int64) for numbers in found]


def _agreed_state(space: Space) -> _State:
    masks = Agreed(space)
    sizes = tuple(map(tuple, masks.sizes))
    parts = zip(_problems(space, sizes), masks.orders, masks.dead, _by_chain(space, masks.starts), strict=True)
    return _State(sizes, tuple(valued(*part) for part in parts))


def _resized(space: Space, state: _State, sizes: Sequence[Sequence[int]]) -> _State:
    """The same orders with the best intervals of other sizes."""
    problems = _problems(space, sizes)
    chains = (settled(p, chain.order, chain.dead) for p, chain in zip(problems, state.chains, strict=True))
    return _State(tuple(map(tuple, sizes)), tuple(chains))


# -- sharing out ------------------------------------------------------------------------------------------------------


def _free_sizes(space: Space, state: _State) -> tuple[tuple[int, ...], ...]:
    """How much each reader keeps of each piece if it chooses freely among what is stored."""
    sizes = []
    for reader in space.readers:
        seen = [p.scores[_seen(p.chain, p.sees, state)] for p in reader.pieces]
        owner = np.repeat(np.arange(len(seen)), [len(s) for s in seen])
        best = np.argsort(-np.concatenate(seen), kind="stable")[: reader.keep]
        sizes.append(tuple(np.bincount(owner[best], minlength=len(seen)).tolist()))
    return tuple(sizes)


def _seen(chain: int, sees: np.ndarray, state: _State) -> np.ndarray:
    order = state.chains[chain].order
    return order[sees[order]]


def _sizes(reader: Reader, chains: Sequence[ChainState]) -> tuple[int, ...]:
    """How much to keep of each piece, given the orders."""
    orders = [chains[piece.chain].order for piece in reader.pieces]
    return _shared_out(
        [p.scores[order[p.sees[order]]] for p, order in zip(reader.pieces, orders, strict=True)], reader.keep
    )


def _shared_out(pieces: Sequence[np.ndarray], keep: int) -> tuple[int, ...]:
    """How much to keep of each piece, whose scores are given in order: exact, by dynamic programming over them."""
    if len(pieces) == 1:
        return (keep,)
    best = np.array([0.0])  # [k]: the most that k channels of the pieces so far retain
    choices = []
    for scores in pieces:
        worth = [float(window_sums(scores, k).max()) for k in range(min(len(scores), keep) + 1)]
        total = np.full(min(len(best) + len(worth) - 1, keep + 1), -np.inf)
        choice = np.zeros(len(total), dtype=np.int64)
        for k, value in enumerate(worth):
            reach = best[: len(total) - k] + value
            better = reach > total[k : k + len(reach)]
            total[k : k + len(reach)][better] = reach[better]
            choice[k : k + len(reach)][better] = k
        best = total
        choices.append(choice)
    left, shares = keep, []
    for choice in reversed(choices):
        shares.append(int(choice[left]))
        left -= shares[-1]
    return tuple(reversed(shares))


# -- the answer -------------------------------------------------------------------------------------------------------


def _arrangement(space: Space, state: _State) -> Arrangement:
    counters = [0] * len(space.chains)
    kept: list[list[tuple[int, np.ndarray]]] = []
    for reader, sizes in zip(space.readers, state.sizes, strict=True):
        kept.append([])
        for piece, size in zip(reader.pieces, sizes, strict=True):
            start = int(state.chains[piece.chain].starts[counters[piece.chain]])
            counters[piece.chain] += 1
            kept[-1].append((piece.chain, _seen(piece.chain, piece.sees, state)[start : start + size]))
    return _stored(space, [chain.order for chain in state.chains], kept)


def _stored(
    space: Space, orders: Sequence[np.ndarray], kept: Sequence[Sequence[tuple[int, np.ndarray]]]
) -> Arrangement:
    """What every reader keeps, (chain, channels) of each piece, as intervals. Only what somebody keeps, or is pinned,
    is stored."""
    needed = [chain.pinned.copy() for chain in space.chains]
    for chain, channels in (part for mine in kept for part in mine):
        needed[chain][channels] = True
    orders = tuple(order[flags[order]] for order, flags in zip(orders, needed, strict=True))
    intervals = []
    for reader, mine in zip(space.readers, kept, strict=True):
        found = []
        for piece, (chain, channels) in zip(reader.pieces, mine, strict=True):
            seen = orders[chain][piece.sees[orders[chain]]]
            start = int(np.flatnonzero(seen == channels[0])[0]) if len(channels) else 0
            found.append((start, start + len(channels)))
        intervals.append(tuple(found))
    retained = [
        sum(float(piece.scores[channels].sum()) for piece, (_, channels) in zip(reader.pieces, mine, strict=True))
        for reader, mine in zip(space.readers, kept, strict=True)
    ]
    return Arrangement(orders, tuple(intervals), np.array(retained))

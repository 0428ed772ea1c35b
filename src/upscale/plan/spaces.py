"""Spaces: channels that are ordered together, split into blocks that stay contiguous, and a rank for each channel."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from ..flow import Flow, FlowNode, Link
from .cost import ReadCost, Setting
from .keep import Kept
from .model import Order
from .order import Ordering, Wish, order_space
from .sources import locate
from .union import DisjointSets

LEAST = 1.0  # nanoseconds: where a slice is copied like anything else, neighbours are still tidier


@dataclass(frozen=True)
class Ranking:
    """A rank per order class - stored tensors list their channels by increasing rank -, how good each order is, and
    the classes of every space in their order."""

    rank: np.ndarray
    orders: tuple[Order, ...]
    spaces: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Demanded:
    """What one read takes of one tensor. ``present``, ``wanted``: order classes that the tensor holds, and those of
    them that are read. ``gather``, ``piece``: see :class:`~upscale.plan.order.Wish`."""

    wanted: np.ndarray
    present: np.ndarray
    gather: float
    piece: float


def rank_classes(flow: Flow, kept: Kept, reorder: bool, setting: Setting) -> Ranking:
    """The order of every space.

    Without ``reorder``, or where somebody needs the original order, ranks follow it.
    """
    total = 1 + max((int(o.max()) for o in kept.order.values() if len(o)), default=0)
    rank = np.full(total, -1, dtype=np.int64)
    orders, spaces = [], []
    count = 0
    fixed = _fixed_classes(kept, total)
    blocks = _blocks(flow, kept)
    demands = _demands(flow, kept, setting)
    for members, mine in _spaces(blocks, demands, total):
        ordered = np.concatenate(members)
        if mine and reorder:
            ordering = _order(members, [bool(fixed[m].any()) for m in members], mine)
            ordered = ordered[ordering.order]
            if ordering.cost or len(mine) > 1:
                orders.append(Order(len(ordered), len(mine), ordering.cost, ordering.bound, ordering.proven))
        rank[ordered] = np.arange(count, count + len(ordered))
        count += len(ordered)
        spaces.append(ordered)
    return Ranking(rank, tuple(orders), tuple(spaces))


def _spaces(
    blocks: list[np.ndarray], demands: list[Demanded], total: int
) -> list[tuple[list[np.ndarray], list[Demanded]]]:
    """Blocks that some tensor of a demand holds together, with the demands on them; in the order of their first."""
    home = np.full(total, -1)
    for number, block in enumerate(blocks):
        home[block] = number
    sets = DisjointSets(len(blocks))
    touched = [np.unique(home[d.present]) for d in demands]
    for held in touched:
        sets.join(held, np.full(len(held), held[0]))
    roots = sets.roots().tolist()
    spaces: dict[int, tuple[list[np.ndarray], list[Demanded]]] = {r: ([], []) for r in dict.fromkeys(roots)}
    for root, block in zip(roots, blocks, strict=True):
        spaces[root][0].append(block)
    for held, demand in zip(touched, demands, strict=True):
        spaces[roots[held[0]]][1].append(demand)
    return list(spaces.values())


def _order(members: list[np.ndarray], frozen: list[bool], demands: list[Demanded]) -> Ordering:
    """The order of the blocks' channels, as places in their concatenation."""
    every = np.concatenate(members)
    place = {c: i for i, c in enumerate(every.tolist())}

    def flags(classes: np.ndarray) -> np.ndarray:
        chosen = np.zeros(len(every), dtype=bool)
        chosen[[place[c] for c in classes.tolist()]] = True
        return chosen

    wishes = [Wish(flags(d.wanted), d.gather, d.piece, flags(d.present)) for d in demands]
    ends = np.cumsum([len(m) for m in members])
    blocks = [np.arange(end - len(m), end) for m, end in zip(members, ends.tolist(), strict=True)]
    return order_space(blocks, wishes, frozen=frozen, block_order_free=not any(frozen))


def _fixed_classes(kept: Kept, total: int) -> np.ndarray:
    fixed = np.zeros(total, dtype=bool)
    for n in kept.forced | kept.ordered:
        if n in kept.order:
            fixed[kept.order[n]] = True
    return fixed


def _blocks(flow: Flow, kept: Kept) -> list[np.ndarray]:
    """Kept classes grouped by the set of places they stem from, in original order.

    A place is a contraction, a parameter or a concatenation's fill, all those together whose channels pair up
    elementwise. Keeping such a group together keeps every concatenated producer contiguous.
    """
    total = 1 + max((int(o.max()) for o in kept.order.values() if len(o)), default=0)
    first = np.full(total, total, dtype=np.int64)  # when a class is met first, going from the widest tensor on
    alive = np.zeros(total, dtype=bool)
    places: dict[int, list[np.ndarray]] = defaultdict(list)
    home = _paired(flow, kept)
    met = 0
    for node in sorted(kept.stored, key=lambda n: -len(kept.order[n])):
        classes = kept.order[node]
        alive[classes[kept.kept[node]]] = True
        new, where = np.unique(classes[first[classes] == total], return_index=True)
        first[new] = met + where
        met += len(classes)
        if flow.nodes[node].kind in ("fresh", "concat"):
            places[home[node]].append(classes)
    signature = np.zeros(total, dtype=np.uint64)
    for number, held in enumerate(places.values(), start=1):
        classes = np.unique(np.concatenate(held))
        signature[classes] = signature[classes] * np.uint64(1_000_003) + np.uint64(number)
    ordered = np.flatnonzero(alive)
    ordered = ordered[np.argsort(first[ordered], kind="stable")]
    groups: dict[int, list[int]] = defaultdict(list)
    for c, s in zip(ordered.tolist(), signature[ordered].tolist(), strict=True):
        groups[s].append(c)
    return [np.array(g) for g in groups.values()]


def _paired(flow: Flow, kept: Kept) -> dict[Node, int]:
    """A number for every stored tensor, the same where tensors pair elementwise: the two sides of an addition."""
    numbers = {n: i for i, n in enumerate(kept.stored)}
    sets = DisjointSets(len(numbers))
    for node in kept.stored:
        f = flow.nodes[node]
        if f.kind in ("transit", "split"):
            for link in f.links:
                if not link.anchored and link.operand in numbers:
                    sets.join(np.array([numbers[node]]), np.array([numbers[link.operand]]))
    roots = sets.roots()
    return {n: int(roots[i]) for n, i in numbers.items()}


def find_parts(flow: Flow, kept: Kept) -> dict[Node, np.ndarray]:
    """Tensors in which one class stands several times, and which reader's part each position is in.

    Only splits and elementwise readers tie positions of one tensor to each other; each of them reads one part.
    """
    repeated = {n for n in kept.stored if len(np.unique(kept.order[n])) < len(kept.order[n])}
    parts: dict[Node, np.ndarray] = {}
    for node, f in flow.nodes.items():
        if f.kind not in ("split", "transit") or node not in flow.used or node in kept.virtual or f.merge != (1, 1):
            continue
        for link in f.links:
            if link.anchored:
                continue
            columns = link.positions.reshape(len(link.positions), -1)
            by_column = f.split is not None and f.split.by_column
            for positions in columns.T if by_column else (columns.reshape(-1),):
                place = locate(flow, kept.virtual, link, positions[positions >= 0])
                for i, source in enumerate(place.tensors):
                    mine = place.position[place.which == i]
                    if source in repeated and len(mine) < len(flow.nodes[source].channels.units):  # type: ignore
                        part = parts.setdefault(source, np.zeros(flow.nodes[source].channels.size, dtype=np.int64))  # type: ignore
                        part[mine] = 1 + mine.min()
    return parts


def _demands(flow: Flow, kept: Kept, setting: Setting) -> list[Demanded]:
    """Reads of a part of a tensor by contractions and hoisted transits, tensor by tensor."""
    found = []
    for node, f in flow.nodes.items():
        if node not in flow.used or node in kept.virtual:
            continue
        if f.kind == "fresh" and f.links and not f.pinned:
            wanted, links = flow.demands[node].inputs, f.links[:1]
        elif node in kept.hoisted or node in kept.shrinking:
            wanted, links = kept.kept[node][_units(flow, node)], f.links
        else:
            continue
        for link in links:
            if not link.anchored and (node, link.operand) not in flow.replaced:
                found += _demands_on(flow, kept, setting, f, link, wanted)
    return found


def _demands_on(
    flow: Flow, kept: Kept, setting: Setting, reader: FlowNode, link: Link, wanted: np.ndarray
) -> list[Demanded]:
    """What ``reader`` takes of each tensor behind a link."""
    found = []
    part = flow.partial.get((reader.node, link.operand))
    place = locate(flow, kept.virtual, link, link.positions[wanted if part is None else wanted & part])
    sources = [(i, s) for i, s in enumerate(place.tensors) if s in kept.order]
    for i, source in sources:
        classes = kept.order[source]
        mine = np.unique(classes[_units(flow, source)[place.position[place.which == i]]])
        present = np.unique(classes[kept.kept[source]])
        if len(mine) < len(present) and np.isin(mine, present).all():
            rows = int(kept.kept[reader.node].sum()) if reader.node in kept.kept else None
            cost = setting.reading(source, link.dim, reader, rows)
            found.append(Demanded(mine, present, *_prices(cost, len(mine), len(sources) > 1)))
    return found


def _prices(cost: ReadCost, count: int, joined: bool) -> tuple[float, float]:
    """What a read of ``count`` channels pays at most for not being one slice, and for each slice more.

    Where it is joined with reads of other tensors it is copied anyway: only further slices cost.
    """
    if joined:
        return max(cost.gather(count), LEAST), cost.join(2, count) - cost.join(1, count)
    most = max(cost.gather(count) - cost.view(count), LEAST)
    return most, max(cost.join(2, count) - cost.view(count), LEAST)


def _units(flow: Flow, node: Node) -> np.ndarray:
    channels = flow.nodes[node].channels
    assert channels is not None
    return channels.units

"""Spaces: channels that are ordered together, split into blocks that stay contiguous, and a rank for each channel."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from ..aliases import first_tensor
from ..flow import Flow
from ..flow.effects import size_of
from .keep import Kept
from .order import Wish, order_space
from .sources import locate
from .union import DisjointSets


@dataclass(frozen=True)
class Demanded:
    """One read of a proper subset, as a flag per order class, and how many elements a copy of it would move."""

    wanted: np.ndarray
    cost: float


def rank_classes(flow: Flow, kept: Kept, reorder: bool) -> np.ndarray:
    """A rank per order class: stored tensors list their channels by increasing rank.

    Without ``reorder``, or where somebody needs the original order, ranks follow it.
    """
    total = 1 + max((int(o.max()) for o in kept.order.values() if len(o)), default=0)
    rank = np.full(total, -1, dtype=np.int64)
    count = 0
    fixed = _fixed_classes(kept, total)
    demands = _demands(flow, kept, total) if reorder else []
    for classes in _blocks(flow, kept):
        present = classes
        if reorder and not fixed[classes].any():
            present = _ordered(classes, demands)
        rank[present] = np.arange(count, count + len(present))
        count += len(present)
    return rank


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


def _ordered(classes: np.ndarray, demands: list[Demanded]) -> np.ndarray:
    wishes = []
    for d in demands:
        wanted = d.wanted[classes]
        if wanted.any() and not wanted.all():
            wishes.append(Wish(wanted, d.cost))
    return classes[order_space([np.arange(len(classes))], wishes).order]


def _demands(flow: Flow, kept: Kept, total: int) -> list[Demanded]:
    """Reads of contractions and of hoisted transits."""
    found = []
    for node, f in flow.nodes.items():
        if node not in flow.used or node in kept.virtual:
            continue
        if f.kind == "fresh" and f.links and not f.pinned:
            wanted = flow.demands[node].inputs
        elif node in kept.hoisted:
            wanted = flow.live[node]
        else:
            continue
        link = f.links[0]
        if link.anchored:
            continue
        place = locate(flow, kept.virtual, link, link.positions[wanted])
        flags = np.zeros(total, dtype=bool)
        for i, source in enumerate(place.tensors):
            if source in kept.order:
                units = _units(flow, source)[place.position[place.which == i]]
                flags[kept.order[source][units]] = True
        if flags.any():
            found.append(Demanded(flags, elements(link.operand) * int(wanted.sum())))
    return found


def _units(flow: Flow, node: Node) -> np.ndarray:
    channels = flow.nodes[node].channels
    assert channels is not None
    return channels.units


def elements(node: Node) -> float:
    """Elements of one channel of one example: everything but the largest-stride dimensions (batch and channel)."""
    val = first_tensor(node.meta.get("val"))
    sizes = [] if val is None else [size_of(s) for s in val.shape]
    return float(np.prod(sizes[2:])) if len(sizes) > 2 else 1.0

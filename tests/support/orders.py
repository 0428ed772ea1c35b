"""Orders of channels looked at one by one: oracles for the order planner."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from upscale.plan.consecutive import Tree, members
from upscale.plan.order import Wish


def count_runs(order: Sequence[int], wanted: np.ndarray, present: np.ndarray | None = None) -> int:
    flags = [bool(wanted[c]) for c in order if present is None or present[c]]
    return sum(1 for flag, _ in itertools.groupby(flags) if flag)


def paid(order: Sequence[int], wishes: Sequence[Wish]) -> float:
    total = 0.0
    for w in wishes:
        extra = count_runs(order, w.wanted, w.present) - 1
        total += min(w.gather, w.piece * extra) if extra > 0 else 0.0
    return total


def every_order(blocks: Sequence[Sequence[int]], frozen: Sequence[bool], free_blocks: bool) -> Iterator[list[int]]:
    for sequence in itertools.permutations(range(len(blocks))) if free_blocks else [range(len(blocks))]:
        inner = [[tuple(blocks[b])] if frozen[b] else list(itertools.permutations(blocks[b])) for b in sequence]
        for parts in itertools.product(*inner):
            yield [c for part in parts for c in part]


def orders_of(tree: Tree) -> set[tuple[int, ...]]:
    """All orders that a tree stands for, written out."""
    children = [orders_of(child) for child in tree.children] + [{(e,)} for e in members(tree.loose)]
    if tree.linear:
        ways = [children] * (tree.sign >= 0) + [children[::-1]] * (tree.sign <= 0)
    else:
        ways = [list(p) for p in itertools.permutations(children)]
    return {tuple(e for part in parts for e in part) for way in ways for parts in itertools.product(*way)}


def together(order: Sequence[int], subset: set[int]) -> bool:
    places = [i for i, e in enumerate(order) if e in subset]
    return not places or places[-1] - places[0] == len(places) - 1


def planted(generator: np.random.Generator, count: int, readers: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A hidden order and random windows of it."""
    hidden = generator.permutation(count)
    windows = []
    for _ in range(readers):
        a, b = np.sort(generator.choice(count + 1, 2, replace=False))
        windows.append(np.isin(np.arange(count), hidden[a:b]))
    return hidden, windows

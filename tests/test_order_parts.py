"""The parts of the order planner: PQ-trees, clashes, families of readers, moves, bounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.orders import count_runs, every_order, orders_of, together
from upscale.plan.bounds import counting_bound
from upscale.plan.clashes import find_clashes
from upscale.plan.consecutive import Tree, bits, chain, free, frontier, members, reduce
from upscale.plan.search import _best_move, _best_reversal
from upscale.plan.subfamily import Demand, _Search, best_family

subsets = st.lists(st.sets(st.integers(0, 5)), max_size=6)


@given(subsets)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_tree_stands_for_exactly_the_orders_that_keep_every_subset_together(family: list[set[int]]) -> None:
    tree: Tree | None = free(0b111111)
    right = set(itertools.permutations(range(6)))
    for subset in family:
        right = {order for order in right if together(order, subset)}
        tree = None if tree is None else reduce(tree, bits(subset))
        assert (set() if tree is None else orders_of(tree)) == right
    if tree is not None:
        assert tuple(frontier(tree)) in right


@given(subsets)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_chain_with_a_sign_keeps_its_direction(family: list[set[int]]) -> None:
    """Two chains that may not be turned, 0 1 2 and 3 4, and element 5."""
    chains = [chain([free(1 << e) for e in part], 1) for part in ((0, 1, 2), (3, 4))]
    tree: Tree | None = free(1 << 5, chains)
    right = set(map(tuple, every_order([[0, 1, 2], [3, 4], [5]], [True, True, False], True)))
    for subset in family:
        right = {order for order in right if together(order, subset)}
        tree = None if tree is None else reduce(tree, bits(subset))
        assert (set() if tree is None else orders_of(tree)) == right
    if tree is not None:
        assert tuple(frontier(tree)) in right


def test_wild_elements_are_in_the_run_or_out_of_it() -> None:
    generator = np.random.default_rng(5)
    found = 0
    for _ in range(150):
        tree: Tree | None = free(0b111111)
        demands: list[tuple[set[int], set[int]]] = []
        for _ in range(4):
            kind = generator.integers(0, 3, 6)
            inside, outside = (set(np.flatnonzero(kind == k).tolist()) for k in (0, 1))
            new = None if tree is None else reduce(tree, bits(inside), bits(np.flatnonzero(kind == 2)))
            if new is not None:
                demands.append((inside, outside))
                tree = new
                found += 1
        assert tree is not None
        for order in orders_of(tree):
            assert all(together([e for e in order if e in a | b], a) for a, b in demands)
    assert found > 400


def test_clashes_are_those_of_every_order() -> None:
    generator = np.random.default_rng(6)
    seen = 0
    blocks = [[0, 1, 2], [3, 4], [5]]
    tree = free(1 << 5, [free(0b111), free(0b11000)])
    orders = list(every_order(blocks, [False] * 3, True))
    for round_ in range(40):
        wanted = generator.random((4, 6)) < 0.5
        present = np.ones_like(wanted) if round_ % 2 else wanted | (generator.random((4, 6)) < 0.7)
        clashes = find_clashes(tree, wanted, present)
        for i, j, k in itertools.combinations(range(4), 3):
            common = present[[i, j, k]].all(0)
            alike = [
                all(count_runs(o, wanted[r], common) <= 1 for r in (i, j, k)) for o in itertools.permutations(range(6))
            ]
            assert bool(clashes.triples[i][j] >> k & 1) == (not any(alike))
            assert clashes.triples[i][j] >> k & 1 == clashes.triples[k][i] >> j & 1
            seen += not any(alike)
        for i, j in itertools.combinations(range(4), 2):
            common = present[i] & present[j]
            served = any(all(count_runs(o, wanted[r], common) <= 1 for r in (i, j)) for o in orders)
            alone = [any(count_runs(o, wanted[r], present[r]) <= 1 for o in orders) for r in (i, j)]
            assert [bool(clashes.alone >> r & 1) for r in (i, j)] == [not a for a in alone]
            assert not all(alone) or bool(clashes.pairs[i] >> j & 1) == (not served)
    assert seen >= 3


def clashing(triples: Sequence[Sequence[int]], i: int, j: int, k: int) -> bool:
    return bool(triples[i][j] >> k & 1)


@pytest.mark.parametrize("readers", [4, 6])
def test_the_counted_bound_is_below_every_order(readers: int) -> None:
    """Seven elements, every order; dear gathers, so that runs decide, and cheap ones, so that both do."""
    generator = np.random.default_rng(14)
    orders = np.array(list(itertools.permutations(range(7))))
    close = 0
    for round_ in range(15):
        wanted = generator.random((readers, 7)) < 0.5
        present = np.ones_like(wanted) if round_ % 3 else wanted | (generator.random((readers, 7)) < 0.7)
        piece = generator.integers(1, 4, readers).astype(float) if round_ % 2 else np.ones(readers)
        gather = generator.integers(2, 5 if round_ % 5 else 50, readers).astype(float)
        clashes = find_clashes(free(0b1111111), wanted, present)
        clash = partial(clashing, clashes.triples)
        bound = counting_bound(wanted, present, gather, piece, np.zeros(readers), clash)
        costs = np.zeros(len(orders))
        for row, held, most, each in zip(wanted, present, gather, piece, strict=True):
            flags = np.where(held, row, 2)[orders].tolist()
            extra = np.array([len([k for k, _ in itertools.groupby(x for x in f if x != 2) if k]) - 1 for f in flags])
            costs += np.where(extra > 0, np.minimum(most, each * np.maximum(extra, 1)), 0)
        assert bound <= costs.min() + 1e-9
        close += bound >= costs.min() - 1
    assert close >= 10


def test_the_counted_bound_is_that_of_a_gray_code() -> None:
    """All 2^k columns: 2^k / 2 runs, one for each reader free; or all but some gather."""
    for readers in (3, 5, 7):
        columns = np.array(list(itertools.product([False, True], repeat=readers))).T
        dear, one = np.full(readers, 1000.0), np.ones(readers)
        bound = counting_bound(columns, np.ones_like(columns), dear, one, np.zeros(readers), lambda i, j, k: True)
        assert bound == 2**readers / 2 - readers
        bound = counting_bound(
            columns, np.ones_like(columns), dear, 1000 * one, np.zeros(readers), lambda i, j, k: True
        )
        assert bound == 1000 * (readers - 2)


@pytest.mark.parametrize("dives", [True, False])
@pytest.mark.parametrize("density", [0.07, 0.12, 0.3])
def test_the_dearest_family_is_that_of_all_subfamilies(
    density: float, dives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten readers: every subfamily on a PQ-tree. With less work the weight is no more, the upper limit no less."""
    if not dives:  # branch and bound has to find everything itself
        monkeypatch.setattr(_Search, "_dive", lambda *_: None)
    generator = np.random.default_rng(16)
    partly = 0
    for _ in range(12):
        wanted = generator.random((10, 40)) < density
        weights = generator.integers(1, 6, 10).astype(float)
        start = free((1 << 40) - 1)
        trees: dict[int, Tree | None] = {0: start}
        for family in range(1, 1 << 10):
            top = family.bit_length() - 1
            below = trees[family ^ 1 << top]
            trees[family] = None if below is None else reduce(below, bits(np.flatnonzero(wanted[top])))
        most = max(weights[members(f)].sum() for f, tree in trees.items() if tree is not None)
        clashes = find_clashes(start, wanted, np.ones_like(wanted))
        demands = [Demand(bits(np.flatnonzero(w)), 0, v) for w, v in zip(wanted, weights, strict=True)]
        for limit in (0, 30, 100, 300, 100_000):
            found = best_family(start, demands, clashes, limit)
            assert found.weight == weights[list(found.chosen)].sum() <= most <= found.upper
            assert trees[bits(found.chosen)] is not None
            order = frontier(found.tree)
            assert all(count_runs(order, wanted[i]) <= 1 for i in found.chosen)
        assert found.weight == most == found.upper
        partly += most < weights.sum()
    assert partly >= 6


def test_moves_change_the_length_by_what_they_say_and_keep_blocks() -> None:
    generator = np.random.default_rng(17)
    moved = 0
    for round_ in range(60):
        sizes = generator.integers(1, 5, int(generator.integers(1, 5)))
        block = np.repeat(np.arange(len(sizes)), sizes)
        frozen = generator.random(len(sizes)) < 0.3
        distance = generator.random((len(block) + 1, len(block) + 1))
        distance = distance + distance.T
        for best in (_best_move, _best_reversal):
            gain, path = best(distance, np.arange(len(block)), block, frozen, bool(round_ % 2))
            if not np.isfinite(gain):
                continue
            ends = [np.array([len(block), *p, len(block)]) for p in (range(len(block)), path)]
            before, after = (distance[e[:-1], e[1:]].sum() for e in ends)
            assert after - before == pytest.approx(gain)
            assert sorted(path.tolist()) == list(range(len(block)))
            place = np.argsort(path)
            for b in range(len(sizes)):
                mine = place[block == b]
                assert np.ptp(mine) == len(mine) - 1
                assert not frozen[b] or (np.diff(mine) == 1).all()
            assert round_ % 2 or (np.diff(block[path]) >= 0).all()
            moved += gain < 0
    assert moved > 60

"""The order planner, without any network: against every order of a few channels, and against planted orders of many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upscale.errors import InputError
from upscale.plan import order as planner
from upscale.plan.bounds import counting_bound
from upscale.plan.clashes import find_clashes
from upscale.plan.consecutive import Tree, bits, chain, free, frontier, members, reduce
from upscale.plan.order import Ordering, Wish, cost_of, order_space
from upscale.plan.search import _best_move, _best_reversal
from upscale.plan.subfamily import Demand, best_family

INF = float("inf")


# -- oracles: every order, runs counted one by one ----------------------------------------------------------------


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


# -- consecutive ones -----------------------------------------------------------------------------------------------

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


# -- whole orders against every order -------------------------------------------------------------------------------


def random_problem(generator: np.random.Generator, sparse: bool, slices: bool) -> tuple[list, list[Wish], list, bool]:
    """A few channels in one to three blocks, and three to six wishes. ``sparse``: of tensors that lack channels."""
    count = int(generator.integers(3, 8))
    cuts = np.sort(
        generator.choice(np.arange(1, count), size=int(generator.integers(0, 3)) if count > 3 else 0, replace=False)
    )
    blocks = np.split(generator.permutation(count), cuts)
    wishes = []
    for _ in range(int(generator.integers(3, 7))):
        present = generator.random(count) < 0.8 if sparse else np.ones(count, dtype=bool)
        wanted = present & (generator.random(count) < generator.choice([0.3, 0.5, 0.7]))
        piece = float(generator.integers(1, 4)) if slices else INF
        wishes.append(Wish(wanted, float(generator.integers(1, 9)), piece, present if sparse else None))
    frozen = (generator.random(len(blocks)) < 0.3).tolist()
    return blocks, wishes, frozen, bool(generator.random() < 0.7)


@pytest.mark.parametrize("few", [7, 0], ids=["exhaustive", "searched"])
@pytest.mark.parametrize(("sparse", "slices"), [(False, False), (False, True), (True, False), (True, True)])
def test_against_every_order(few: int, sparse: bool, slices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Legal, honest, never below the bound, and the best there is where that is claimed."""
    monkeypatch.setattr(planner, "FEW", few)
    generator = np.random.default_rng(7)
    nothing, optimal = 0, 0
    for _ in range(40):
        blocks, wishes, frozen, free_blocks = random_problem(generator, sparse, slices)
        found = order_space(blocks, wishes, frozen=frozen, block_order_free=free_blocks)
        costs = {tuple(order): paid(order, wishes) for order in every_order(blocks, frozen, free_blocks)}
        least = min(costs.values())
        assert found.cost == pytest.approx(costs[tuple(found.order.tolist())])  # KeyError: an order not allowed
        assert found.bound <= least + 1e-9 and found.cost <= paid(np.concatenate(blocks), wishes)
        assert not found.proven or found.cost == pytest.approx(least)
        assert found.proven or few == 0
        if least == 0 and not sparse:
            assert found.cost == 0 and found.proven
        if not sparse and not slices:
            assert found.proven  # small: branch and bound finishes
        nothing += least == 0
        optimal += found.cost == pytest.approx(least)
    assert 0 < nothing < 40 and optimal >= 36


# -- planted orders --------------------------------------------------------------------------------------------------


def planted(generator: np.random.Generator, count: int, readers: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A hidden order and random windows of it."""
    hidden = generator.permutation(count)
    windows = []
    for _ in range(readers):
        a, b = np.sort(generator.choice(count + 1, 2, replace=False))
        windows.append(np.isin(np.arange(count), hidden[a:b]))
    return hidden, windows


@pytest.mark.parametrize(("count", "readers"), [(16, 8), (64, 200), (300, 40), (1024, 60), (4096, 60)])
def test_a_hidden_order_is_found(count: int, readers: int) -> None:
    for seed in range(3):
        _, windows = planted(np.random.default_rng(seed), count, readers)
        found = order_space([np.arange(count)], [Wish(w, 1.0) for w in windows])
        assert sorted(found.order.tolist()) == list(range(count))
        assert all(count_runs(found.order.tolist(), w) <= 1 for w in windows)
        assert found.cost == found.bound == 0 and found.proven


@pytest.mark.parametrize("free_blocks", [True, False])
def test_a_hidden_order_of_blocks_is_found(free_blocks: bool) -> None:
    """Blocks stay together, frozen ones in order, and a wish may reach over several of them."""
    generator = np.random.default_rng(8)
    for _ in range(10):
        hidden, windows = planted(generator, 240, 40)
        parts = np.split(hidden, np.sort(generator.choice(np.arange(1, 240), 9, replace=False)))
        frozen = (generator.random(10) < 0.4).tolist()
        given_as = [p if f else np.sort(p) for p, f in zip(parts, frozen, strict=True)]
        turn = generator.permutation(10) if free_blocks else np.arange(10)
        blocks, fixed = [given_as[t] for t in turn], [frozen[t] for t in turn]
        found = order_space(blocks, [Wish(w, 1.0) for w in windows], frozen=fixed, block_order_free=free_blocks)
        assert all(count_runs(found.order.tolist(), w) <= 1 for w in windows) and found.cost == 0
        place = np.argsort(found.order)
        for block, stays in zip(blocks, fixed, strict=True):
            assert np.ptp(place[block]) == len(block) - 1
            assert not stays or (np.diff(place[block]) == 1).all()
        begins = [place[b].min() for b in blocks]
        assert free_blocks or begins == sorted(begins)


def test_the_bound_is_zero_where_tensors_lack_channels_and_an_order_serves_all() -> None:
    generator = np.random.default_rng(9)
    zero = 0
    for _ in range(6):
        _, windows = planted(generator, 120, 12)
        held = [generator.random(120) < 0.7 for _ in windows]
        found = order_space([np.arange(120)], [Wish(w & h, 1.0, INF, h) for w, h in zip(windows, held, strict=True)])
        assert found.bound == 0
        assert found.proven == (found.cost == 0)
        zero += found.cost == 0
    _, windows = planted(generator, 120, 20)
    born = np.sort(generator.random(120))[::-1]  # a stream that loses channels: each tensor is a prefix of the last
    held = [born >= t for t in generator.random(20)]
    found = order_space([np.arange(120)], [Wish(h & (born > 0.5), 1.0, INF, h) for h in held])
    assert found.cost == 0


# -- what must be paid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readers", [3, 5, 8])
def test_of_readers_that_want_every_combination_two_are_served(readers: int) -> None:
    """With all 2^k columns there, no three readers can be served: all but the two dearest gather."""
    columns = np.array(list(itertools.product([False, True], repeat=readers)))
    generator = np.random.default_rng(10)
    columns = columns[generator.permutation(len(columns))]
    prices = generator.permutation(np.arange(1, readers + 1)).astype(float)
    found = order_space([np.arange(len(columns))], [Wish(columns[:, i], p) for i, p in enumerate(prices)])
    assert found.cost == found.bound == prices.sum() - readers - (readers - 1)
    assert found.proven


@pytest.mark.parametrize("readers", [3, 4, 5])
def test_slices_of_all_combinations_are_as_few_as_in_a_gray_code(readers: int) -> None:
    """Each of 2^k columns differs from the next, so the k readers have at least 2^k / 2 runs, as in a Gray code."""
    columns = np.array(list(itertools.product([False, True], repeat=readers)))
    columns = columns[np.random.default_rng(11).permutation(len(columns))]
    wishes = [Wish(columns[:, i], 1000.0, 1.0) for i in range(readers)]
    found = order_space([np.arange(len(columns))], wishes)
    least = 2**readers / 2 - readers
    assert found.bound <= least <= found.cost <= 1.25 * least


def test_several_cheap_readers_outweigh_a_dear_one() -> None:
    """Four pairs make the chain 0 1 2 3 4; for 0, 2 and 4 to be neighbours two of them would have to go."""
    pairs = [Wish(np.isin(np.arange(5), [i, i + 1]), 3.0) for i in range(4)]
    for price, least in ((5.0, 5.0), (7.0, 6.0)):
        found = order_space([np.arange(5)], [Wish(np.arange(5) % 2 == 0, price), *pairs])
        assert found.cost == found.bound == least and found.proven


# -- manners ---------------------------------------------------------------------------------------------------------


def test_nothing_moves_without_a_reason() -> None:
    blocks = [np.array([3, 1]), np.array([0, 2, 4])]
    assert order_space(blocks, []).order.tolist() == [3, 1, 0, 2, 4]
    whole = Wish(np.ones(5, dtype=bool), 9.0)
    nobody = Wish(np.zeros(5, dtype=bool), 9.0)
    served = Wish(np.isin(np.arange(5), [1, 0]), 9.0)
    free_of_charge = Wish(np.isin(np.arange(5), [3, 4]), 0.0)
    found = order_space(blocks, [whole, nobody, served, free_of_charge])
    assert found.order.tolist() == [3, 1, 0, 2, 4] and found.cost == found.bound == 0 and found.proven
    assert order_space([], []).order.tolist() == []
    hopeless = [Wish(np.isin(np.arange(5), pair), 1.0) for pair in itertools.combinations(range(5), 2)]
    assert order_space([np.arange(5)], hopeless).cost == 10 - 4


def test_the_same_call_gives_the_same_order() -> None:
    generator = np.random.default_rng(12)
    wishes = [Wish(generator.random(200) < 0.3, float(generator.random()), 0.1) for _ in range(12)]
    first, second = (order_space([np.arange(100), np.arange(100, 200)], wishes) for _ in range(2))
    assert np.array_equal(first.order, second.order)
    assert (first.cost, first.bound, first.proven) == (second.cost, second.bound, second.proven)


def test_equal_wishes_count_as_often_as_they_are_there() -> None:
    """Three readers of one set outweigh two dearer ones that fit with each other but not with it."""
    often = [Wish(np.isin(np.arange(4), [0, 1]), 2.0)] * 3
    others = [Wish(np.isin(np.arange(4), pair), 2.5) for pair in ([0, 2], [0, 3])]
    found = order_space([np.arange(4)], [*often, *others])
    assert found.cost == 2.5 and count_runs(found.order.tolist(), often[0].wanted) == 1


@pytest.mark.parametrize("density", [0.005, 0.02, 0.1, 0.5, 0.9])
def test_many_channels_and_readers(density: float) -> None:
    """Honest about itself at full size, and no worse than leaving everything as it is."""
    generator = np.random.default_rng(13)
    wishes = [Wish(generator.random(4096) < density, float(generator.integers(1, 9)), 0.05) for _ in range(60)]
    found = order_space([np.arange(4096)], wishes)
    assert sorted(found.order.tolist()) == list(range(4096))
    assert found.cost == pytest.approx(paid(found.order.tolist(), wishes))
    assert found.bound <= found.cost <= paid(range(4096), wishes)


def wish(count: int = 4, **changes: object) -> Wish:
    values = {"wanted": np.arange(count) < 2, "gather": 1.0} | changes
    return Wish(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blocks", "wishes", "frozen", "says"),
    [
        ([[0, 1], [1, 2, 3]], [], (), "exactly once"),
        ([[0, 1], [3, 4]], [], (), "exactly once"),
        ([[0, 1, 2, 3]], [], (True, False), "2 flags for 1 blocks"),
        ([[0, 1, 2, 3]], [wish(3)], (), "one bool per channel"),
        ([[0, 1, 2, 3]], [wish(wanted=np.array([0, 1, 0, 1]))], (), "one bool per channel"),
        ([[0, 1, 2, 3]], [wish(present=np.arange(4) > 0)], (), "does not hold"),
        ([[0, 1, 2, 3]], [wish(gather=INF)], (), "finite"),
        ([[0, 1, 2, 3]], [wish(gather=float("nan"))], (), "must be >= 0"),
        ([[0, 1, 2, 3]], [wish(piece=-1.0)], (), "must be >= 0"),
    ],
)
def test_bad_input_is_refused(blocks: list, wishes: list, frozen: tuple, says: str) -> None:
    with pytest.raises(InputError, match=says):
        order_space([np.array(b) for b in blocks], wishes, frozen=frozen)


def test_cost_of_counts_as_the_readers_pay() -> None:
    wanted = np.array([True, False, True, False, True])
    assert cost_of(np.arange(5), [Wish(wanted, 9.0, 2.0)]) == 4.0
    assert cost_of(np.arange(5), [Wish(wanted, 3.0, 2.0)]) == 3.0
    assert cost_of(np.array([0, 2, 4, 1, 3]), [Wish(wanted, 9.0, 2.0)]) == 0.0
    held = np.array([True, False, True, True, True])
    assert cost_of(np.arange(5), [Wish(wanted, 9.0, 2.0, held)]) == 2.0
    assert isinstance(order_space([np.arange(5)], [Wish(wanted, 9.0)]), Ordering)


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


@pytest.mark.parametrize("slices", [False, True])
def test_blocks_that_readers_want_in_part_must_be_paid_for(slices: bool) -> None:
    """Six blocks, each wanted in part: six ends of runs, three runs at least. A frozen block keeps all its ends."""
    blocks = np.split(np.arange(24), 6)
    wanted = np.arange(24) % 4 == 0
    piece = 1.0 if slices else INF
    found = order_space(blocks, [Wish(wanted, 10.0, piece)])
    assert found.cost == found.bound == (2.0 if slices else 10.0) and found.proven
    found = order_space(blocks, [Wish(np.arange(24) % 2 == 0, 30.0, piece)], frozen=[True] * 6)
    assert found.cost == (11.0 if slices else 30.0)
    assert found.bound == (8.0 if slices else 30.0)  # of the 18 ends inside blocks, nine runs


@pytest.mark.parametrize("density", [0.07, 0.12, 0.3])
def test_the_dearest_family_is_that_of_all_subfamilies(density: float) -> None:
    """Ten readers: every subfamily on a PQ-tree. With less work the weight is no more, the upper limit no less."""
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


def test_a_smaller_work_limit_is_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows with noise: with less work the cost may rise and the bound may fall, and neither crosses the other."""
    generator = np.random.default_rng(15)
    _, windows = planted(generator, 300, 14)
    wishes = [Wish(w ^ (generator.random(300) < 0.002), float(generator.integers(1, 9))) for w in windows]
    full = order_space([np.arange(300)], wishes)
    assert full.proven and 0 < full.cost
    for tries in (0, 10, 100, 1000):
        monkeypatch.setattr(planner, "TRIES", tries)
        found = order_space([np.arange(300)], wishes)
        assert found.bound <= full.cost <= found.cost
        assert found.cost == pytest.approx(paid(found.order.tolist(), wishes))

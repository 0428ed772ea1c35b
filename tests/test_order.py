"""The order planner, without any network: against every order of a few channels, and planted orders of many."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from support.orders import count_runs, every_order, paid, planted
from upscale.errors import InputError
from upscale.plan import order as planner
from upscale.plan.order import Ordering, Wish, cost_of, order_space

INF = float("inf")


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

"""Planning: orders, reads, and the plan as plain data - without a network where that is possible."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import upscale
from upscale.capture import capture
from upscale.errors import InputError
from upscale.flow import analyse_flow
from upscale.plan import Plan, make_plan
from upscale.plan.cost import Memory, Rates, ReadCost
from upscale.plan.order import Wish, cost_of, order_space, runs
from upscale.plan.reads import choose_read
from upscale.plan.union import DisjointSets


def wishes_of(count: int, *sets: set[int]) -> list[Wish]:
    return [Wish(np.isin(np.arange(count), list(s)), float(len(s))) for s in sets]


def order_block(count: int, wishes: list[Wish]) -> np.ndarray:
    return order_space([np.arange(count)], wishes).order


def test_two_readers_are_always_contiguous() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(2, 40))
        wishes = [Wish(generator.random(count) < 0.6, 1.0) for _ in range(2)]
        order = order_block(count, wishes)
        assert sorted(order.tolist()) == list(range(count))
        assert all(runs(w.wanted[order]) <= 1 for w in wishes)


def test_nested_readers_are_all_contiguous() -> None:
    wishes = wishes_of(8, {1, 3, 5, 7}, {3, 5}, {5})
    assert cost_of(order_block(8, wishes), wishes) == 0


def test_never_worse_than_the_original_order_nor_than_the_best_single_reader() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        count, readers = int(generator.integers(3, 30)), int(generator.integers(3, 9))
        wishes = [Wish(generator.random(count) < 0.5, float(generator.integers(1, 9))) for _ in range(readers)]
        order = order_block(count, wishes)
        proper = [w for w in wishes if 0 < w.wanted.sum() < count]
        if proper:
            assert cost_of(order, proper) <= cost_of(np.arange(count), proper)


def test_small_blocks_against_every_order() -> None:
    """With three readers on six channels the heuristic stays within the cost of one reader of the optimum."""
    generator = np.random.default_rng(2)
    orders = [np.array(p) for p in itertools.permutations(range(6))]
    for _ in range(10):
        wishes = [Wish(generator.random(6) < 0.5, 1.0) for _ in range(3)]
        wishes = [w for w in wishes if 0 < w.wanted.sum() < 6] or wishes_of(6, {0})
        best = min(cost_of(order, wishes) for order in orders)
        assert cost_of(order_block(6, wishes), wishes) <= best + 1


def test_order_is_deterministic() -> None:
    generator = np.random.default_rng(3)
    wishes = [Wish(generator.random(64) < 0.5, 1.0) for _ in range(6)]
    assert np.array_equal(order_block(64, wishes), order_block(64, wishes))


def test_disjoint_sets_join_chains() -> None:
    sets = DisjointSets(6)
    sets.join(np.array([5, 4, 1]), np.array([4, 3, 0]))
    sets.join(np.array([3]), np.array([2]))
    assert sets.roots().tolist() == [0, 0, 2, 2, 2, 2]


COST = ReadCost(Rates(), Memory(channel=40.0, stretches=1.0, innermost=False), strided=False)


def read_of(indices: list[int], size: int, mode: str = "auto", which: list[int] | None = None, sources=("a",)):
    places = np.array(which if which is not None else [0] * len(indices))
    sizes = [size] * len(sources)
    return choose_read(sources, sizes, places, np.array(indices), np.zeros(len(indices)), mode, COST)


def test_reads_by_kind() -> None:
    assert read_of([0, 1, 2], 3)[0] == "whole"
    assert read_of([1, 2], 3)[0] == "view"
    assert read_of([0, 2], 3)[0] == "gather"
    assert read_of([1, 2], 3, "gather")[0] == "gather"
    kind, pieces = read_of([0, 2], 3, "baseline")
    assert kind == "channelwise" and [p.indices for p in pieces] == [(0,), (2,)]
    kind, pieces = read_of([0, 1, 0, 1], 2, which=[0, 0, 1, 1], sources=("a", "b"))
    assert kind == "concat" and len(pieces) == 2
    assert read_of([0, 0, 1], 2, which=[0, 1, 1], sources=("a", "b"))[0] == "concat"


def masked_pair() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model[3].weight[:, [1, 4, 6]] = 0
    return model


def test_the_plan_survives_json() -> None:
    plan = make_plan(analyse_flow(capture(masked_pair(), (torch.rand(2, 3, 8, 8),))))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.contractions["conv2d"].rows == (0, 2, 3, 5, 7)


def test_an_unknown_mode_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="'auto', 'gather', 'baseline'"):
        upscale.export(masked_pair(), (torch.rand(2, 3, 8, 8),), reads="fast")  # type: ignore[arg-type]


class ThreeReaders(nn.Module):
    """One tensor, three readers that each want other channels: order serves two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.readers = nn.ModuleList(nn.Conv2d(12, 4, 1) for _ in range(3))

    def forward(self, x):
        y = self.stem(x).relu()
        return sum(reader(y) for reader in self.readers)


@torch.no_grad()
def three_readers() -> nn.Module:
    torch.manual_seed(0)
    model = ThreeReaders().eval()
    for reader, gone in zip(model.readers, ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]), strict=True):
        reader.weight[:, gone] = 0
    return model


def test_modes_differ_in_how_they_read_and_only_in_that() -> None:
    model, x = three_readers(), torch.rand(2, 3, 8, 8)
    exported = {mode: upscale.export(model, (x,), reads=mode) for mode in ("auto", "gather", "baseline")}
    expected = model(x)
    for pruned in exported.values():
        torch.testing.assert_close(pruned(x), expected)
    assert exported["auto"].report.reads["view"] == 2
    assert exported["auto"].report.reads["gather"] == 1
    assert exported["gather"].report.reads["gather"] == 3
    assert exported["baseline"].report.reads["channelwise"] == 3
    parameters = {sum(p.numel() for p in pruned.parameters()) for pruned in exported.values()}
    assert len(parameters) == 1


def test_a_concatenation_with_one_reader_is_read_slice_by_slice() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(12, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())

    torch.manual_seed(0)
    model = Join().eval()
    with torch.no_grad():
        model.c.weight[:, [0, 2, 7, 11]] = 0
    pruned = upscale.export(model, (torch.rand(2, 3, 8, 8),))
    assert pruned.report.reads.get("gather", 0) == 0
    assert pruned.a.out_channels == 4 and pruned.b.out_channels == 4


def test_a_layer_that_hands_on_every_channel_it_keeps_is_read_whole() -> None:
    pruned = upscale.export(masked_pair(), (torch.rand(2, 3, 8, 8),))
    assert set(pruned.report.reads) == {"whole"}
    assert pruned.get_submodule("0").out_channels == 5
    assert pruned.get_submodule("1").num_features == 5


class Joined(nn.Module):
    """Two producers side by side, read by two layers and by an activation: the concatenation is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.one, self.two = nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.one(y) + self.two(y) + y.mean((1, 2, 3), keepdim=True)


@torch.no_grad()
def test_an_order_across_the_border_of_two_producers() -> None:
    """One reader wants the even channels of the first and the odd ones of the second: side by side at the border."""
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.rand(2, 3, 10, 10)
    model.one.weight[:, [*range(1, 8, 2), *range(8, 16, 2)]] = 0
    model.two.weight[:, [*range(0, 8, 2), *range(8, 16)]] = 0
    pruned = upscale.export(model, (x,))
    torch.testing.assert_close(pruned(x), model(x))
    assert pruned.report.reads["view"] == 2 and "gather" not in pruned.report.reads
    (order,) = pruned.report.plan.orders
    assert (order.channels, order.readers, order.cost, order.proven) == (16, 2, 0.0, True)
    assert "order" in str(pruned.report)

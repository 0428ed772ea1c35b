"""Elimination, error curves, derivatives of outputs and prices of channels, each against a slower way to the same."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import upscale
from upscale.budget import count_flops
from upscale.capture import capture
from upscale.prices import channel_prices
from upscale.ranking import Group
from upscale.repairing import sensitivity
from upscale.repairing.curve import along, increments
from upscale.repairing.eliminate import eliminate
from upscale.repairing.pair import collect, paired_with_itself
from upscale.repairing.samples import HELD_OUT
from upscale.repairing.sensitivity import Change, Sensitivity
from upscale.repairing.sites import find_sites


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- elimination ------------------------------------------------------------------------------------------------------


def fitted(x: Tensor, y: Tensor, kept: list[int], window: int) -> Tensor:
    """The least squares weight (outputs, inputs) of the channels that are kept."""
    columns = [channel * window + k for channel in kept for k in range(window)]
    weight = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype)
    if columns:
        weight[:, columns] = torch.linalg.lstsq(x[:, columns], y).solution.mT
    return weight


@pytest.mark.parametrize(("damping", "first"), [(0.01, 0), (1.0, 1)])
def test_damping_speaks_for_large_weights_on_what_is_idle_here(damping: float, first: int) -> None:
    gram, weight = torch.diag(torch.tensor([1e-4, 1.0])).double(), torch.tensor([[2.0, 0.3]]).double()
    path = eliminate(gram[None], weight[None], 1, torch.ones(1, 1, dtype=torch.float64), damping)
    assert path.order.tolist() == [first, 1 - first]


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf"), True, "much"])
def test_a_wrong_damping_is_refused(damping: object) -> None:
    with pytest.raises(upscale.InputError, match="damping must be a number"):
        upscale.OBS([torch.rand(2, 3)], damping=damping)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [1, 3])
def test_each_removal_is_the_one_that_costs_least(window: int) -> None:
    """Every candidate is tried by least squares on the rows themselves."""
    channels = 7
    x = normal(400, channels * window) + 0.8 * normal(400, 1, seed=2)
    weight, factors = normal(4, channels * window, seed=3), torch.tensor([1.0, 0.0, 3.0, 0.2], dtype=torch.float64)
    y = x @ weight.mT
    path = eliminate((x.mT @ x / 400)[None], weight[None], window, factors[None], 0.0, range(1, channels + 1))
    left, error = list(range(channels)), 0.0
    for number in range(channels):
        tried = {}
        for channel in left:
            found = fitted(x, y, [c for c in left if c != channel], window)
            tried[channel] = float(((x @ found.mT - y).square().mean(0) * factors).sum())
        chosen = min(tried, key=tried.__getitem__)
        assert int(path.order[number]) == chosen
        left.remove(chosen)
        assert float(path.costs[: number + 1].sum()) == pytest.approx(tried[chosen], rel=1e-6)
        assert torch.allclose(path.weights[number + 1][0], fitted(x, y, left, window), rtol=1e-6, atol=1e-9)
        error = tried[chosen]
    assert error == pytest.approx(float((y.square().mean(0) * factors).sum()))


def test_groups_compete_for_the_next_removal() -> None:
    """A group's channels cannot make up for another's: each is refitted alone, and the cheaper one goes first."""
    grams = torch.stack([torch.eye(3, dtype=torch.float64)] * 2)
    weight = torch.tensor([[[1.0, 4.0, 2.0]], [[3.0, 0.5, 6.0]]], dtype=torch.float64)
    path = eliminate(grams, weight, 1, torch.ones(2, 1, dtype=torch.float64), 0.01, [3])
    assert path.order.tolist() == [4, 0, 2, 3, 1, 5]
    assert path.weights[3].flatten().tolist() == pytest.approx([0, 4, 0, 3, 0, 6])


# -- curves -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=24), st.data())
def test_curves_pass_through_what_was_measured(costs: list[float], data: st.DataObject) -> None:
    counts = sorted(data.draw(st.sets(st.integers(1, len(costs)))) | {len(costs)})
    errors = sorted(data.draw(st.lists(st.floats(0, 9), min_size=len(counts), max_size=len(counts))))
    curve = along(np.array(costs), counts, errors)
    assert curve[np.array(counts) - 1].tolist() == pytest.approx(errors)
    assert bool((np.diff(curve) >= -1e-12).all()) and curve[0] >= 0


def test_between_measurements_a_curve_grows_as_the_fit_does() -> None:
    assert along(np.array([1.0, 3.0, 0.0, 5.0]), [2, 4], [8.0, 9.0]).tolist() == [2.0, 8.0, 8.0, 9.0]


@given(st.lists(st.floats(0, 1).map(lambda v: round(v, 3)), min_size=1, max_size=24))
def test_increments_follow_the_greatest_convex_curve_below(steps: list[float]) -> None:
    curve = np.cumsum(steps)
    found = increments(curve)
    assert bool((np.diff(found) >= 0).all())  # the order of removals is that of the scores
    below = np.concatenate([[0.0], np.cumsum(found)])
    points = np.concatenate([[0.0], curve])
    for at in range(len(points)):  # by its definition: the lowest chord over each point
        chords = [
            points[a] + (points[b] - points[a]) * (at - a) / (b - a) if b > a else points[at]
            for a in range(at + 1)
            for b in range(at, len(points))
        ]
        assert below[at] == pytest.approx(min(chords), abs=1e-6)


# -- derivatives ------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer called twice, a batch norm, an activation, a linear layer on tokens, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.tokens, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.norm(self.stem(x)))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        tokens = torch.tanh(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(tokens.mean(1)), tokens[:, 0]


def made() -> tuple[Twice, list[Tensor]]:
    torch.manual_seed(0)
    model = Twice().double().eval()
    nn.init.uniform_(model.norm.running_mean, -1, 1)
    return model, [normal(14, 2, 4, 4), normal(10, 2, 4, 4, seed=2)]


@pytest.mark.parametrize("name", ["stem", "twice", "tokens", "head"])
def test_errors_are_those_of_a_small_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change of the outputs, made by changing the weights a little, examples one by one."""
    monkeypatch.setattr(sensitivity, "_DRAWS", 3000)
    monkeypatch.setattr(sensitivity, "_MOST_DRAWS", 3000)
    model, batches = made()
    inputs = collect(model, batches)
    pair = paired_with_itself(model, inputs)
    sites, _ = find_sites(pair, model)
    layer = model.get_submodule(name)
    weight, shift = normal(*layer.weight.shape, seed=5), normal(layer.weight.shape[0], seed=6)
    changes = [Change(weight, shift), Change(weight, shift * 0), Change(weight * 0, shift)]
    found = Sensitivity(pair.masked, inputs, sites, 0).errors({name: changes})[name]
    x = torch.cat(batches)[torch.arange(24) % HELD_OUT == 1]
    with torch.no_grad():
        before = model(x)
        for change, told in zip(changes, found, strict=True):
            step = 1e-6
            layer.weight += step * change.weight
            handle = layer.register_forward_hook(lambda _, __, y, s=step * change.shift: y + spread(s, y))
            after = model(x)
            handle.remove()
            layer.weight -= step * change.weight
            parts = [
                (((b - a) / step).square().sum() / (a - a.mean()).square().sum())
                for a, b in zip(before, after, strict=True)
            ]
            assert told == pytest.approx(float(sum(parts)) / 2, rel=0.1)


def spread(shift: Tensor, output: Tensor) -> Tensor:
    return shift.view(1, -1, 1, 1) if output.dim() == 4 else shift


def test_factors_are_mean_squares_of_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last layer they are known: every output counts by itself, in units of the outputs' variance."""
    monkeypatch.setattr(sensitivity, "_DRAWS", 3000)
    monkeypatch.setattr(sensitivity, "_MOST_DRAWS", 3000)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval(), normal(64, 5)
    inputs = collect(model, [x])
    pair = paired_with_itself(model, inputs)
    sites, _ = find_sites(pair, model)
    found = Sensitivity(pair.masked, inputs, sites, 0).factors()
    held = x[torch.arange(64) % HELD_OUT == 1]
    with torch.no_grad():
        y = model(held)
        scale = float((y - y.mean()).square().sum()) / len(held)
        slope = 1 - torch.tanh(model[0](held)).square()
        inner = (slope.square().mean(0) * model[2].weight.square().sum(0)) / scale
    assert found["2"].tolist() == pytest.approx([1 / scale] * 3, rel=0.1)
    assert found["0"].tolist() == pytest.approx(inner.tolist(), rel=0.1)


# -- prices -----------------------------------------------------------------------------------------------------------


class Forked(nn.Module):
    """One tensor with two readers, one of which alone reads the next; a transposed convolution; a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.up(torch.relu(self.left(x))) + self.right(x)


@torch.no_grad()
def test_the_price_of_a_channel_is_what_an_export_saves_without_it() -> None:
    model, x = Forked().eval(), torch.randn(2, 3, 8, 8)
    program = capture(model, (x,), {})
    groups = [Group({name: torch.arange(size)}, size) for name, size in (("left", 8), ("right", 8), ("up", 6))]
    left, right, up = channel_prices(program, "flops", groups, "input")
    whole = count_flops(program)

    def saved(*entries: tuple[str, int]) -> float:
        masked = copy.deepcopy(model)
        for layer, dim in entries:
            getattr(masked, layer).weight.select(dim, 2).zero_()
        return (whole - count_flops(capture(upscale.export(masked, (x,)), (x,), {}))) / 2

    assert float(up[2]) == saved(("up", 0))  # with the row of left
    assert float(left[2] + right[2]) == saved(("left", 1), ("right", 1))  # with the row of stem, half from each
    assert float(left[0] - right[0]) == 6 * 9 * 2 * 16 - 4 * 2 * 64


def test_prices_in_parameters_and_time() -> None:
    program = capture(Forked().eval(), (torch.randn(2, 3, 8, 8),), {})
    groups = [Group({"up": torch.arange(6)}, 6)]
    (weights,) = channel_prices(program, "params", groups, "input")
    (time,) = channel_prices(program, "latency", groups, "input")
    per_byte = float(weights[0]) / (4 * 4 + 8 * 9)
    assert float(weights.min()) == float(weights.max()) and per_byte == pytest.approx(4)
    assert bool((time > 0).all())


@torch.no_grad()
def test_a_channel_behind_a_flatten_is_paid_for_once() -> None:
    """It is as many columns of the linear layer as it has places: all of them together free what writes it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(8 * 16, 5)).eval(), torch.randn(2, 3, 4, 4)
    program = capture(model, (x,), {})
    columns = Group({"4": torch.arange(128)}, 128)
    tied = Group({"4": torch.arange(128).view(8, 16)}, 8)
    single, whole = channel_prices(program, "flops", [columns, tied], "input")
    masked = copy.deepcopy(model)
    masked[4].weight[:, 2 * 16 : 3 * 16] = 0
    saved = (count_flops(program) - count_flops(capture(upscale.export(masked, (x,)), (x,), {}))) / 2
    assert float(whole[2]) == pytest.approx(saved) and float(single[32:48].sum()) == pytest.approx(saved)


class Tokens(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.table, self.layer, self.head, self.times = (
            nn.Embedding(200, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
            times,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for _ in range(self.times):
            x = torch.relu(self.layer(x))
        return self.head(x)


@pytest.mark.parametrize(("times", "weights", "products"), [(1, 16 + 200, 10 * 16), (3, 16, 3 * 10 * 16)])
def test_parameters_are_counted_once_and_tables_too(times: int, weights: int, products: int) -> None:
    """What a layer that is called again and again reads is on no segment: nothing else would go."""
    program = capture(Tokens(times).eval(), (torch.randint(200, (2, 5)),), {})
    group = Group({"layer": torch.arange(16)}, 16)
    (by_weight,) = channel_prices(program, "params", [group], "input")
    (by_product,) = channel_prices(program, "flops", [group], "input")
    assert float(by_weight[0]) / 4 == pytest.approx(weights)  # in bytes
    assert float(by_product[0]) == pytest.approx(products)

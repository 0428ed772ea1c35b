"""Importances: scores worked out by hand or by another formula, whole runs, bad input, and no trace in the model."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.oracle import check_equal
from support.subjects import Block, SmallResNet, dense, image
from upscale import InputError, MaskingManager, NonFiniteError
from upscale.importance import (
    FPGM,
    L1,
    L2,
    LAMP,
    ActivationMagnitude,
    BatchNormScale,
    HRank,
    Random,
    Subject,
    Taylor,
    channel_scores,
)

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2)),
    "conv3d": lambda: nn.Conv3d(6, 4, 2),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 4, 3),
    "transposed3d": lambda: nn.ConvTranspose3d(6, 4, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
}
SIZES = {"linear": (), "conv1d": (7,), "conv3d": (3, 4, 5), "transposed1d": (7,), "transposed3d": (3, 4, 5)}


def slices(layer: nn.Module, side: str) -> list[np.ndarray]:
    """Each channel's weights, by the definition of the layer: which entries multiply, or make, the channel."""
    weight, groups = layer.weight.detach().numpy(), getattr(layer, "groups", 1)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    first, second = weight.shape[0] // groups, weight.shape[1]  # of one group
    by_first = [weight[c] for c in range(weight.shape[0])]
    by_second = [weight[g * first : (g + 1) * first, c] for g in range(groups) for c in range(second)]
    return by_first if transposed == (side == "input") else by_second


def scored(heuristic: Any, model: nn.Module, side: str = "output", norms: Any = None, **layers: nn.Module) -> Any:
    """Checked scores of these layers (the model itself if there are none)."""
    return channel_scores(heuristic, Subject(model, side, layers or {"layer": model}, norms or {}))


def loops(name: str, filters: list[np.ndarray]) -> list[float]:
    """The scores, term by term."""
    energy = [math.fsum(float(w) ** 2 for w in f.flat) for f in filters]
    if name == "l1":
        return [math.fsum(abs(float(w)) for w in f.flat) for f in filters]
    if name == "l2":
        return [math.sqrt(e) for e in energy]
    if name == "lamp":
        return [e / math.fsum(other for other in energy if other >= e) for e in energy]
    return [math.fsum(math.dist(f.flat, other.flat) for other in filters) for f in filters]


@pytest.mark.parametrize("name", ["l1", "l2", "lamp", "fpgm"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", LAYERS)
def test_scores_of_weights_agree_with_loops(kind: str, side: str, name: str) -> None:
    layer = LAYERS[kind]().double()
    scores = scored(name, layer, side)["layer"]
    torch.testing.assert_close(scores, torch.tensor(loops(name, slices(layer, side)), dtype=torch.float64))


def test_scores_of_weights_by_hand() -> None:
    rows = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert L1().of(rows).tolist() == [7, 0, 1, 1]
    assert L2().of(rows).tolist() == [5, 0, 1, 1]
    # Squares 25, 0, 1, 1: 25/25, 0/27, and twice 1/27, since each is at least as large as the other.
    torch.testing.assert_close(LAMP().of(rows), torch.tensor([1, 0, 1 / 27, 1 / 27], dtype=torch.float64))
    line = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # distances 1+3+10, 1+2+9, 3+2+7, 10+9+7
    torch.testing.assert_close(FPGM().of(line), torch.tensor([14.0, 12.0, 12.0, 26.0]))


def test_lamp_of_zeros_is_zero() -> None:
    assert LAMP().of(torch.zeros(3, 2)).tolist() == [0, 0, 0]


def test_lamp_ranks_within_a_layer_as_l2_does() -> None:
    rows = torch.randn(50, 7, dtype=torch.float64)
    assert LAMP().of(rows).argsort().tolist() == L2().of(rows).argsort().tolist()


@pytest.mark.parametrize("block", [1, 100, 700])
def test_fpgm_in_blocks_far_from_zero_and_for_twins(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Filters that nearly coincide, a thousand away from zero: squares in float32 would lose their distances."""
    monkeypatch.setattr("upscale.importance.weights._BLOCK", block)
    rows = 1000 + torch.randn(23, 5, dtype=torch.float32)
    rows[7] = rows[3]
    exact = torch.tensor(loops("fpgm", list(rows.double().numpy())), dtype=torch.float64)
    torch.testing.assert_close(FPGM().of(rows).double(), exact, rtol=1e-4, atol=0)


def test_fpgm_counts_no_distance_to_itself() -> None:
    """Two filters of many entries: a square root of rounding errors would show in some of the trials."""
    for entries in range(500, 520):
        rows = torch.randn(2, entries)
        exact = math.dist(*rows.double().tolist())
        torch.testing.assert_close(FPGM().of(rows).tolist(), [exact, exact], rtol=3e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    layer = nn.Linear(300, 4)
    nn.init.normal_(layer.weight, std=100)
    layer = layer.to(dtype)
    for name in ("l1", "l2", "lamp", "fpgm"):
        exact = loops(name, slices(copy.deepcopy(layer).double(), "output"))
        torch.testing.assert_close(scored(name, layer)["layer"].tolist(), exact, rtol=1e-4, atol=0)


# -- batch norms -------------------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """A sum, a concatenation, a flattening and a layer without a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, n, 3, padding=1) for n in (4, 4, 2))
        self.na, self.nb, self.nc = (nn.BatchNorm2d(n) for n in (4, 4, 2))
        self.after_sum, self.after_cat = nn.Conv2d(4, 3, 1), nn.Conv2d(6, 3, 1)
        self.flat = nn.Linear(4 * 6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        a, b, c = self.na(self.a(x)), self.nb(self.b(x)), self.nc(self.c(x))
        total = (a + b).relu()
        joined = self.after_cat(torch.cat([c, a], 1).relu())
        pooled = F.adaptive_avg_pool2d(total, (2, 3)).flatten(1)
        return self.after_sum(total), joined, self.head(self.flat(pooled))


def test_bn_scale_follows_sums_concatenations_and_flattening() -> None:
    model = dense(Joined())
    with torch.no_grad():
        for norm, scale in ((model.na, [1, -2, 3, 4]), (model.nb, [10, 20, -30, 40]), (model.nc, [5, -6])):
            norm.weight.copy_(torch.tensor(scale))
    manager = MaskingManager(model, example_inputs=image())
    with pytest.raises(InputError, match="no batch norm scales the channels of head on the input side"):
        manager.importance("bn_scale")
    scores = manager.importance(BatchNormScale(otherwise=L2()))._scores
    assert scores is not None
    assert scores["after_sum"].tolist() == [11, 22, 33, 44]
    assert scores["after_cat"].tolist() == [5, 6, 1, 2, 3, 4]
    assert scores["flat"].tolist() == [11] * 6 + [22] * 6 + [33] * 6 + [44] * 6
    torch.testing.assert_close(scores["head"], model.head.weight.detach().norm(dim=0))
    written = MaskingManager(model, side="output", example_inputs=image()).importance(BatchNormScale(L2()))._scores
    assert written is not None and written["a"].tolist() == [1, 2, 3, 4]


def test_bn_scale_of_a_preactivation_block_is_that_of_the_readers_own_norm() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.n1, self.n2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.one(self.n1(x).relu())
            return self.two(self.n2(x).relu())

    model = dense(Net())
    scores = MaskingManager(model, example_inputs=image()).importance("BN_Scale")._scores
    assert scores is not None
    assert scores["one"].tolist() == model.n1.weight.abs().tolist()
    assert scores["two"].tolist() == model.n2.weight.abs().tolist()


# -- data --------------------------------------------------------------------------------------------------------------


def recorded(model: nn.Module, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What a module reads and writes, by an ordinary hook."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append((i[0].clone(), o.clone())))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


def low_rank(examples: int, channels: int, ranks: list[int], size: int) -> Tensor:
    """Images whose channels have the given ranks."""
    generator = torch.Generator().manual_seed(4)
    maps = torch.zeros(examples, channels, size, size, dtype=torch.float64)
    for channel, rank in enumerate(ranks):
        left, right = (torch.randn(examples, size, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        maps[:, channel] = left @ right.transpose(1, 2)
    return maps


def test_hrank_of_maps_whose_rank_is_known() -> None:
    layer = nn.Conv2d(4, 2, 3).double()
    first, second = low_rank(3, 4, [2, 0, 5, 1], 6), low_rank(1, 4, [2, 4, 1, 1], 6)
    scores = scored(HRank([first, (second, torch.tensor([7]))]), layer, "input")["layer"]
    assert scores.tolist() == [2, 1, 4, 1]  # three images and one: (3 * 0 + 4) / 4, (3 * 5 + 1) / 4


@pytest.mark.parametrize("side", ["input", "output"])
def test_hrank_agrees_with_numpy_map_by_map(side: str) -> None:
    """On the output side: after batch norm and ReLU, before the sum."""
    model, x = dense(SmallResNet()), image(batch=3)
    manager = MaskingManager(model, side=side, example_inputs=x).importance(HRank([x[:2], x[2:]]))
    assert manager._scores is not None
    relu = F.relu
    maps = {
        "layer1.0.conv1": lambda: relu(recorded(model, x, "layer1.0.bn1")[1]),
        "layer1.0.conv2": lambda: recorded(model, x, "layer1.0.bn2")[1],
        "layer2.1.conv1": lambda: relu(recorded(model, x, "layer2.1.bn1")[1]),
    }
    for name, written in maps.items():
        value = (written() if side == "output" else recorded(model, x, name)[0]).numpy()
        expected = [np.mean([np.linalg.matrix_rank(m) for m in value[:, c]]) for c in range(value.shape[1])]
        torch.testing.assert_close(manager._scores[name].tolist(), expected)


@pytest.mark.parametrize("add", ["y += x", "y.add_(x)", "y[:] = y + x", "y = y + x", "y = y.mul_(x)"])
def test_hrank_takes_a_map_before_it_is_overwritten(add: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            names = {"x": x[:, :1], "y": F.relu(self.conv(x[:, 1:]), inplace=True)}
            exec(add, names)
            return names["y"]

    model = Net().double()
    nn.init.ones_(model.conv.weight)
    x = low_rank(2, 2, [5, 1], 6)
    x[:, 1].abs_()  # of one column times one row: still of rank 1, and ReLU leaves it as it is
    assert scored(HRank([x]), model, "output", layer=model.conv)["layer"].tolist() == [1]


def test_hrank_of_vectors_is_the_share_of_examples_that_are_not_zero() -> None:
    x = torch.tensor([[1.0, 0, 0], [2, 0, 3], [0, 0, 4], [1, 0, 5]])
    assert scored(HRank([x]), nn.Linear(3, 2), "input")["layer"].tolist() == [0.75, 0, 0.75]
    sequence = torch.stack([x, 0 * x])  # (2, 4, 3): a channel is a sequence of four
    assert scored(HRank([sequence]), nn.Linear(3, 2), "input")["layer"].tolist() == [0.5, 0, 0.5]


def test_hrank_of_volumes_counts_every_slice() -> None:
    x = low_rank(3, 2, [3, 1], 5).movedim(0, 1)[None]  # (1, 2, 3, 5, 5)
    assert scored(HRank([x]), nn.Conv3d(2, 2, 3).double(), "input")["layer"].tolist() == [3, 1]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", LAYERS)
def test_activation_magnitude_agrees_with_loops(kind: str, side: str) -> None:
    """A weight times the norm of the one input channel that it multiplies, found by perturbing that channel."""
    layer, size = LAYERS[kind]().double(), SIZES.get(kind, (6, 5))
    x = torch.randn(5, 6, *size, dtype=torch.float64) * torch.arange(1.0, 7.0).view(6, *[1] * len(size))
    norms = x.transpose(0, 1).flatten(1).norm(dim=1).numpy()
    scaled = copy.deepcopy(layer)
    for c, part in enumerate(slices(scaled, "input")):
        part *= norms[c]  # a view of the weight
    expected = loops("l2", slices(scaled, side))
    scores = scored(ActivationMagnitude([x[:2], x[2:]]), layer, side)["layer"]
    torch.testing.assert_close(scores.tolist(), expected)


def test_activation_magnitude_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[3.0, 1.0], [4.0, 0.0]])  # norms of columns: 5 and 1
    batches = [torch.tensor([[1.0, 6.0]]), torch.tensor([[0.0, 8.0]])]  # norms 1 and 10
    assert scored(ActivationMagnitude(batches), layer, "input")["layer"].tolist() == [5, 10]
    expected = [math.sqrt(9 + 100), 4.0]
    torch.testing.assert_close(scored(ActivationMagnitude(batches), layer, "output")["layer"].tolist(), expected)


def mean_square(output: Tensor, batch: Any) -> Tensor:
    x, y = batch
    return (output - y).square().mean()


def numerically(model: nn.Module, loss: Callable[[], Tensor], change: Callable[[float], None]) -> float:
    """Derivative of the loss by a gate, by central differences; ``change(g)`` multiplies what it gates by ``g``."""
    step, before = 1e-5, copy.deepcopy(model.state_dict())
    found = []
    for gate in (1 + step, 1 - step):
        with torch.no_grad():
            change(gate)
            found.append(float(loss()))
            model.load_state_dict(before)
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("side", ["input", "output"])
def test_taylor_is_the_squared_derivative_by_a_gate(side: str) -> None:
    """With a batch norm behind a layer, one behind none, and a grouped convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 1)
    )
    model = dense(model)
    batches = [(image(2, 8, seed), torch.randn(2, 2, 4, 4, dtype=torch.float64)) for seed in (1, 2)]
    layers = {name: model.get_submodule(name) for name in ("0", "3", "5")}
    scores = scored(Taylor(batches, mean_square), model, side, {"0": (model[1],)}, **layers)

    def gate(name: str, channel: int) -> Callable[[float], None]:
        def change(value: float) -> None:
            gated = [slices(layers[name], side)[channel]]
            if side == "output":
                follows = model[1] if name == "0" else layers[name]
                gated = [follows.bias.detach()[channel : channel + 1].numpy()]
                gated.append(follows.weight.detach()[channel : channel + 1].numpy())
            for part in gated:
                part *= value

        return change

    for name in layers:
        for channel in range(len(scores[name])):
            slopes = [numerically(model, lambda b=b: mean_square(model(b[0]), b), gate(name, channel)) for b in batches]
            assert float(scores[name][channel]) == pytest.approx(np.mean(np.square(slopes)), rel=1e-5, abs=1e-12)


def test_taylor_scores_frozen_weights_and_takes_dicts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, features: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": self.two(torch.relu(self.one(features))) * scale}

    model = Net().requires_grad_(False)
    batches = [{"features": torch.randn(5, 3), "labels": torch.tensor([0, 1, 0, 1, 1])}]
    taylor = Taylor(batches, lambda output, batch: F.cross_entropy(output["logits"], batch["labels"]))
    manager = MaskingManager(model, example_inputs={"features": torch.randn(2, 3)}).importance(taylor)
    assert manager._scores is not None and (manager._scores["two"] > 0).any()
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


class TwoInputs(nn.Module):
    """One input with channels that differ from example to example, one that scales them, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor, power: Tensor | None = None) -> Tensor:
        return self.layer((x * scale) ** (1 if power is None else power))


@pytest.mark.parametrize(
    ("batch", "power"),
    [
        (lambda x, s: (x, s), 1),
        (lambda x, s: [x, s, torch.tensor(3)], 1),  # labels, not the third argument
        (lambda x, s: {"scale": s, "x": x, "labels": torch.tensor([math.nan])}, 1),
        (lambda x, s: {"scale": s, "x": x, "power": torch.tensor(2)}, 2),
    ],
)
def test_what_the_model_gets_of_a_batch(batch: Callable[[Tensor, Tensor], Any], power: int) -> None:
    model, x, scale = TwoInputs(), torch.rand(4, 3), torch.rand(4, 1)
    found = scored(ActivationMagnitude([batch(x, scale)]), model, "input", layer=model.layer)["layer"]
    expected = model.layer.weight.detach().norm(dim=0) * ((x * scale) ** power).norm(dim=0)
    torch.testing.assert_close(found.float(), expected)


def test_a_data_loader_that_is_interrupted_leaves_no_trace() -> None:
    def batches() -> Iterator[Any]:
        yield labelled()[0]
        torch.rand(5)
        raise KeyboardInterrupt

    for make in (HRank, ActivationMagnitude, lambda b: Taylor(b, cross_entropy)):
        model = dense(SmallResNet()).train().requires_grad_(False)
        manager = MaskingManager(model, example_inputs=image())
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            manager.importance(make(batches()))
        assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
        assert all(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())


# -- whole runs --------------------------------------------------------------------------------------------------------


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def residual() -> nn.Module:
    """A stem, one block with a strided shortcut and a classifier."""
    layers = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 12, 2)
    return dense(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)))


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(image(4, seed=seed), torch.arange(4)) for seed in (5, 6)]


HEURISTICS: dict[str, Callable[[], Any]] = {
    "l1": lambda: "L1",
    "l2": lambda: "l2",
    "lamp": lambda: "LAMP",
    "fpgm": lambda: FPGM,
    "bn_scale": lambda: "bn_scale",
    "random": lambda: Random(seed=3),
    "hrank": lambda: HRank(labelled()),
    "taylor": lambda: Taylor(labelled(), cross_entropy),
    "activation": lambda: ActivationMagnitude(labelled()),
}
WAYS = [("input", "unconstrained"), ("input", "constrained"), ("input", "contiguous")]
WAYS += [("output", "unconstrained"), ("output", "constrained")]


@pytest.mark.parametrize(("side", "method"), WAYS)
@pytest.mark.parametrize("name", HEURISTICS)
def test_every_importance_masks_exports_and_verifies(name: str, side: Any, method: Any) -> None:
    model = residual()
    manager = MaskingManager(model, side=side, method=method, example_inputs=image())
    lowest = manager.importance(HEURISTICS[name]())._scores
    manager.mask(0.25)
    assert manager.masked and lowest is not None
    if method == "unconstrained" and side == "input":
        for layer, channels in manager.masked.items():
            kept = torch.ones(len(lowest[layer]), dtype=torch.bool)
            kept[channels] = False
            assert lowest[layer][channels].max() <= lowest[layer][kept].min()
    exported = upscale.export(model, (image(),))
    assert sum(p.numel() for p in exported.parameters()) < sum(p.numel() for p in model.parameters())
    check_equal(model, exported, image(), batches=(1, 3))


@pytest.mark.parametrize("name", HEURISTICS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_scores_are_the_same_again_and_leave_no_trace(name: str, side: Any) -> None:
    model = residual().train()
    model[1].eval()
    for parameter in itertools.islice(model.parameters(), 5):
        parameter.requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    manager = MaskingManager(model, side=side, example_inputs=image())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random_state, python_state = torch.get_rng_state(), random.getstate()

    first = manager.importance(HEURISTICS[name]())._scores
    torch.manual_seed(99)
    second = manager.importance(HEURISTICS[name]())._scores
    assert first is not None and second is not None and first.keys() == second.keys() and first
    assert all(torch.equal(first[layer], second[layer]) for layer in first)
    torch.set_rng_state(random_state)
    manager.importance(HEURISTICS[name]())
    assert torch.equal(torch.get_rng_state(), random_state) and random.getstate() == python_state
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    for parameter, (needs, grad) in zip(model.parameters(), flags, strict=True):
        assert parameter.requires_grad == needs
        assert (parameter.grad is None) == (grad is None) and (grad is None or torch.equal(parameter.grad, grad))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    model.load_state_dict(model.state_dict())


def test_random_depends_on_seed_and_layer_only() -> None:
    model = dense(SmallResNet())
    one, two = ({"a": model.conv1, "b": model.fc}, {"b": model.fc})
    assert torch.equal(scored("random", model, **one)["b"], scored(Random(0), model, **two)["b"])
    assert not torch.equal(scored(Random(1), model, **two)["b"], scored(Random(0), model, **two)["b"])
    scores = scored("random", model, big=nn.Linear(1, 10_000))["big"]
    assert 0 <= scores.min() and scores.max() < 1 and abs(float(scores.mean()) - 0.5) < 0.02


def test_a_layer_whose_weight_is_handed_to_a_function_is_seen() -> None:
    """Also transposed, cast, and by a matrix product."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("ones", torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.one.weight, self.one.bias).relu()
            x = x @ (self.two.weight * self.ones).to(torch.float32).t() + self.two.bias
            return torch.addmm(self.three.bias * 2, x.relu_(), self.three.weight.t())

    model, x = Net(), torch.randn(6, 3)
    layers = {"one": model.one, "two": model.two, "three": model.three}
    with torch.no_grad():
        first = F.relu(model.one(x))
        second = F.relu(model.two(first))
    found = scored(ActivationMagnitude([x]), model, "input", **layers)
    for name, read in (("one", x), ("two", first), ("three", second)):
        torch.testing.assert_close(
            found[name].float(), layers[name].weight.detach().norm(dim=0) * read.norm(dim=0), rtol=1e-5, atol=1e-6
        )
    ranks = scored(HRank([x]), model, "output", **layers)
    torch.testing.assert_close(ranks["one"].float(), first.ne(0).float().mean(0))
    product = first @ model.two.weight.detach().t()  # what is added to it afterwards is no activation
    torch.testing.assert_close(ranks["two"].float(), product.ne(0).float().mean(0))


# -- bad input ---------------------------------------------------------------------------------------------------------


def nan_batches() -> Iterator[Tensor]:
    yield image()
    yield image() * math.nan


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no batches": (lambda: HRank([]), InputError, "no batches"),
    "used up": (lambda: ActivationMagnitude(iter(())), InputError, "only once"),
    "wrong shape": (lambda: HRank([image(), torch.rand(2, 4, 12, 12)]), InputError, "batch 1: the model does not acc"),
    "not a batch": (lambda: HRank([3.5]), InputError, "batch 0 must be a tensor, a tuple or a dict"),
    "empty batch": (lambda: HRank([image()[:0]]), InputError, "batch 0 holds an empty tensor"),
    "NaN in the data": (lambda: ActivationMagnitude(nan_batches()), NonFiniteError, "batch 1 holds NaN"),
    "wrong loss": (lambda: Taylor(labelled(), lambda output, batch: output), InputError, "one element, not a tensor"),
    "loss is a float": (lambda: Taylor(labelled(), lambda output, batch: 1.0), InputError, "not float"),
    "loss is NaN": (lambda: Taylor(labelled(), lambda o, b: o.sum() * math.nan), NonFiniteError, "the loss is nan"),
    "detached": (lambda: Taylor(labelled(), lambda o, b: o.detach().sum()), InputError, "does not depend"),
    "a class with arguments": (lambda: HRank, InputError, "HRank needs arguments"),
    "a name with data": (lambda: "HRank", InputError, r"upscale.HRank\(batches\)"),
    "unknown": (lambda: "l3", InputError, "'l1', 'l2', 'lamp'"),
    "NaN": (lambda: lambda w: w * math.nan, NonFiniteError, "NaN or infinite scores"),
    "wrong length": (lambda: lambda w: torch.ones(3), InputError, "not one of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    make, error, message = BAD[case]
    model = dense(SmallResNet()).train()
    manager = MaskingManager(model, example_inputs=image()).importance("l1")
    scores, before = manager._scores, copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        manager.importance(make())
    assert manager._scores is scores and all(m.training for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        model(image())  # no hook or mode is left


@pytest.mark.parametrize("batches", [torch.rand(2, 3, 8, 8), {"x": torch.rand(2)}, 5, None, "data"])
def test_a_single_batch_is_no_iterable_of_batches(batches: Any) -> None:
    for make in (HRank, ActivationMagnitude, lambda b: Taylor(b, cross_entropy)):
        with pytest.raises(InputError, match="iterable of batches"):
            make(batches)


def test_other_bad_arguments() -> None:
    with pytest.raises(InputError, match="loss"):
        Taylor([], None)  # type: ignore[arg-type]
    for seed in (-1, 1.5, True, 2**63):
        with pytest.raises(InputError, match="seed"):
            Random(seed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="otherwise"):
        BatchNormScale("l2")  # type: ignore[arg-type]

    class Partial:
        def scores(self, subject: Subject) -> Any:
            return {}

    with pytest.raises(InputError, match="layer: the scores must be a tensor of shape"):
        scored(Partial(), nn.Linear(3, 2))
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.weight, math.inf)
    with pytest.raises(NonFiniteError, match="layer.weight"):
        scored("fpgm", broken)


@pytest.mark.parametrize("make", [HRank, ActivationMagnitude, lambda b: Taylor(b, lambda o, _: o.sum())])
def test_layers_that_the_data_never_reaches_are_named(make: Callable[[Any], Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) if x.mean() < 1000 else self.unused(x)

    model = Net()
    with pytest.raises(InputError, match="never reaches unused"):
        scored(make([torch.rand(2, 3)]), model, used=model.used, unused=model.unused)


def test_a_bar_appears_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if stderr were a terminal
    scored(ActivationMagnitude([torch.rand(2, 3)]), nn.Linear(3, 2), "input")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("upscale.importance.progress._PATIENCE", 0.0)

    def slow() -> Iterator[Tensor]:
        import time

        for _ in range(3):
            time.sleep(0.1)
            yield torch.rand(2, 3)

    scored(ActivationMagnitude(slow()), nn.Linear(3, 2), "input")
    out, err = capfd.readouterr()
    assert out == "" and "activations" in err


# -- regularisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
def test_group_lasso_is_the_weighted_sum_of_norms(side: Any) -> None:
    layers = [make().double() for make in LAYERS.values()]
    expected = sum(
        math.sqrt(part.size) * math.sqrt(math.fsum(float(w) ** 2 for w in part.flat))
        for layer in layers
        for part in slices(layer, side)
    )
    tied = nn.Linear(6, 4)
    tied.weight = layers[0].weight
    model = nn.ModuleList([*layers, tied, nn.LayerNorm(3)])  # a shared weight counts once
    penalty = upscale.regularize.group_lasso(model, side=side)
    assert penalty.shape == () and penalty.item() == pytest.approx(expected)
    penalty.backward()
    for layer in layers:
        for part, grad in zip(slices(layer, side), slices_of_grad(layer, side), strict=True):
            np.testing.assert_allclose(grad, math.sqrt(part.size) * part / np.linalg.norm(part.ravel()))


def slices_of_grad(layer: nn.Module, side: str) -> list[np.ndarray]:
    other = copy.deepcopy(layer)
    other.weight.data = layer.weight.grad
    return slices(other, side)


def test_regularisers_by_hand() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    penalty = upscale.regularize.group_lasso(layer)
    assert penalty.item() == pytest.approx(5 * math.sqrt(2))
    penalty.backward()
    assert layer.weight.grad is not None and layer.weight.grad[:, 1].tolist() == [0, 0]  # not NaN
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    model[0].weight.data, model[1].weight.data = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-4.0, 0.5])
    sparsity = upscale.regularize.bn_scale(model)
    sparsity.backward()
    assert sparsity.item() == 7.5 and model[0].weight.grad.tolist() == [1, -1, 0]
    with pytest.raises(InputError, match="no batch norm"):
        upscale.regularize.bn_scale(layer)
    with pytest.raises(InputError, match="side"):
        upscale.regularize.group_lasso(layer, side="left")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no convolution"):
        upscale.regularize.group_lasso(model)


def test_the_documented_example_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "importance.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/importance.md", "exec"), names)
    for name in ("L1", "L2", "LAMP", "FPGM", "BatchNormScale", "Random", "HRank", "Taylor", "ActivationMagnitude"):
        assert f"`{name}" in text

"""Importances from data: scores against other formulas, what the model gets of a batch, and bad data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.scores import LAYERS, SIZES, cross_entropy, labelled, loops, scored, slices
from support.subjects import SmallResNet, dense, image
from upscale import InputError, MaskingManager, NonFiniteError
from upscale.importance import (
    ActivationMagnitude,
    HRank,
    Taylor,
)


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
    with pytest.raises(InputError, match="loss"):
        Taylor([], None)  # type: ignore[arg-type]


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

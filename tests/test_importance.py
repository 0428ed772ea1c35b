"""Importances: scores of weights by hand or by another formula, whole runs of all of them, and no trace left."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.oracle import check_equal
from support.scores import LAYERS, cross_entropy, labelled, loops, residual, scored, slices
from support.subjects import SmallResNet, dense, image
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
)


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
    assert FPGM().of(line).tolist() == [14, 12, 12, 26]


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


def test_fpgm_of_near_twins_in_distant_clusters() -> None:
    """The distances within a cluster are a ten-thousandth of those between: single precision would lose their order."""
    torch.manual_seed(0)
    rows = torch.cat([1e-3 * torch.randn(20, 64), 50 + 1e-3 * torch.randn(20, 64)])
    exact = torch.tensor(loops("fpgm", list(rows.double().numpy())), dtype=torch.float64)
    scores = FPGM().of(rows)
    assert scores.argsort().tolist() == exact.argsort().tolist()
    torch.testing.assert_close(scores, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fpgm_of_large_layers_in_the_precision_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("upscale.importance.weights._CHEAP", 0)
    rows = torch.randn(300, 40).to(dtype)
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
    torch.testing.assert_close(FPGM().of(rows), exact, rtol=1e-5, atol=0)


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


@pytest.mark.parametrize("length", [4, 6])
def test_bn_scale_is_not_that_of_another_dimension(length: int) -> None:
    """A layer that mixes pixels of channels reads no channel's scale, whether or not there are as many of both."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
            self.mix, self.head = nn.Linear(length, 5), nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.norm(self.stem(x)).relu()).relu().flatten(1))

    model, x = dense(Mixer()), torch.rand(2, 3, length, dtype=torch.float64)
    scores = MaskingManager(model, example_inputs=x).importance(BatchNormScale(otherwise=L2()))._scores
    assert scores is not None
    torch.testing.assert_close(scores["mix"], model.mix.weight.detach().norm(dim=0))


def test_bn_scale_says_which_layers_to_leave_alone() -> None:
    model = dense(Joined())
    for side in ("input", "output"):
        with pytest.raises(InputError, match="ignore=") as caught:
            upscale.mask(model, image(), importance="bn_scale", side=side)
        names = eval(str(caught.value).split("ignore=")[1].split(", given")[0])
        assert names == (["head"] if side == "input" else ["flat"])
        masked = upscale.mask(model, image(), importance="bn_scale", side=side, ignore=names)
        assert all(
            map(torch.equal, masked.get_submodule(names[0]).parameters(), model.get_submodule(names[0]).parameters())
        )
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).double().eval()
    with pytest.raises(InputError, match="nor of any other layer.*choose another importance"):
        upscale.mask(plain, image(), importance="bn_scale")


# -- whole runs -------------------------------------------------------------------------------------------------------


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


def test_bad_arguments() -> None:
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


def test_the_documented_example_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "importance.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/importance.md", "exec"), names)
    for name in ("L1", "L2", "LAMP", "FPGM", "BatchNormScale", "Random", "HRank", "Taylor", "ActivationMagnitude"):
        assert f"`{name}" in text


@torch.no_grad()
def test_lamp_ranks_all_layers_together_by_its_own_scale() -> None:
    """Energies 1 and 9 score 0.1 and 1; equal ones score 0.5 both, however large they are."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].weight.copy_(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    model[2].weight.copy_(torch.tensor([[20.0, 20.0], [0.0, 0.0]]))
    model[3].weight.copy_(torch.tensor([[100.0, 100.0]]))
    example = torch.rand(2, 3)
    manager = upscale.MaskingManager(model, is_global=True, example_inputs=example).importance("lamp").mask(0.17)
    assert {name: channels.tolist() for name, channels in manager.masked.items()} == {"1": [0]}
    scaled = upscale.MaskingManager(model, is_global=True, example_inputs=example).importance("lamp")
    assert scaled.mask(0.34).masked.keys() == {"1", "2"}

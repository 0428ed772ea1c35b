"""1x1 convolutions that read a slice as matrix products: the same numbers, no copy, and convolutions when captured."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, randomise
from upscale import Target, measure, tuning
from upscale.capture import capture
from upscale.plan import Plan, Rates
from upscale.pointwise import as_products
from upscale.recipe.describe import graph_lines

# Copies are dear, computing is dearer, and calls cost nothing: what can be a product is one, at any size.
DEAR = Rates(call=0.0, piece=0.0, copy=1e3, pick=2e3, multiply=1e3)
NEVER = replace(DEAR, product=math.inf)
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMATS = {"rows": "channels_last", "planes": "contiguous"}


class Two(nn.Module):
    """A tensor with two readers of different channels; ``first`` makes the layer under test."""

    def __init__(self, first: nn.Module, dims: int = 2) -> None:
        super().__init__()
        self.stem, self.first = CONVOLUTIONS[dims](3, 32, 3, padding=1), first
        self.second = CONVOLUTIONS[dims](32, 20, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x).relu()
        return self.first(y), self.second(y)


@torch.no_grad()
def masked(model: nn.Module) -> nn.Module:
    """In float64, ``first`` without its first third of channels, ``second`` without its last."""
    model = randomise(model.double().eval())
    first = model.first[0] if isinstance(model.first, nn.Sequential) else model.first
    first.weight[:, : first.weight.shape[1] // 3] = 0
    model.second.weight[:, -10:] = 0
    return model


def layer(bias: bool = True, **options: Any) -> nn.Module:
    return nn.Conv2d(32, 16, **{"kernel_size": 1, "bias": bias} | options)


def image(batch: int, *sizes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *(sizes or (9, 7)), dtype=torch.float64, generator=generator)


def target(form: str, rates: Rates = DEAR, **options: Any) -> Target:
    return Target(**{"batch": 4, "memory_format": FORMATS[form], "rates": rates} | options)


def check(model: nn.Module, pruned: nn.Module, *images: Tensor) -> None:
    for x in images:
        check_equal(model, pruned, x)


def forms(pruned: nn.Module) -> list[str]:
    return [cut.product for cut in pruned.report.plan.contractions.values() if cut.product]


BOTH = pytest.mark.parametrize("form", ["rows", "planes"])


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [None, "spatial"])
def test_a_product_computes_the_same_at_every_size(form: str, bias: bool, dynamic: str | None) -> None:
    model = masked(Two(nn.Sequential(layer(bias), nn.BatchNorm2d(16), nn.ReLU(inplace=True))))
    pruned = upscale.export(model, (image(4),), target=target(form), dynamic_shapes=dynamic)
    assert forms(pruned) == [form]
    assert type(pruned.first[0]) is nn.Conv2d and pruned.first[0].weight.shape == (16, 22, 1, 1)
    for batch in (1, 2, 4):
        check(model, pruned, image(batch, *((9, 7) if dynamic is None else (8, 11))))
        strange = image(batch).contiguous(memory_format=torch.channels_last)  # not what was planned for
        check(model, pruned, strange)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_planes_of_any_number_of_dimensions(dims: int, bias: bool) -> None:
    model = masked(Two(CONVOLUTIONS[dims](32, 16, 1, bias=bias), dims))
    x = image(4, *(5, 4, 3)[:dims])
    pruned = upscale.export(model, (x,), target=Target(batch=4, rates=DEAR))
    assert forms(pruned) == ["planes"]
    check(model, pruned, x, image(1, *(5, 4, 3)[:dims]))


@BOTH
def test_nothing_is_copied_to_read_the_slice(form: str) -> None:
    """Counted by the profiler, in float32. The other reader's slice is copied in both models."""
    model = masked(Two(layer(bias=False))).float()
    formats = {"rows": torch.channels_last, "planes": torch.contiguous_format}
    x = image(4).float().contiguous(memory_format=formats[form])
    with_clone = upscale.export(model, (x,), target=target(form, NEVER))
    product = upscale.export(model, (x,), target=target(form))
    saved = measure.copies(with_clone, (x,)).bytes - measure.copies(product, (x,)).bytes
    assert saved == 4 * 22 * 9 * 7 * 4
    slices = [read.kind for by in product.report.plan.reads.values() for read in by.values()]
    assert slices.count("view") == 2
    assert product(x)[0].stride() == with_clone(x)[0].stride()


UNASKED = {
    "no target": None,
    "rates only": Target(rates=DEAR),
    "channels first, batch 1": Target(batch=1, memory_format="contiguous", rates=DEAR),
    "calls that cost more than the copy": target("rows", Rates()),
    "a copy that takes no time beside the layer": target("rows", replace(DEAR, multiply=1e5)),
    "slow products": target("rows", replace(DEAR, product=1e9)),
    "compile": target("rows", backend="compile"),
    "onnxruntime": target("rows", backend="onnxruntime"),
    "a GPU": target("rows", None, device="cuda"),
}


@pytest.mark.parametrize("name", UNASKED)
def test_a_convolution_stays_one_where_it_was_not_asked_for_or_does_not_pay(name: str) -> None:
    model = masked(Two(layer()))
    batch = 1 if "batch 1" in name else 4
    pruned = upscale.export(model, (image(batch),), target=UNASKED[name])
    assert forms(pruned) == []
    check(model, pruned, image(4))


@pytest.mark.parametrize("reads", ["gather", "baseline"])
def test_only_the_planner_makes_products(reads: Any) -> None:
    pruned = upscale.export(masked(Two(layer())), (image(4),), reads=reads, target=target("rows"))
    assert forms(pruned) == []


def test_the_defaults_make_products_of_large_slices_only() -> None:
    """With the built-in rates: 22 of 32 channels are worth it at 56 x 56 and batch 8, and not at 14 x 14."""
    found = {}
    for size in (14, 56):
        model = Two(layer(bias=False))
        pruned = upscale.export(masked(model), (image(8, size, size),), target=target("rows", Rates(), batch=8))
        found[size] = forms(pruned)
    assert found == {14: [], 56: ["rows"]}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_the_layer_the_numbers_are_the_same(data: st.DataObject) -> None:
    """A product if and only if the layer does the same at every place by itself, and saves something."""
    pick = data.draw
    options = {
        "kernel_size": pick(st.sampled_from([1, 1, 1, 3, (1, 3)])),
        "stride": pick(st.sampled_from([1, 1, 1, 2, (1, 2)])),
        "padding": pick(st.sampled_from([0, 0, 0, 1, "valid"])),
        "groups": pick(st.sampled_from([1, 1, 1, 2])),
        "dilation": pick(st.sampled_from([1, 2])),
        "bias": pick(st.booleans()),
    }
    outputs, form = pick(st.sampled_from([8, 16, 40])), pick(st.sampled_from(sorted(FORMATS)))
    model = masked(Two(nn.Conv2d(32, outputs, **options)))
    pruned = upscale.export(model, (image(4),), target=target(form))
    plain = {"kernel_size": 1, "stride": 1, "padding": 0, "groups": 1}
    expected = outputs >= 16 and all(options[name] == value for name, value in plain.items())
    assert forms(pruned) == ([form] if expected else [])
    check(model, pruned, image(4), image(1, seed=1))


class Called(nn.Module):
    """One layer called on two tensors, and a second one with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.tied, self.second = layer(), layer(), nn.Conv2d(32, 20, 3)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, z = self.stem(x).relu(), self.other(x).relu()
        return self.first(y), self.first(z), self.tied(y), self.second(y) + self.second(z)


@BOTH
def test_layers_that_are_called_twice(form: str) -> None:
    model = masked(Called())
    pruned = upscale.export(model, (image(4),), target=target(form))
    check(model, pruned, image(4), image(2))
    assert pruned.first.weight is pruned.tied.weight


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [None, "spatial"])
def test_captured_again_it_is_a_convolution_again(form: str, bias: bool, dynamic: str | None) -> None:
    """The same graph as of a model that was exported without products."""
    model, x = masked(Two(layer(bias))), image(4)
    graphs = []
    for rates in (DEAR, NEVER):
        pruned = upscale.export(model, (x,), target=target(form, rates), dynamic_shapes=dynamic)
        assert bool(forms(pruned)) == (rates is DEAR)
        program = capture(pruned, (x,), dynamic_shapes=dynamic)
        assert not program.notes
        graphs.append(graph_lines(program.graph, paths=False))
    assert graphs[0] == graphs[1]


@BOTH
def test_it_can_be_pruned_again_with_other_settings(form: str) -> None:
    model, x = masked(Two(layer())), image(4)
    once = upscale.export(model, (x,), target=target(form))
    with torch.no_grad():
        once.first.weight[:, [1, 5]] = 0
        once.first.weight[3] = 0
    for again in (None, target("rows"), target("planes")):
        twice = upscale.export(once, (x,), target=again)
        check(once, twice, x, image(2))
        assert type(twice.first) is nn.Conv2d and twice.first.weight.shape[1] == 20
    manager = upscale.MaskingManager(once, example_inputs=x)
    manager.importance("l2").mask(0.5)
    check(once, upscale.export(once, (x,), target=target(form)), x)


@BOTH
def test_it_is_an_ordinary_module(form: str, tmp_path: Path) -> None:
    """Saved and loaded, pickled, copied, exported, trained: as a model without products."""
    model, x = masked(Two(layer())), image(4)
    pruned = upscale.export(model, (x,), target=target(form))
    expected = pruned(x)
    assert set(pruned.state_dict()) == set(model.state_dict())
    path = tmp_path / "model.safetensors"
    upscale.save(pruned, path)
    loaded = upscale.load(path, Two(layer()).double())
    exported = torch.export.export(pruned, (x,)).module()
    for other in (loaded, pickle.loads(pickle.dumps(pruned)), copy.deepcopy(pruned), exported):
        for a, b in zip(other(x), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert forms(loaded) == [form]
    plain = upscale.export(model, (x,), target=target(form, NEVER))
    for trained in (pruned, plain):
        sum(y.square().sum() for y in trained.train()(x)).backward()
    for (name, a), b in zip(pruned.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad.view_as(a), rtol=1e-9), name


@BOTH
def test_the_plan_is_plain_data_and_the_report_says_it(form: str) -> None:
    pruned = upscale.export(masked(Two(layer())), (image(4),), target=target(form))
    data = pruned.report.plan.to_dict()
    assert Plan.from_dict(data) == pruned.report.plan
    for cut in data["contractions"].values():
        del cut["product"]  # as it was written before there were products
    assert not any(cut.product for cut in Plan.from_dict(data).contractions.values())
    assert any("matrix products" in note and "first" in note for note in pruned.report.notes)


class Spelled(nn.Module):
    """Products by hand that are like those of an export, but for one thing each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.first = kind, nn.Conv2d(3, 32, 3, padding=1), layer()
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self.stem(x).relu()))

    def product(self, y: Tensor) -> Tensor:
        matrix, bias = self.first.weight.flatten(1), self.first.bias
        if self.kind in ("rows", "turned"):
            sizes = y.shape[2:] if self.kind == "rows" else (y.shape[3], y.shape[2])
            rows = y.movedim(1, -1).flatten(0, -2)
            return F.linear(rows, matrix, bias).unflatten(0, (-1, *sizes)).movedim(-1, 1)
        planes = torch.bmm(matrix.expand(y.size(0), -1, -1), y.flatten(2))
        if self.kind == "scaled":
            planes = torch.baddbmm(bias[:, None], matrix.expand(y.size(0), -1, -1), y.flatten(2), beta=2.0)
        if self.kind in ("biased", "bias of a place"):
            added = bias.unsqueeze(1 if self.kind == "biased" else 0)  # as many places as outputs
            planes = torch.baddbmm(added, matrix.expand(y.size(0), -1, -1), y.flatten(2))
        return planes.unflatten(2, (y.shape[3], y.shape[2]) if self.kind == "turned planes" else y.shape[2:])


@pytest.mark.parametrize(
    ("kind", "restored"),
    [
        ("rows", True),
        ("turned", False),
        ("planes", True),
        ("turned planes", False),
        ("biased", True),
        ("scaled", False),
        ("bias of a place", False),
    ],
)
@torch.no_grad()
def test_only_what_is_a_convolution_becomes_one(kind: str, restored: bool) -> None:
    model = randomise(Spelled(kind).double().eval())
    model.last.weight[:, ::2] = 0
    x = image(4, 8, 2)
    found = [str(node.target) for node in capture(model, (x,)).graph.nodes]
    assert found.count("aten.conv2d.default") == 2 + restored
    check(model, upscale.export(model, (x,)), x, image(2, 8, 2))


def test_the_rate_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 0.01)
    model = nn.Sequential(nn.Conv2d(3, 8, 1)).eval()
    tuned = upscale.tune(model, torch.rand(1, 3, 8, 8), cache=tmp_path / "rates.json")
    assert tuned.rates is not None and 0.2 < tuned.rates.product < 5
    for form in FORMATS:
        x, weight = torch.randn(2, 5, 4, 3), torch.randn(6, 5, 1, 1)
        bias = torch.randn(6)
        assert torch.allclose(as_products(form)(x, weight), F.conv2d(x, weight), atol=1e-5)
        assert torch.allclose(as_products(form, True)(x, weight, bias), F.conv2d(x, weight, bias), atol=1e-5)

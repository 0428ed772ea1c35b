"""Large models: an export makes the weights of the smaller model and, next to them, nothing of a weight's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import upscale
from upscale.capture import capture
from upscale.channels import norm_per_channel, per_channel
from upscale.exporting import compile_program, finish
from upscale.large import all_finite, cut


class Written(TorchDispatchMode):
    """Bytes of every new memory that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        new = [t for t in _tensors(result) if t.device.type != "meta" and t.untyped_storage()._cdata not in given]
        self.sizes += [t.nbytes for t in new]
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def written(function: Callable[[], Any]) -> tuple[Any, list[int]]:
    """The result of ``function``, and the sizes of all tensors made on the way."""
    with Written() as seen:
        result = function()
    return result, seen.sizes


def wide_net() -> nn.Sequential:
    """Nearly all of it is two matrices of the same size; of both, a part of rows and columns is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 640), nn.ReLU(), nn.Linear(640, 512), nn.ReLU(), nn.Linear(512, 8)
    )
    with torch.no_grad():
        for layer, every in ((2, 3), (4, 4), (6, 5)):
            model[layer].weight[:, ::every] = 0
    return model.double().eval()


@pytest.mark.parametrize("reads", ["auto", "gather", "baseline"])
def test_export_writes_each_large_weight_once(reads: Any) -> None:
    """No copy in between, and none at the end: one write for each large matrix, of its final size."""
    model, x = wide_net(), torch.randn(2, 8, dtype=torch.float64)
    program = capture(model, (x,))
    pruned, sizes = written(lambda: finish(compile_program(program, reads), "Wide"))
    large = min(model[2].weight.nbytes, model[4].weight.nbytes) // 4
    weights = [pruned.get_parameter(name) for name in ("2.weight", "4.weight")]
    assert sorted(s for s in sizes if s >= large) == sorted(w.nbytes for w in weights)
    assert weights[0].shape == (480, 341)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-10, atol=0)


def test_masking_writes_no_tensor_of_a_weights_size() -> None:
    """Scores are norms, taken from the weight as it lies there."""
    model, x = wide_net(), torch.randn(2, 8, dtype=torch.float64)
    manager = upscale.MaskingManager(model, example_inputs=x)
    _, sizes = written(lambda: manager.importance("l2").mask(0.25))
    assert max(sizes) < model[2].weight.nbytes // 10
    assert not model[4].weight[:, manager.masked["4"]].any()


def test_computed_weights_belong_to_the_program() -> None:
    """A masked weight is used as it was computed, but neither the user nor another layer shares it."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.register_buffer("mask", (torch.arange(6) % 3 > 0).float())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.raw.weight * self.mask
            return F.linear(F.linear(x, weight, self.first.bias), weight, self.second.bias)

    model, x = Shared(), torch.randn(2, 6)
    pruned = upscale.export(model, (x,))
    torch.testing.assert_close(pruned(x), model(x))
    owners = [*model.parameters(), *model.buffers(), *pruned.parameters()]
    assert len({t.untyped_storage()._cdata for t in owners}) == len(owners)
    tensors = capture(model, (x,)).tensors
    assert torch.equal(tensors["first.weight"], tensors["second.weight"])
    assert tensors["first.weight"].data_ptr() != tensors["second.weight"].data_ptr()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3), (4, 6, 5)])
@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, -1)])
def test_cut_is_two_selections_in_one(shape: tuple[int, ...], dims: tuple[int, int]) -> None:
    """The same values, contiguous, without the tensor in between."""
    dims = dims[0], dims[1] % len(shape)
    whole, first, second = torch.randn(shape), [3, 1, 2], [2, 0]
    expected = whole.index_select(dims[0], torch.tensor(first)).index_select(dims[1], torch.tensor(second))
    result, sizes = written(lambda: cut(whole, {dims[0]: first, dims[1]: second}))
    assert torch.equal(result, expected) and result.is_contiguous()
    assert max(sizes) <= max(expected.nbytes, 8 * len(first))  # or the indices


def test_cut_of_nothing_is_a_copy() -> None:
    """Never the tensor itself: it may be the user's."""
    whole = torch.randn(3, 4)
    for chosen in ({}, {0: [0, 1, 2]}, {0: range(3), 1: range(4)}):
        result = cut(whole, chosen)
        assert torch.equal(result, whole) and result.data_ptr() != whole.data_ptr()
    assert cut(whole, {0: [], 1: [2]}).shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_all_finite(dtype: torch.dtype) -> None:
    """One bad entry anywhere is enough."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        tensor = torch.arange(-50.0, 50.0).to(dtype).reshape(10, 10)
        assert all_finite(tensor) and all_finite(tensor[:0])
        tensor[3, 7] = bad
        assert not all_finite(tensor)
    assert all_finite(torch.tensor(7))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 7),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv1d(6, 6, 3, groups=6),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_norm_per_channel(layer: nn.Module, side: Any) -> None:
    """The same as summing the entries' magnitudes and squares channel by channel."""
    weight = layer.weight.detach()
    torch.testing.assert_close(norm_per_channel(layer, side, 1), per_channel(layer, side, weight.abs()))
    torch.testing.assert_close(norm_per_channel(layer, side, 2), per_channel(layer, side, weight.square()).sqrt())

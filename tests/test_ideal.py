"""The floor of latency: the shapes of the pruned model, contiguous inputs everywhere, and no copy that a read makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import upscale
from upscale import measure
from upscale.capture import capture
from upscale.exporting import compile_program, finish
from upscale.ideal import as_compact, ideal

FORMATS = (torch.contiguous_format, torch.channels_last)
SIZE = 6


class Residual(nn.Module):
    """Three readers of one tensor, each with channels of its own: order alone cannot serve them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.readers = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return sum(reader(x) for reader in self.readers)


class Joined(nn.Module):
    """Two tensors joined and read once; the first is read by another layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.both, self.other = nn.Conv2d(16, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.both(torch.cat([left, right], 1)) + self.other(left)


def zero_inputs(conv: nn.Module, channels: list[int]) -> None:
    with torch.no_grad():
        conv.weight[:, channels] = 0  # type: ignore[operator, index]


def residual() -> nn.Module:
    model = Residual().eval()
    for reader, dead in zip(
        model.readers, ([0, 5, 9, 14], [1, 5, 8, 12], [2, 3, 9, 12, 13], [0, 7, 8, 15]), strict=True
    ):
        zero_inputs(reader, dead)
    return model


def joined() -> nn.Module:
    model = Joined().eval()
    zero_inputs(model.both, [0, 3, 9, 12, 14])  # six of the left eight, five of the right
    zero_inputs(model.other, [1, 3, 5])
    return model


def inputs_of_convolutions(module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """What each convolution is given."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, conv in module.named_modules():
        if isinstance(conv, nn.Conv2d):

            def note(conv: nn.Module, args: Any, name: str = name) -> None:
                seen[name] = args[0]

            hooks.append(conv.register_forward_pre_hook(note))
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_get_contiguous_tensors_of_the_wanted_channels(
    batch: int, memory_format: torch.memory_format
) -> None:
    x = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=memory_format)
    model = residual().to(memory_format=memory_format)
    compiled = compile_program(capture(model, (x,)), "auto")
    made = ideal(compiled, (x,), prepare=lambda module: module.to(memory_format=memory_format))
    seen = inputs_of_convolutions(made, x)
    assert {name: tensor.shape[1] for name, tensor in seen.items()} == {
        "stem": 3,
        "readers.0": 12,
        "readers.1": 12,
        "readers.2": 11,
        "readers.3": 12,
    }
    assert all(tensor.is_contiguous(memory_format=memory_format) for tensor in seen.values())
    auto = finish(compiled, "Auto").to(memory_format=memory_format)
    assert measure.copies(auto, (x,)).bytes > 0  # what the floor is to be the floor of
    assert measure.copies(made, (x,)).bytes == 0
    assert measure.flops(made, (x,)) == measure.flops(auto, (x,))


@pytest.mark.parametrize("batch", [1, 2])
def test_only_the_original_concatenation_copies(batch: int) -> None:
    x = torch.randn(batch, 3, SIZE, SIZE)
    made = ideal(compile_program(capture(joined(), (x,)), "auto"), (x,))
    seen = inputs_of_convolutions(made, x)
    assert {name: tensor.shape[1] for name, tensor in seen.items()} == {"left": 3, "right": 3, "both": 11, "other": 5}
    found = measure.copies(made, (x,))
    assert found.by_op == {"cat": batch * 11 * SIZE * SIZE * 4} and found.calls == 1


@pytest.mark.parametrize("build", [residual, joined])
def test_every_intermediate_has_the_shape_of_the_exported_model(build: Any) -> None:
    x = torch.randn(2, 3, SIZE, SIZE)
    compiled = compile_program(capture(build(), (x,)), "auto")

    def shapes(module: fx.GraphModule) -> list[tuple[str, torch.Size]]:
        found = []

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.op == "call_module" or "add" in n.name or "relu" in n.name:
                    found.append((n.name.rpartition("_")[0] or n.name, result.shape))
                return result

        with torch.no_grad():
            Shapes(module).run(x)
        return found

    assert shapes(ideal(compiled, (x,))) == shapes(finish(compiled, "Auto"))


@pytest.mark.parametrize(
    ("tensor", "dim", "count", "stride"),
    [
        (torch.zeros(2, 6, 4, 5), 1, 3, (60, 20, 5, 1)),
        (torch.zeros(2, 6, 4, 5).to(memory_format=torch.channels_last), 1, 3, (60, 1, 15, 3)),
        (torch.zeros(2, 7, 6), 2, 3, (21, 3, 1)),
        (torch.zeros(2, 6, 4, 5)[:, 1:5], 1, 3, (60, 20, 5, 1)),
    ],
    ids=["NCHW", "channels last", "last dimension", "slice"],
)
def test_as_compact_is_contiguous_and_in_place(tensor: Tensor, dim: int, count: int, stride: tuple[int, ...]) -> None:
    found = as_compact(tensor, dim, count)
    expected = list(tensor.shape)
    expected[dim] = count
    assert list(found.shape) == expected and found.stride() == stride
    assert found.data_ptr() == tensor.data_ptr()


def test_a_broadcast_view_is_cut_as_it_lies() -> None:
    found = as_compact(torch.zeros(1, 6, 1, 1).expand(2, 6, 4, 4), 1, 3)
    assert found.shape == (2, 3, 4, 4) and found.stride() == (0, 1, 0, 0)


def test_it_is_not_public() -> None:
    assert "ideal" not in upscale.__all__
    with pytest.raises(upscale.InputError):
        upscale.export(residual(), (torch.randn(1, 3, SIZE, SIZE),), reads="ideal")  # type: ignore[arg-type]

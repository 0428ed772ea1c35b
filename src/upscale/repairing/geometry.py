"""What one output value of a layer is computed from: a layer's call as a linear map of rows.

A weight is seen as (groups, outputs of a group, inputs of a group x window), and what it multiplies as rows of that
length: one for each example and place of the output. Convolutions, transposed ones and linear layers are alike then.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..aliases import argument

__all__ = ["Geometry", "batch_dim", "gathered", "geometry_of", "is_contraction"]

_aten = torch.ops.aten
_CONVOLUTIONS = {
    **{getattr(_aten, f"conv{d}d").default: d for d in (1, 2, 3)},
    **{getattr(_aten, f"conv{d}d").padding: d for d in (1, 2, 3)},
}
_TRANSPOSED = {
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 2,
    _aten.conv_transpose3d.input: 3,
}
_PRODUCTS = {_aten.linear.default: "weight", _aten.matmul.default: "other"}


def is_contraction(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution, a transposed one, a linear layer or a product with a matrix of the model."""
    if node.target in _PRODUCTS:
        weight = argument(node, _PRODUCTS[node.target])
        return isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.meta["val"].dim() == 2
    return node.target in _CONVOLUTIONS or node.target in _TRANSPOSED


@dataclass(frozen=True)
class Geometry:
    """How a layer reads. ``window``, ``stride``, ``padding``, ``dilation``: one a dimension of space, none of linear
    layers. ``transposed``: a transposed convolution, or a matrix of shape (in, out)."""

    groups: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool

    def rows_of(self, weight: Tensor) -> Tensor:
        """A weight as (groups, outputs, inputs x window)."""
        if not self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        folded = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return folded.transpose(1, 2).flatten(2)

    def weight_of(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`rows_of`; ``shape``: the weight's."""
        if not self.transposed:
            return rows.reshape(*shape)
        outputs = rows.shape[1]
        folded = rows.reshape(self.groups, outputs, shape[0] // self.groups, -1)
        return folded.transpose(1, 2).reshape(*shape)

    def by_example(self, tensor: Tensor, batch_dim: int) -> Tensor:
        """What a layer reads or writes as (examples, channels, places in one or more dimensions).

        ``batch_dim``: which dimension counts examples in what a linear layer reads.
        """
        if self.window:
            return tensor if tensor.dim() == len(self.window) + 2 else tensor.unsqueeze(0)
        if tensor.dim() < 3:
            return tensor.reshape(-1, tensor.shape[-1], 1)
        return tensor.movedim(min(batch_dim, tensor.dim() - 2), 0).flatten(1, -2).transpose(1, 2)

    def patches(self, maps: Tensor, places: Tensor, out_size: Sequence[int]) -> Tensor:
        """What the outputs at ``places`` are computed from: (examples, places, groups, inputs of a group x window).

        ``maps``: what is read, see :meth:`by_example`; ``places``: int64 (examples, places), flat numbers of places of
        the output, whose size in space is ``out_size``.
        """
        if not self.window:
            return gathered(maps, places).unsqueeze(2)
        index, inside = self._sources(places, out_size, maps.shape[2:])
        found = gathered(maps.flatten(2), index.flatten(1)).unflatten(1, index.shape[1:])
        found = (found * inside.unsqueeze(-1)).transpose(2, 3)  # (examples, places, channels, window)
        return found.reshape(*places.shape, self.groups, -1)

    def _sources(self, places: Tensor, out_size: Sequence[int], in_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The places of the input that the window sees, (examples, places, window), and whether they are inside."""
        steps = torch.tensor(list(itertools.product(*map(range, self.window))), device=places.device)
        index = torch.zeros(*places.shape, len(steps), dtype=torch.int64, device=places.device)
        inside = torch.ones_like(index, dtype=torch.bool)
        rest = places
        coordinates: list[Tensor] = []
        for size in reversed(out_size):
            coordinates.insert(0, rest % size)
            rest = rest // size
        for dim, size in enumerate(in_size):
            here = coordinates[dim].unsqueeze(-1)
            if self.transposed:
                scaled = here + self.padding[dim] - steps[:, dim] * self.dilation[dim]
                source = torch.div(scaled, self.stride[dim], rounding_mode="floor")
                inside &= scaled % self.stride[dim] == 0
            else:
                source = here * self.stride[dim] - self.padding[dim] + steps[:, dim] * self.dilation[dim]
            inside &= (source >= 0) & (source < size)
            index = index * size + source.clamp(0, size - 1)
        return index, inside


def gathered(maps: Tensor, places: Tensor) -> Tensor:
    """Of (examples, channels, all places) those at ``places``: (examples, places, channels)."""
    index = places.unsqueeze(1).expand(-1, maps.shape[1], -1)
    return maps.gather(2, index).transpose(1, 2)


def batch_dim(node: fx.Node) -> int:
    """The dimension of what a call writes that the batch size is in; the first where capture fixed it."""
    sizes = node.meta["val"].shape
    return next((dim for dim, size in enumerate(sizes) if not isinstance(size, int)), 0)


def geometry_of(node: fx.Node, weight: Tensor) -> Geometry:
    """The geometry of a contraction's call."""
    if node.target in _PRODUCTS:
        return Geometry(1, (), (), (), (), node.target is _aten.matmul.default)
    dims = weight.dim() - 2
    stride, dilation = (_spread(argument(node, name), dims) for name in ("stride", "dilation"))
    window = tuple(weight.shape[2:])
    padding = argument(node, "padding")
    if padding == "same":  # torch pads the odd one behind
        pads = tuple(dilation[d] * (window[d] - 1) // 2 for d in range(dims))
    else:
        pads = (0,) * dims if padding == "valid" else _spread(padding, dims)
    return Geometry(argument(node, "groups"), window, stride, pads, dilation, node.target in _TRANSPOSED)


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value * dims if len(value) == 1 else value

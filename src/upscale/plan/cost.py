"""What a way of reading costs, in nanoseconds: a few rates, how the tensor lies in memory, and who reads it.

A slice of channels is free where it is one stretch of memory, or where its reader takes any strides; every other
reader copies it first, or is a 1x1 convolution that can be carried out as a matrix product on the slice as it lies.
What a gather or a join costs depends on whether channels are neighbours in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from ..aliases import first_tensor
from ..flow import FlowNode
from ..flow.effects import Contract, PerChannel, Pointwise, size_of
from .products import VIEWS, is_pointwise
from .rates import CPU, Rates

# As a matrix product a layer is no longer called as a module: that must save this many nanoseconds, and this share of
# the layer's time. Smaller copies, still in a cache, are done before this can be measured in a whole network.
WORTHWHILE, SHARE = 50_000.0, 0.05


@dataclass(frozen=True)
class Setting:
    """What a plan is made for. ``examples``: the planned batch size over that of the captured example. ``round_to`` is
    that of :class:`~upscale.plan.target.Target`. ``products``: whether a 1x1 convolution may become a matrix product:
    only where the batch or the memory format was asked for."""

    rates: Rates = CPU
    examples: float = 1.0
    round_to: int = 1
    products: bool = False

    def reading(self, source: Node, dim: int, reader: FlowNode, rows: int | None = None) -> ReadCost:
        """What ``reader`` pays for channels of ``source`` along ``dim``. ``rows``: outputs that it keeps, if it is a
        layer; None: all."""
        memory, strided = memory_of(source, dim, self.examples), takes_strides(reader, dim, self.rates)
        return ReadCost(self.rates, memory, strided, self._product(reader, dim, rows))

    def _product(self, reader: FlowNode, dim: int, rows: int | None) -> Extra | None:
        """What the reader costs more as a matrix product than as a convolution; None: no product will do."""
        effect = reader.effect
        if not self.products or not isinstance(effect, Contract) or not is_pointwise(reader.node, effect, dim):
            return None
        rows = size_of(effect.weight.meta["val"].shape[0]) if rows is None else rows
        if rows < self.rates.vector:  # with so few outputs a product is slow on gapped rows
            return None
        layer = self.computing(reader.node, effect, rows)
        return Extra(VIEWS * self.rates.call, max(0.0, self.rates.product - 1.0) * layer, layer)

    def rounded(self, needed: int, held: int) -> int:
        """Channels that a layer reads, of as many as there are."""
        return min(held, -(-needed // self.round_to) * self.round_to)

    def computing(self, node: Node, effect: Contract, rows: int) -> float:
        """Nanoseconds that one more input channel costs a layer with ``rows`` outputs."""
        sizes = [float(size_of(s)) for s in effect.weight.meta["val"].shape]
        window = float(np.prod([s for d, s in enumerate(sizes) if d not in (effect.weight_in, effect.weight_out)]))
        source = node if effect.operand is None or "transpose" not in str(node.target) else effect.operand
        dim = effect.out_dim if source is node else effect.in_dim
        value = source.meta["val"]
        places = float(np.prod([size_of(s) for d, s in enumerate(value.shape) if d != dim])) * self.examples
        width = value.dtype.itemsize / 4
        return rows * window * width * (places * self.rates.multiply + 4 * self.rates.load)


@dataclass(frozen=True)
class Memory:
    """How a range of channels lies in memory. ``channel``: bytes of one channel over the whole batch. ``stretches``:
    how many separate stretches a range of channels is. ``innermost``: channels are neighbours, of one place after the
    other."""

    channel: float
    stretches: float
    innermost: bool


def memory_of(node: Node, dim: int, examples: float) -> Memory:
    """Of the tensor that ``node`` stands for. ``examples``: the planned batch size over that of the example."""
    value = first_tensor(node.meta["val"])
    assert value is not None
    sizes = [float(size_of(s)) for s in value.shape]
    strides = [size_of(s) for s in value.stride()]
    dim = min(dim, len(sizes) - 1)  # a list of parts: each may have a dimension less than what was parted
    outer = float(np.prod([s for s, step in zip(sizes, strides, strict=True) if step > strides[dim]]))
    rest = float(np.prod([s for d, s in enumerate(sizes) if d != dim])) * examples
    places = float(np.prod([s for d, s in enumerate(sizes) if d not in (0, dim)]))  # of one example
    innermost = strides[dim] == 1 and outer > 1 and places > 1
    return Memory(rest * value.dtype.itemsize, max(1.0, outer * examples), innermost)


# Operators that work on any strides without a copy of their own, beside the pointwise ones and the concatenation.
_ANY_STRIDES = frozenset({"aten.batch_norm.default", "aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default"})


def takes_strides(reader: FlowNode, dim: int, rates: Rates) -> bool:
    """Whether ``reader`` works on a slice along ``dim`` as it lies, without making a dense copy first."""
    if not rates.strides:
        return False
    effect = reader.effect
    if isinstance(effect, Contract):  # a matrix product takes a slice of the last dimension with its stride
        operand = effect.operand
        return effect.weight.meta["val"].ndim == 2 and operand is not None and dim == operand.meta["val"].ndim - 1
    if isinstance(effect, PerChannel):
        return str(reader.node.target) in _ANY_STRIDES
    return isinstance(effect, Pointwise) or reader.kind in ("concat", "select")


@dataclass(frozen=True)
class Extra:
    """Nanoseconds once, and for each channel that is read; ``layer``: what a channel costs the layer anyway."""

    once: float
    channel: float
    layer: float


@dataclass(frozen=True)
class ReadCost:
    """Nanoseconds of each way of reading from one tensor, for one reader."""

    rates: Rates
    memory: Memory
    strided: bool  # the reader takes a slice as it lies
    product: Extra | None = None  # where the reader can be a matrix product, which takes any slice as it lies

    def view(self, channels: int) -> float:
        """One slice."""
        if self.strided or self.memory.stretches <= 1:
            return self.rates.view
        return self.rates.view + min(self._copied(1, channels), self._multiplied(channels))

    def multiplies(self, channels: int) -> bool:
        """Whether a slice is better read by a matrix product as it lies than copied for a convolution."""
        return self._multiplied(channels) < math.inf and not self.strided and self.memory.stretches > 1

    def _multiplied(self, channels: int) -> float:
        """Infinite where it does not save enough."""
        if self.product is None:
            return math.inf
        price = self.product.once + channels * self.product.channel
        least = max(WORTHWHILE, SHARE * channels * self.product.layer)
        return price if self._copied(1, channels) - price > least else math.inf

    def gather(self, channels: int) -> float:
        """One ``index_select``."""
        rate = self.rates.pick if self.memory.innermost else self.rates.copy
        return self.rates.call + channels * self.memory.channel * rate

    def join(self, pieces: int, channels: int) -> float:
        """``pieces`` slices or tensors one after the other."""
        return pieces * self.rates.piece + self._copied(pieces, channels)

    def _copied(self, pieces: int, channels: int) -> float:
        stretches = pieces * self.memory.stretches * self.rates.stretch
        return self.rates.call + channels * self.memory.channel * self.rates.copy + stretches

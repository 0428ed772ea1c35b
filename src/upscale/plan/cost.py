"""What a way of reading costs, in nanoseconds: a few rates, how the tensor lies in memory, and who reads it.

A slice of channels is free where it is one stretch of memory, or where its reader takes any strides; every other
reader copies it first. What a gather or a join costs depends on whether channels are neighbours in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch.fx import Node

from ..aliases import first_tensor
from ..flow import FlowNode
from ..flow.effects import Contract, PerChannel, Pointwise, size_of
from .target import Target


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of elementary steps on one device, in float32.

    ``multiply``: a multiply-add of a convolution or matrix product. ``load``: a byte of weight. ``copy``: a byte copied
    in stretches, read and written. ``pick``: a byte gathered where channels are neighbours in memory. ``call``: an
    operator's call. ``piece``: one more tensor in a concatenation. ``stretch``: one more stretch of memory in a copy.
    ``strides``: whether some readers take a slice as it is.
    """

    multiply: float = 0.015
    load: float = 0.05
    copy: float = 0.03
    pick: float = 0.065
    call: float = 3000.0
    piece: float = 1000.0
    stretch: float = 1.4
    strides: bool = True


# One thread of an x86 server with AVX-512, torch 2.13 (`python -m benchmarks.rates` measures them); the GPU's are data
# sheet values of a large one, where launches count more than bytes.
_CPU = Rates()
_CUDA = Rates(0.0001, 0.0005, 0.001, 0.002, 6000.0, 500.0, 0.0)
_BACKENDS = {
    "eager": {},
    # Slices and gathers are fused into the loop that writes the tensor; convolutions want theirs dense all the same.
    "compile": {"call": 300.0, "piece": 100.0},
    # Slice, Gather and Concat are nodes of their own and copy.
    "onnxruntime": {"call": 2000.0, "piece": 2000.0, "strides": False},
}


def rates_for(target: Target) -> Rates:
    """The rates of a device and backend before anything is measured there."""
    return replace(_CUDA if target.device == "cuda" else _CPU, **_BACKENDS[target.backend])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Setting:
    """What a plan is made for. ``examples``: the planned batch size over that of the captured example. ``round_to`` is
    that of :class:`~upscale.plan.target.Target`."""

    rates: Rates = _CPU
    examples: float = 1.0
    round_to: int = 1

    def reading(self, source: Node, dim: int, reader: FlowNode) -> ReadCost:
        """What ``reader`` pays for channels of ``source`` along ``dim``."""
        return ReadCost(self.rates, memory_of(source, dim, self.examples), takes_strides(reader, dim, self.rates))

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
    how many separate stretches a range of channels is. ``innermost``: channels are neighbours."""

    channel: float
    stretches: float
    innermost: bool


def memory_of(node: Node, dim: int, examples: float) -> Memory:
    """Of the tensor that ``node`` stands for. ``examples``: the planned batch size over that of the example."""
    value = first_tensor(node.meta["val"])
    assert value is not None
    sizes = [float(size_of(s)) for s in value.shape]
    strides = [size_of(s) for s in value.stride()]
    outer = float(np.prod([s for s, step in zip(sizes, strides, strict=True) if step > strides[dim]]))
    rest = float(np.prod([s for d, s in enumerate(sizes) if d != dim])) * examples
    innermost = strides[dim] == 1 and outer > 1 and rest > examples
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
class ReadCost:
    """Nanoseconds of each way of reading from one tensor, for one reader."""

    rates: Rates
    memory: Memory
    strided: bool  # the reader takes a slice as it lies

    def view(self, channels: int) -> float:
        """One slice."""
        if self.strided or self.memory.stretches <= 1:
            return 0.0
        return self._copied(1, channels)

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

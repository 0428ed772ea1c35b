"""What an operator does to channels, as data.

A flow rule looks at one graph node and returns one of these effects. Everything that follows - labels, constants,
liveness, layouts, lowering - works on effects and never asks which operator it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node


@dataclass(frozen=True)
class Channels:
    """The channel dimension of one tensor.

    ``dim`` is the dimension that holds channels. ``units[j]`` names the group of positions that ``j`` cannot be parted
    from: after ``flatten`` the 49 pixels of a channel are one unit. A ``weak`` labelling stems from parameters only;
    it yields where it meets the channels of an activation on another dimension.
    """

    dim: int
    units: np.ndarray
    weak: bool = False

    @property
    def size(self) -> int:
        return len(self.units)

    @property
    def unit_count(self) -> int:
        return int(self.units.max()) + 1 if len(self.units) else 0


@dataclass(frozen=True)
class Constants:
    """Channels that hold one known value everywhere: ``value[j]`` is meaningful where ``known[j]``."""

    known: torch.Tensor  # bool, one per position
    value: torch.Tensor  # the tensor's dtype, one per position

    @staticmethod
    def none(size: int, dtype: torch.dtype) -> Constants:
        return Constants(torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=dtype))


# Given the constants of the operands (None: nothing known), the constants of the result.
ConstantRule = Callable[[list[Constants | None]], Constants | None]


@dataclass(frozen=True)
class Contract:
    """A producer that contracts its operand's channels: convolution, linear, embedding (no operand).

    ``exact`` says whether a constant input channel contributes the same amount everywhere (linear, unpadded
    convolution): only then a non-zero constant can be folded. ``groups`` > 1 reads everything in the original order.
    """

    operand: Node | None
    in_dim: int | None
    out_dim: int
    weight: Node
    weight_in: int | None
    weight_out: int
    bias: Node | None
    exact: bool
    groups: int = 1


@dataclass(frozen=True)
class Pointwise:
    """Operands pair element by element (with broadcasting): their channels become one."""

    operands: tuple[Node, ...]
    constant: ConstantRule | None = None


@dataclass(frozen=True)
class Aligned:
    """Channels pair up along one dimension of every operand and of the result, and no channel sees another, whatever
    happens along the other dimensions: a batched matrix product, attention over heads. ``operands`` lists (node,
    dimension); one with ``k`` times fewer channels serves ``k`` neighbours each (grouped-query attention)."""

    operands: tuple[tuple[Node, int], ...]
    out_dim: int


@dataclass(frozen=True)
class Folded:
    """Every channel of the result is made of the operand's channels in one row of ``positions`` (channels, k), in a way
    that is the same for all: a gated linear unit. The operator is repeated on the channels that are left, which then
    stand column by column."""

    operand: Node
    dim: int
    out_dim: int
    positions: np.ndarray


@dataclass(frozen=True)
class PerChannel:
    """Each output channel comes from the input channel at the same position, whatever happens in other dimensions:
    batch norm, depthwise convolution, pooling, resampling, reductions over space.

    ``slices`` lists per-channel parameters as (node, dimension that runs over channels).
    """

    operand: Node
    dim: int
    out_dim: int
    slices: tuple[tuple[Node, int], ...] = ()
    constant: ConstantRule | None = None
    groups_arg: str | None = None  # the argument that counts groups, for a depthwise convolution


@dataclass(frozen=True)
class Mixing:
    """Every output channel depends on all input channels, but permuting the input permutes the output: layer norm,
    softmax over channels. ``ordered``: not even that holds (group norm)."""

    operand: Node
    dim: int
    slices: tuple[tuple[Node, int], ...] = ()
    ordered: bool = False


@dataclass(frozen=True)
class Movement:
    """Pure data movement. It needs no rule of its own: the operator is run on labels. ``output`` picks one tensor of
    an operator that returns several."""

    operand: Node
    run: Callable[[torch.Tensor], torch.Tensor]
    size_arg: str | None = None  # the argument with explicit sizes, to be rewritten when channels go


@dataclass(frozen=True)
class Concat:
    """Operands one after the other along ``dim``; ``new_dim``: along a dimension made for it (stack)."""

    operands: tuple[Node, ...]
    dim: int
    new_dim: bool = False


@dataclass(frozen=True)
class Pad:
    """Constant padding; ``before``/``after`` per dimension."""

    operand: Node
    before: tuple[int, ...]
    after: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Barrier:
    """Reads every channel of every operand. ``ordered=False``: in any order (a mean over channels)."""

    reason: str
    operands: tuple[Node, ...]
    ordered: bool = True
    silent: bool = False  # expected (model output, reduction): not reported as a barrier


@dataclass(frozen=True)
class Opaque:
    """No operand carries channels: nothing to say."""


Effect = Contract | Pointwise | Aligned | Folded | PerChannel | Mixing | Movement | Concat | Pad | Barrier | Opaque


@dataclass(frozen=True)
class Op:
    """One call in the graph as a rule sees it: arguments by their schema names, shapes as plain integers."""

    node: Node
    args: dict[str, Any]
    shape_of: Callable[[Node], tuple[int, ...]]
    channels_of: Callable[[Node], Channels | None]
    value_of: Callable[[Node], torch.Tensor | None]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def shape(self, node: Node | None = None) -> tuple[int, ...]:
        return self.shape_of(self.node if node is None else node)

    def rank(self, node: Node) -> int:
        return len(self.shape_of(node))

    @property
    def operand(self) -> Node:
        """The first tensor: ``self`` or ``input``, as the schema calls it."""
        found = self.args.get("self", self.args.get("input"))
        assert isinstance(found, Node)
        return found

    @property
    def name(self) -> str:
        return str(self.node.target)

    @property
    def tensors(self) -> tuple[Node, ...]:
        """Every tensor argument, in order, each once."""
        return tuple(n for n in dict.fromkeys(self.node.all_input_nodes) if is_tensor(n))


UNSEEN = 7  # stands for a size that depends on values: it equals no other by chance of the example's sizes


def size_of(size: object) -> int:
    """A size, flag or number of the captured example as a plain number."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)):
        hint = size.node.hint
        return UNSEEN if hint is None else hint
    return size  # type: ignore[return-value]


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def reads_values(node: Node) -> bool:
    """Whether a node looks at the values of its tensors (any tensor operator, the output), not only at their sizes."""
    return node.op == "output" or is_tensor(node) or isinstance(node.meta.get("val"), (list, tuple))

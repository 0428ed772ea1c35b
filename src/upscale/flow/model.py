"""What the flow analysis hands over: for every node, where its channels come from and which of them matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Node

from ..program import where
from .effects import Barrier, Channels, Constants, Contract, Effect


@dataclass(frozen=True)
class Link:
    """Position ``j`` of the result pairs with position ``positions[j]`` of the operand; -1: with none of it.

    Where the result's channels are made of several of the operand's each, ``positions`` has a row for each of them.

    ``anchored``: the operand carries no channels of its own; it stands there whole and in its own order, and is read
    along ``dim``.
    """

    operand: Node
    dim: int
    positions: np.ndarray
    anchored: bool = False


@dataclass(frozen=True)
class Split:
    """How a tensor whose channels are blocks of the operand's (attention heads) is made of the channels it reads.

    ``permute``: the channel dimension is parted into (blocks, inside) and the dimensions permuted so, after those from
    ``flatten[0]`` to ``flatten[1]`` were made one; None: the operator itself is repeated on what is read.
    ``by_column``: it wants the first of every block, then the second, ...
    """

    permute: tuple[int, ...] | None
    by_column: bool = False
    flatten: tuple[int, int] | None = None

    def in_order(self, positions: np.ndarray) -> np.ndarray:
        """Rows of block positions as one list, in the order in which they are to be read."""
        return (positions.T if self.by_column else positions).reshape(-1)


@dataclass(frozen=True)
class FlowNode:
    """One node's part in the flow.

    kind: ``param`` (labelled parameter), ``fresh`` (contraction), ``transit`` (same channels, other values),
    ``select`` (channels picked from one tensor: exists on paper only), ``split`` (each channel is a block of the
    operand's), ``concat`` (channels of several tensors), ``list`` (several results), ``barrier``, ``opaque``.
    ``whole`` lists operands of which every channel is needed: (node, in the original order).
    """

    node: Node
    kind: str
    effect: Effect | None
    channels: Channels | None = None
    links: tuple[Link, ...] = ()
    whole: tuple[tuple[Node, bool], ...] = ()
    fill: float = 0.0  # the value at positions no link covers (channel padding)
    merge: tuple[int, int] = (1, 1)  # (outer, inner) copies of each channel made by merging dimensions
    pinned: bool = False  # all channels stay, in order (a weight with two uses)
    twins: str | None = None  # calls of one name share a weight and keep the same channels
    split: Split | None = None

    @property
    def groups(self) -> int:
        """Groups of a grouped convolution: its channels stay in order, equally many in every group that stays."""
        return self.effect.groups if isinstance(self.effect, Contract) else 1


@dataclass(frozen=True)
class Support:
    """A contraction's weight as the analysis needs it: which inputs each row uses, and with what total.

    ``used``: bool (rows, inputs). ``matrix``: the weight as (rows, inputs, window).
    """

    used: np.ndarray
    matrix: torch.Tensor
    bias: torch.Tensor | None

    def weighted(self, value: torch.Tensor) -> torch.Tensor:
        """What inputs that hold the constants ``value`` add to every row; looks only where these are not zero."""
        columns = value != 0
        if not bool(columns.any()):
            return torch.zeros(len(self.matrix), dtype=value.dtype)
        return self.matrix[:, columns].sum(2).to(value.dtype).cpu() @ value[columns]


@dataclass(frozen=True)
class Demand:
    """What a contraction needs to compute its live rows.

    ``inputs``: positions to read. ``constant``: rows whose value is known; they are emitted as a zero row.
    ``delta``: what the emitted contraction lacks per row (folded constants); it goes to the bias, or to the running
    mean of the batch norm that follows (``absorber``). ``starved``: nothing is needed; one input stands in, with
    zero weights. ``blank``, ``filled``: inputs (with zero weights) and rows that are there only to make the groups of a
    grouped convolution equal.
    """

    inputs: np.ndarray
    constant: np.ndarray
    delta: torch.Tensor
    absorber: Node | None
    starved: bool = False
    blank: np.ndarray | None = None
    filled: np.ndarray | None = None


@dataclass(frozen=True)
class Flow:
    """The analysed graph. Arrays are indexed by channel position of the node."""

    nodes: dict[Node, FlowNode]
    constants: dict[Node, Constants | None]
    live: dict[Node, np.ndarray]
    used: frozenset[Node]
    demands: dict[Node, Demand]
    replaced: frozenset[tuple[Node, Node]]  # (reader, operand): the operand is a known constant to this reader
    partial: dict[tuple[Node, Node], np.ndarray]  # (addition, operand): the result's channels to which it adds
    masked: dict[Node, bool]  # contractions: whether any input column or row is zero
    depends: bool  # whether the output still depends on the input

    def barriers(self) -> tuple[tuple[str, str, str], ...]:
        """Operators that are read whole because nothing is known of their channels: (where, operator, reason)."""
        return tuple(
            (where(node), str(node.target), f.effect.reason)
            for node, f in self.nodes.items()
            if isinstance(f.effect, Barrier) and not f.effect.silent and f.whole and node in self.used
        )

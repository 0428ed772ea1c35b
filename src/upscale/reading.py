"""How a planned read is carried out in the graph that is being lowered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx import Node

from .plan import Piece, Plan, Read
from .program import Program


class Reading:
    """A graph in the making, the tensors it names, and the reads that are there already."""

    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.graph = fx.Graph()
        self.env: dict[str, Node] = {}  # stored tensors by their original names
        self.tensors: dict[str, torch.Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.attributes: dict[str, Node] = {}
        self.realised: dict[tuple[int, tuple[Piece, ...]], Node] = {}
        self.names = {n.name: n for n in program.graph.nodes}

    # -- reads --------------------------------------------------------------------------------------------------

    def _realise(self, read: Read, like: Node) -> Node:
        key = (read.dim, read.pieces)
        if key not in self.realised:
            self.realised[key] = self.build_read(read)
        return self.realised[key]

    def build_read(self, read: Read) -> Node:
        dim, pieces = read.dim, read.pieces
        if read.kind == "whole":
            return self.source_of(pieces[0])
        if read.kind in ("gather", "collect"):
            source = self.source_of(pieces[0])
            if read.kind == "collect":
                source = self.insert(torch.cat, ([self.source_of(p) for p in pieces[:-1]], dim))
            like = self._original(str(pieces[0].source)).meta["val"]
            select = self._select_innermost if read.innermost else self._select
            return select(source, dim, pieces[-1].indices, like.shape)
        parts = self._parts(dim, pieces)
        return parts[0] if len(parts) == 1 else self.insert(torch.cat, (parts, dim))

    def _parts(self, dim: int, pieces: Sequence[Piece]) -> list[Node]:
        """One node per slice; constants are padded onto a neighbour."""
        parts: list[Node] = []
        before: list[Piece] = []
        rank = next(self._original(p.source).meta["val"].ndim for p in pieces if p.source is not None)
        for p in pieces:
            if p.source is None and not parts:
                before.append(p)
            elif p.source is None:
                parts[-1] = self._pad(parts[-1], rank - dim, 0, len(p.indices), p.fill)
            else:
                part = self._cut(self.source_of(p), dim, p)
                for q in reversed(before):
                    part = self._pad(part, rank - dim, len(q.indices), 0, q.fill)
                before = []
                parts.append(part)
        return parts

    def _cut(self, source: Node, dim: int, piece: Piece) -> Node:
        if not piece.indices:
            return self.insert(torch.narrow, (source, dim, 0, 0))
        if self._covers(dim, piece):
            return source
        return self.insert(torch.narrow, (source, dim, piece.indices[0], len(piece.indices)))

    def _covers(self, dim: int, piece: Piece) -> bool:
        """Whether a slice is all there is along ``dim``, which need not be where the tensor's channels lie."""
        layout = self.plan.layouts.get(piece.source or "")
        if layout is None or layout.dim != dim:
            return False
        return piece.indices == tuple(range(len(layout.positions)))

    def _pad(self, part: Node, dims: int, low: int, high: int, value: float) -> Node:
        """Pad the ``dims``-th dimension from the last."""
        widths = [0] * (2 * dims)
        widths[-2:] = [low, high]
        return self.insert(F.pad, (part, widths, "constant", value))

    def _select(self, source: Node, dim: int, indices: Sequence[int], shape: Sequence[Any] = ()) -> Node:
        tensor = torch.tensor(indices, dtype=torch.int64, device=self._device())
        return self.insert(torch.index_select, (source, dim, self._register("index", tensor, "constant")))

    def _select_innermost(self, source: Node, dim: int, indices: Sequence[int], shape: Sequence[Any]) -> Node:
        """Channels that are neighbours in memory: one ``index_select`` of a table with a row for every place, which is
        several times faster than along any other dimension, and the result stays channels-last."""
        table, sizes = self._as_table(source, dim, shape)
        return self._from_table(self._select(table, 1, indices), dim, sizes)

    def _as_table(self, source: Node, dim: int, shape: Sequence[Any]) -> tuple[Node, list[Any]]:
        """(places, channels), and the sizes of the places' dimensions."""
        places = [(d, size) for d, size in enumerate(shape) if d != dim]
        sizes = [
            s if isinstance(s, int) else self.insert(torch.ops.aten.sym_size.int, (source, d)) for d, s in places[1:]
        ]
        return self.insert(torch.flatten, (self.insert(torch.movedim, (source, dim, -1)), 0, -2)), [-1, *sizes]

    def _from_table(self, table: Node, dim: int, sizes: list[Any]) -> Node:
        return self.insert(torch.movedim, (self.insert(torch.unflatten, (table, 0, sizes)), -1, dim))

    def source_of(self, piece: Piece) -> Node:
        assert piece.source is not None
        return self._stored(self._original(piece.source))

    def insert(self, target: Any, args: tuple[Any, ...]) -> Node:
        new = self.graph.call_function(target, args)
        new.meta["rewritten"] = True
        return new

    # -- tensors ------------------------------------------------------------------------------------------------

    def _stored(self, node: Node) -> Node:
        if node.op != "get_attr":
            return self.env[node.name]
        layout = self.plan.layouts.get(node.name)
        old = self._tensor(node)
        new = old.clone() if layout is None else old.index_select(layout.dim, as_index(layout.positions, old))
        return self._attribute(node, new)

    def _original(self, name: str) -> Node:
        return self.names[name]

    def _tensor(self, node: Node) -> torch.Tensor:
        return self.program.tensors[str(node.target)].detach()

    def _device(self) -> torch.device:
        return next((t.device for t in self.program.tensors.values()), torch.device("cpu"))

    def _attribute(self, node: Node, tensor: torch.Tensor) -> Node:
        """A tensor of the original model under its own name; asked for twice, it must be the same both times."""
        name = str(node.target)
        if name in self.attributes:
            if self.tensors[name].shape != tensor.shape:
                raise AssertionError(f"{name} is cut in two ways")
            return self.attributes[name]
        old = self.program.tensors[name]
        if isinstance(old, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        self.tensors[name], self.kinds[name] = tensor, self.program.kinds[name]
        new = self.graph.get_attr(name)
        new.meta = {k: v for k, v in node.meta.items() if k != "val"}
        self.attributes[name] = new
        return new

    def _register(self, stem: str, tensor: torch.Tensor, kind: str) -> Node:
        for name, known in self.tensors.items():
            if name.startswith(f"upscale_{stem}") and known.shape == tensor.shape and torch.equal(known, tensor):
                return self.attributes[name]
        name = f"upscale_{stem}_{sum(n.startswith(f'upscale_{stem}') for n in self.tensors)}"
        self.tensors[name], self.kinds[name] = tensor, kind
        self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]


def as_index(items: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(items), dtype=torch.int64, device=like.device)

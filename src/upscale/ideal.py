"""The floor of a pruned model's latency: what it would take if no read copied anything.

For timing only: **the values are wrong**. Wherever the planned model reads a subset of a tensor's channels, this one
takes a compact tensor of the right size over the same memory, whatever channels may stand there. Every operator then
runs on the shapes of the pruned model and on contiguous inputs; only concatenations of several tensors still copy, as
the original's do. Nothing of the public interface leads here.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from .exporting import Compiled
from .flow.effects import size_of
from .lowering import Lowering
from .plan import Read
from .raising import raise_program

__all__ = ["as_compact", "ideal"]


def ideal(
    compiled: Compiled,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    prepare: Callable[[nn.Module], object] = lambda module: None,
) -> fx.GraphModule:
    """A module with the operators and shapes of ``compiled`` that copies nothing to read a subset of channels.

    **Its results are wrong**: it exists to be timed.

    Args:
        compiled: a program and its plan, for instance ``compile_program(program, "auto")``.
        args, kwargs: the example call to be timed, tensors of shape (batch, ...) in their memory format. The module is
            specialised to their shapes and strides.
        prepare: done to the module before that: a conversion of its weights, say.

    Returns:
        A module in eval mode. A read that the memory of its tensors cannot stand for (a channel read twice, a constant
        where nothing is left over) is carried out as planned.
    """
    program = _IdealLowering(compiled.program, compiled.flow.nodes, compiled.plan).run()
    module = raise_program(program)
    prepare(module)
    bound = inspect.signature(module.forward).bind(*args, **(kwargs or {}))
    bound.apply_defaults()
    with torch.no_grad():
        _Specialise(module).run(*bound.args)
    module.recompile()
    return module


def as_compact(tensor: Tensor, dim: int, count: int) -> Tensor:
    """The memory of ``tensor`` as a contiguous tensor with ``count`` places along ``dim``: no copy.

    The order of dimensions in memory stays that of ``tensor`` (NCHW, channels last). Where ``tensor`` has less memory
    than that (a broadcast view), its first places along ``dim`` as they lie.
    """
    size, stride = compact_form(tensor, dim, count)
    needed = (tensor.storage_offset() + size.numel()) * tensor.element_size()
    if needed > tensor.untyped_storage().nbytes():
        return tensor.narrow(dim, 0, count)
    return tensor.as_strided(size, stride)


def compact_form(tensor: Tensor, dim: int, count: int) -> tuple[torch.Size, tuple[int, ...]]:
    """Shape and strides of a contiguous tensor like ``tensor`` with ``count`` places along ``dim``."""
    size = list(tensor.shape)
    size[dim] = count
    stride, step = [1] * len(size), 1
    for d in sorted(range(len(size)), key=lambda d: (tensor.stride(d), -d)):
        stride[d] = step
        step *= size[d]
    return torch.Size(size), tuple(stride)


class _IdealLowering(Lowering):
    """Lowering as planned, but for the reads."""

    def build_read(self, read: Read) -> Node:
        wanted = self._wanted(read)
        stored = {name: self._places(name, read.dim) for name in wanted}
        if not wanted or any(count > stored[name] for name, count in wanted.items()):
            return super().build_read(read)
        parts = [self._part(name, read.dim, count, stored[name]) for name, count in wanted.items()]
        return parts[0] if len(parts) == 1 else self.insert(torch.cat, (parts, read.dim))

    def _wanted(self, read: Read) -> Counter[str]:
        """How many channels the read takes of each tensor; constants count as the first one's."""
        wanted: Counter[str] = Counter()
        if read.kind == "collect":
            sources = [(piece.source or "", len(piece.indices)) for piece in read.pieces[:-1]]
            owners = [name for name, count in sources for _ in range(count)]
            wanted.update(owners[place] for place in read.pieces[-1].indices)
            return wanted
        for piece in read.pieces:
            if piece.source is not None and piece.indices:
                wanted[piece.source] += len(piece.indices)
        if wanted:
            wanted[next(iter(wanted))] += sum(len(piece.indices) for piece in read.pieces if piece.source is None)
        return wanted

    def _places(self, name: str, dim: int) -> int:
        """Places of a stored tensor along ``dim``."""
        layout = self.plan.layouts.get(name)
        if layout is not None and layout.dim == dim:
            return len(layout.positions)
        return int(size_of(self.names[name].meta["val"].shape[dim]))

    def _part(self, name: str, dim: int, count: int, stored: int) -> Node:
        source = self._stored(self.names[name])
        return source if count == stored else self.insert(as_compact, (source, dim, count))


class _Specialise(fx.Interpreter):
    """Runs a module once and writes the shapes and strides it sees into its graph: calls need not compute them."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target is as_compact:
            source, dim, count = n.args
            tensor = self.env[source]  # type: ignore[index]
            size, stride = compact_form(tensor, dim, count)  # type: ignore[arg-type]
            if result.stride() == stride:
                n.target, n.args = torch.as_strided, (source, tuple(size), stride)
            else:
                n.target, n.args = torch.narrow, (source, dim, 0, count)
        return result

"""The inverse of each view operator: given the new value of a view, the new value of what it looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from upscale.aliases import argument
from upscale.errors import CaptureError
from upscale.guards import fixed_size
from upscale.program import where

_aten = torch.ops.aten
Insert = Callable[[Any, tuple[Any, ...], dict[str, Any], fx.Node], fx.Node]

_RESHAPES = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.view_as.default,
    _aten.reshape_as.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.unsqueeze.default,
    _aten.unsqueeze_.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.ravel.default,
}
_SELF_INVERSE = {
    _aten.transpose.int,
    _aten.swapaxes.default,
    _aten.swapdims.default,
    _aten.t.default,
    _aten.numpy_T.default,
    _aten.mT.default,
}
_SPLITS = {
    _aten.chunk.default,
    _aten.split.Tensor,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
    _aten.tensor_split.sections,
    _aten.tensor_split.indices,
}


def undo_view(view: fx.Node, source: fx.Node, value: fx.Node, new: fx.Node, insert: Insert) -> fx.Node:
    """New value of ``source``, whose present value is ``value``, when its view ``view`` becomes ``new``.

    Raises CaptureError for a view that has no inverse here (``expand``, ``as_strided``).
    """
    target: Any = view.target
    if same_geometry(view, source):
        return new
    if target in _RESHAPES:
        return insert(_aten.reshape.default, (new, sizes_of(source, value, insert)), {}, source)
    if target in _SELF_INVERSE:
        return insert(target, (new, *view.args[1:]), {}, source)
    if target is _aten.permute.default:
        dims: Any = view.args[1]
        order = [dim % len(dims) for dim in dims]
        inverse = [order.index(dim) for dim in range(len(order))]
        return insert(target, (new, inverse), {}, source)
    if target in (_aten.movedim.int, _aten.movedim.intlist):
        return insert(target, (new, view.args[2], view.args[1]), {}, source)
    if target is _aten.slice.Tensor:
        dim, start, end, step = (argument(view, name) for name in ("dim", "start", "end", "step"))
        return insert(_aten.slice_scatter.default, (value, new, dim, start, end, step), {}, source)
    if target is _aten.narrow.default:
        _, dim, start, length = view.args
        if isinstance(start, int) and isinstance(length, int) and start >= 0:
            return insert(_aten.slice_scatter.default, (value, new, dim, start, start + length), {}, source)
    if target is _aten.select.int:
        return insert(_aten.select_scatter.default, (value, new, *view.args[1:]), {}, source)
    if target is _aten.diagonal.default:
        return insert(_aten.diagonal_scatter.default, (value, new, *view.args[1:]), {}, source)
    raise CaptureError(
        f"the model writes in place through {target} at {where(view)}: write it without in-place operations there"
    )


def undo_item(item: fx.Node, split: fx.Node, source: fx.Node, value: fx.Node, new: fx.Node, insert: Insert) -> fx.Node:
    """Like :func:`undo_view` for one result of ``chunk``, ``split`` or ``unbind``."""
    index = item.args[1]
    assert isinstance(index, int)
    if split.target is _aten.unbind.int:
        return insert(_aten.select_scatter.default, (value, new, argument(split, "dim"), index), {}, source)
    dim = argument(split, "dim")
    pieces = split.meta["val"]
    sizes = [fixed_size(piece.shape[dim]) for piece in pieces[: index + 1]]
    known = [size for size in sizes if size is not None]
    if split.target in _SPLITS and len(known) == len(sizes):
        start, end = sum(known[:-1]), sum(known)
        return insert(_aten.slice_scatter.default, (value, new, dim, start, end), {}, source)
    raise CaptureError(f"the model writes in place into a piece of {split.target} at {where(split)}")


def same_geometry(view: fx.Node, source: fx.Node) -> bool:
    """True where the two look at the same memory in the same way (``detach``, ``contiguous``, eval dropout)."""
    a, b = view.meta.get("val"), source.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False

    def geometry(value: torch.Tensor) -> tuple[str, str, str]:
        return str(tuple(value.shape)), str(value.stride()), str(value.storage_offset())

    return geometry(a) == geometry(b)


def sizes_of(source: fx.Node, value: fx.Node, insert: Insert) -> list[Any]:
    """The shape of ``source`` as arguments: integers, and ``sym_size`` calls on ``value`` where free."""
    sizes: list[Any] = []
    for dim, size in enumerate(source.meta["val"].shape):
        number = fixed_size(size)
        if number is not None:
            sizes.append(number)
            continue
        node = insert(_aten.sym_size.int, (value, dim), {}, source)
        node.meta["val"] = size
        sizes.append(node)
    return sizes

"""Calls in other words, with exactly the same result: one spelling for each thing that the flow rules have to know.

``x @ weight.T + bias`` and ``addmm(bias, x, weight.T)`` are ``linear``; ``x.expand_as(y)`` is ``x.expand(sizes)``, and
``multiply`` is ``mul``; the matrix products that stand for 1x1 convolutions in exported models are convolutions. A
tensor of the model that says yes or no to each place of an index becomes the list of places: how many there are is then
known before the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from upscale.functional import remove_dead
from upscale.importing import Imported
from upscale.pointwise import restore_convolutions

_aten = torch.ops.aten


#: Other names of the same operator, with the same arguments.
_SAME: dict[Any, Any] = {
    _aten.multiply.Tensor: _aten.mul.Tensor,
    _aten.multiply.Scalar: _aten.mul.Scalar,
    _aten.divide.Tensor: _aten.div.Tensor,
    _aten.divide.Scalar: _aten.div.Scalar,
    _aten.true_divide.Tensor: _aten.div.Tensor,
    _aten.subtract.Tensor: _aten.sub.Tensor,
    _aten.subtract.Scalar: _aten.sub.Scalar,
    _aten.concat.default: _aten.cat.default,
    _aten.concatenate.default: _aten.cat.default,
    _aten.absolute.default: _aten.abs.default,
    _aten.negative.default: _aten.neg.default,
}
#: What takes its sizes from another tensor, and what takes them as numbers.
_AS_ANOTHER: dict[Any, Any] = {
    _aten.expand_as.default: _aten.expand.default,
    _aten.reshape_as.default: _aten.reshape.default,
    _aten.view_as.default: _aten.view.default,
}


def normalise_spelling(imported: Imported) -> None:
    """Replace matrix products with a transposed parameter by ``linear``, ``expand_as`` by ``expand``, and so on."""
    restore_convolutions(imported)
    for node in list(imported.graph.nodes):
        if node.op != "call_function":
            continue
        node.target = _SAME.get(node.target, node.target)
        if node.target in _AS_ANOTHER:
            _spell_sizes(imported, node)
        elif node.target is _aten.index.Tensor:
            _index_by_places(imported, node)
        elif node.target is _aten.linear.default and (stored := _transposed(node.args[1])) is not None:
            _multiply(imported, node, stored)
        elif node.target in (_aten.matmul.default, _aten.mm.default):
            weight = _transposed(node.args[1])
            if weight is not None and isinstance(node.args[0], fx.Node):
                _replace(imported, *_with_bias(node, weight))
        elif node.target is _aten.addmm.default and not any(value != 1 for value in node.kwargs.values()):
            bias, x, product = node.args[:3]
            weight = _transposed(product)
            if weight is not None and _is_vector(bias, weight.meta["val"].shape[0]):
                _replace(imported, node, (x, weight, bias))
    remove_dead(imported)


def _transposed(node: Any) -> fx.Node | None:
    """The parameter whose transpose ``node`` is."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    weight = node.args[0]
    if weight.op != "get_attr" or len(weight.meta["val"].shape) != 2:
        return None
    swaps = node.target in (_aten.t.default, _aten.numpy_T.default)
    swaps = swaps or (node.target is _aten.transpose.int and {d % 2 for d in node.args[1:3]} == {0, 1})  # type: ignore
    swaps = swaps or (node.target is _aten.permute.default and [d % 2 for d in node.args[1]] == [1, 0])  # type: ignore
    return weight if swaps else None


def _with_bias(node: fx.Node, weight: fx.Node) -> tuple[fx.Node, tuple[Any, ...]]:
    """The call to replace, and what ``linear`` takes: with the bias where nothing but its addition follows."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is not None and user.target is _aten.add.Tensor and not user.kwargs and len(user.args) == 2:
        other = user.args[1] if user.args[0] is node else user.args[0]
        if _is_vector(other, weight.meta["val"].shape[0]):
            return user, (node.args[0], weight, other)
    return node, (node.args[0], weight)


def _is_vector(node: Any, size: int) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and tuple(node.meta["val"].shape) == (size,)


def _replace(imported: Imported, node: fx.Node, args: tuple[Any, ...]) -> None:
    if any(isinstance(a, fx.Node) and a.meta["val"].dtype != node.meta["val"].dtype for a in args):
        return  # the addition would have converted
    with imported.graph.inserting_before(node):
        made = imported.graph.call_function(_aten.linear.default, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)


def _multiply(imported: Imported, node: fx.Node, weight: fx.Node) -> None:
    """``linear`` with a transposed parameter: a product with the parameter as it is, which stays under its name."""
    with imported.graph.inserting_before(node):
        made = imported.graph.call_function(_aten.matmul.default, (node.args[0], weight))
        made.meta = dict(node.meta)
        if len(node.args) > 2 and node.args[2] is not None:
            made = imported.graph.call_function(_aten.add.Tensor, (made, node.args[2]))
            made.meta = dict(node.meta)
    node.replace_all_uses_with(made)


def _index_by_places(imported: Imported, node: fx.Node) -> None:
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    for at, index in enumerate(indices):
        if not isinstance(index, fx.Node) or index.op != "get_attr":
            continue
        flags = imported.tensors[str(index.target)]
        if flags.dtype != torch.bool or flags.dim() != 1:
            continue
        name = f"{index.target}_places"
        places = flags.nonzero().flatten()
        if name not in imported.tensors:
            imported.tensors[name], imported.kinds[name] = places, "constant"
        with imported.graph.inserting_before(node):
            made = imported.graph.get_attr(name)
        made.meta = {**index.meta, "val": index.meta["val"].new_empty(len(places), dtype=torch.int64)}
        indices[at] = made
    node.args = (node.args[0], indices)


def _spell_sizes(imported: Imported, node: fx.Node) -> None:
    """``expand_as`` reads but the sizes of the other tensor: with these spelled out, its channels may go."""
    source, like = node.args
    assert isinstance(like, fx.Node)
    sizes: list[Any] = []
    with imported.graph.inserting_before(node):
        for dim, size in enumerate(like.meta["val"].shape):
            if not isinstance(size, int):
                made = imported.graph.call_function(_aten.sym_size.int, (like, dim))
                made.meta = {"val": size}
                size = made
            sizes.append(size)
        made = imported.graph.call_function(_AS_ANOTHER[node.target], (source, sizes))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)

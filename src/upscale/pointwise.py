"""1x1 convolutions spelled as matrix products: written by the back end, read again by the front end.

A convolution that is marked as a :class:`Product` is emitted as calls that take a slice of channels as it lies in
memory. A model that holds these calls, captured again, has the convolution back: nothing after capture knows of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from upscale.aliases import argument
from upscale.guards import fixed_size
from upscale.importing import Imported
from upscale.printing import listed

__all__ = ["Product", "as_products", "emit_product", "product_notes", "restore_convolutions"]

_aten = torch.ops.aten
_MARK = "product"


@dataclass(frozen=True)
class Product:
    """``form`` as in the plan; ``sizes``: of the dimensions of space, None where they are free."""

    form: str
    sizes: tuple[int | None, ...]

    @staticmethod
    def mark(node: fx.Node, form: str, shape: Any) -> None:
        """Have a convolution, whose result has ``shape``, emitted as a product."""
        node.meta[_MARK] = Product(form, tuple(fixed_size(size) for size in shape[2:]))

    @staticmethod
    def of(node: fx.Node) -> Product | None:
        """The mark of a convolution, if it has one."""
        return node.meta.get(_MARK)


# -- writing ----------------------------------------------------------------------------------------------------------


def emit_product(graph: fx.Graph, node: fx.Node, product: Product, lookup: Callable[[fx.Node], Any]) -> fx.Node:
    """Emit a marked convolution; ``lookup`` gives what stands for a node of the program in ``graph``."""
    x, weight = lookup(argument(node, "input")), lookup(argument(node, "weight"))
    bias = argument(node, "bias")
    bias = None if bias is None else lookup(bias)
    matrix = graph.call_function(torch.flatten, (weight, 1))
    sizes = [graph.call_method("size", (x, d)) if s is None else s for d, s in enumerate(product.sizes, 2)]
    return _FORMS[product.form](graph, x, matrix, bias, sizes)


def _emit_rows(graph: fx.Graph, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, sizes: list[Any]) -> fx.Node:
    """Two dimensions for ``linear``: of more it adds the bias in a pass of its own."""
    rows = graph.call_function(torch.flatten, (graph.call_function(torch.movedim, (x, 1, -1)), 0, -2))
    made = graph.call_function(F.linear, (rows, matrix) if bias is None else (rows, matrix, bias))
    return graph.call_function(torch.movedim, (graph.call_function(torch.unflatten, (made, 0, [-1, *sizes])), -1, 1))


def _emit_planes(graph: fx.Graph, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, sizes: list[Any]) -> fx.Node:
    """``bmm`` and not ``matmul``, which copies the operand where the weight is trainable."""
    batch = graph.call_method("size", (x, 0))
    weights = graph.call_method("expand", (matrix, batch, -1, -1))
    planes = graph.call_function(torch.flatten, (x, 2)) if len(sizes) > 1 else x
    if bias is None:
        made = graph.call_function(torch.bmm, (weights, planes))
    else:
        column = graph.call_method("unsqueeze", (bias, 1))
        made = graph.call_function(torch.baddbmm, (column, weights, planes))
    return graph.call_function(torch.unflatten, (made, 2, sizes)) if len(sizes) > 1 else made


_FORMS: dict[str, Callable[..., fx.Node]] = {"rows": _emit_rows, "planes": _emit_planes}


def as_products(form: str, bias: bool = False) -> fx.GraphModule:
    """A 1x1 convolution of images, spelled as a product, to be timed: a module that takes an image, a weight and, with
    ``bias``, a bias."""
    graph = fx.Graph()
    made = graph.call_function(
        _aten.conv2d.default, tuple(graph.placeholder(name) for name in ("x", "weight", "bias")[: 2 + bias])
    )
    product = Product(form, (None, None))
    graph.output(emit_product(graph, made, product, lambda node: node))
    graph.erase_node(made)
    return fx.GraphModule(nn.Module(), graph)


def product_notes(graph: fx.Graph) -> list[str]:
    """Which layers of a lowered program are products, for the report."""
    weights = [argument(node, "weight") for node in graph.nodes if Product.of(node) is not None]
    names = list(dict.fromkeys(str(weight.target).removesuffix(".weight") for weight in weights))
    if not names:
        return []
    what = "read a slice without a copy, as matrix products with their weights (no forward hooks run)"
    return [f"{what}: {listed(names)}"]


# -- reading ----------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = {d + 2: getattr(_aten, f"conv{d}d").default for d in (1, 2, 3)}
_Found = tuple[fx.Node, fx.Node, "fx.Node | None"]  # input, weight, bias


def restore_convolutions(imported: Imported) -> None:
    """Put a convolution in the place of every product that :func:`emit_product` writes. What it leaves unused stays."""
    for node in list(imported.graph.nodes):
        reader = _READERS.get(node.target)
        found = reader(node) if reader is not None else None
        if found is None or not _fits(node, *found):
            continue
        target, args = _CONVOLUTIONS[found[0].meta["val"].ndim], found if found[2] is not None else found[:2]
        with imported.graph.inserting_before(node):
            made = imported.graph.call_function(target, args)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)


def _fits(node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> bool:
    """Whether a convolution would give the same: the dimensions of space may have been cut up otherwise."""
    source, result, kernel = x.meta["val"], node.meta["val"], weight.meta["val"]
    if source.ndim not in _CONVOLUTIONS or kernel.ndim != source.ndim or any(size != 1 for size in kernel.shape[2:]):
        return False
    return (
        result.ndim == source.ndim
        and all(_same(a, b) for a, b in zip(source.shape[2:], result.shape[2:], strict=True))
        and (bias is None or tuple(bias.meta["val"].shape) == (kernel.shape[0],))
        and source.dtype == result.dtype == kernel.dtype
    )


def _same(a: Any, b: Any) -> bool:
    """Equal sizes, for every input."""
    here, there = ((s.node.expr if isinstance(s, torch.SymInt) else s) for s in (a, b))
    return bool(here == there)


def _call(node: Any, target: Any, *rest: Any) -> fx.Node | None:
    """The first argument of a call of ``target`` whose others are ``rest``."""
    names = [a.name for a in target._schema.arguments]
    if not isinstance(node, fx.Node) or node.target is not target:
        return None
    first, *others = (argument(node, name) for name in names)
    return first if others == list(rest) else None


def _matrix_of(node: Any) -> fx.Node | None:
    weight = _call(node, _aten.flatten.using_ints, 1, -1)
    return weight if weight is not None and weight.op == "get_attr" else None


def _read_rows(node: fx.Node) -> _Found | None:
    parted = _call(node, _aten.movedim.int, -1, 1)
    if parted is None or parted.target is not _aten.unflatten.int or parted.args[1] != 0:
        return None
    product = parted.args[0]
    if not isinstance(product, fx.Node) or product.target is not _aten.linear.default:
        return None
    rows, matrix, bias = (argument(product, name) for name in ("input", "weight", "bias"))
    x = _call(_call(rows, _aten.flatten.using_ints, 0, -2), _aten.movedim.int, 1, -1)
    weight = _matrix_of(matrix)
    return None if x is None or weight is None else (x, weight, bias)


def _read_planes(node: fx.Node) -> _Found | None:
    parted = node.target is _aten.unflatten.int
    product = node.args[0] if parted else node
    if not isinstance(product, fx.Node) or (parted and node.args[1] != 2) or product.target not in _PRODUCTS:
        return None
    *column, weights, planes = product.args
    bias = _call(column[0], _aten.unsqueeze.default, 1) if column else None
    if not isinstance(weights, fx.Node) or weights.target is not _aten.expand.default or product.kwargs:
        return None
    x = _call(planes, _aten.flatten.using_ints, 2, -1) if parted else planes
    weight = _matrix_of(weights.args[0])
    if x is None or weight is None or (column and bias is None):
        return None
    return x, weight, bias  # type: ignore[return-value]


_PRODUCTS = frozenset((_aten.bmm.default, _aten.baddbmm.default))
_READERS: dict[Any, Callable[[fx.Node], _Found | None]] = {
    _aten.movedim.int: _read_rows,
    _aten.unflatten.int: _read_planes,
    **dict.fromkeys(_PRODUCTS, _read_planes),
}

"""ATen calls as a person would write them: methods, operators and ``torch`` functions with exactly the same meaning.

What is not in these tables is emitted as the ATen overload itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from upscale.aliases import argument

_aten = torch.ops.aten
_END = 9223372036854775807

#: Same arguments in the same order, as a method of the first one.
METHODS = {
    _aten.view.default: "view",
    _aten.reshape.default: "reshape",
    _aten.permute.default: "permute",
    _aten.transpose.int: "transpose",
    _aten.contiguous.default: "contiguous",
    _aten.expand.default: "expand",
    _aten.expand_as.default: "expand_as",
    _aten.unsqueeze.default: "unsqueeze",
    _aten.squeeze.dim: "squeeze",
    _aten.chunk.default: "chunk",
    _aten.select.int: "select",
    _aten.narrow.default: "narrow",
    _aten.repeat.default: "repeat",
    _aten.detach.default: "detach",
    _aten.masked_fill.Scalar: "masked_fill",
    _aten.masked_fill.Tensor: "masked_fill",
    _aten.sym_size.int: "size",
}

#: Same arguments in the same order, as a function.
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _aten.conv1d.default: F.conv1d,
    _aten.conv2d.default: F.conv2d,
    _aten.conv3d.default: F.conv3d,
    _aten.conv1d.padding: F.conv1d,
    _aten.conv2d.padding: F.conv2d,
    _aten.conv3d.padding: F.conv3d,
    _aten.conv_transpose1d.default: F.conv_transpose1d,
    _aten.conv_transpose2d.input: F.conv_transpose2d,
    _aten.conv_transpose3d.input: F.conv_transpose3d,
    _aten.linear.default: F.linear,
    _aten.prelu.default: torch.prelu,
    _aten.relu.default: torch.relu,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.tanh.default: torch.tanh,
    _aten.gelu.default: F.gelu,
    _aten.silu.default: F.silu,
    _aten.hardswish.default: F.hardswish,
    _aten.hardsigmoid.default: F.hardsigmoid,
    _aten.flatten.using_ints: torch.flatten,
    _aten.cat.default: torch.cat,
    _aten.stack.default: torch.stack,
    _aten.matmul.default: torch.matmul,
    _aten.bmm.default: torch.bmm,
    _aten.roll.default: torch.roll,
    _aten.mean.dim: torch.mean,
    _aten.softmax.int: torch.softmax,
    _aten.adaptive_avg_pool1d.default: F.adaptive_avg_pool1d,
    _aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    _aten.adaptive_avg_pool3d.default: F.adaptive_avg_pool3d,
    _aten.avg_pool2d.default: F.avg_pool2d,
    _aten.pad.default: F.pad,
    _aten.exp.default: torch.exp,
    _aten.sqrt.default: torch.sqrt,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.pixel_shuffle.default: F.pixel_shuffle,
    _aten.index_select.default: torch.index_select,
}

#: Python operators; valid where nothing but the two operands is given.
OPERATORS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: operator.add,
    _aten.sub.Tensor: operator.sub,
    _aten.mul.Tensor: operator.mul,
    _aten.div.Tensor: operator.truediv,
    _aten.neg.default: operator.neg,
}


def emit_call(
    graph: fx.Graph,
    node: fx.Node,
    lookup: Callable[[fx.Node], Any],
    anchor: fx.Node | None,
    device: torch.device | None = None,
) -> fx.Node:
    """Emit ``node`` in its most readable exact form.

    ``lookup`` gives what stands for a node of the program in ``graph``; ``anchor`` is an input tensor of the emitted
    model; new tensors that were made on its ``device`` at capture follow it to another.
    """
    args, kwargs = fx.node.map_arg(node.args, lookup), fx.node.map_arg(node.kwargs, lookup)
    target: Any = node.target
    special = _SPECIAL.get(target)
    if special is not None:
        made = special(graph, node, lookup)
        if made is not None:
            return made
    if target in METHODS and args and isinstance(args[0], fx.Node):
        return graph.call_method(METHODS[target], args, kwargs)
    if target in OPERATORS and not kwargs and len(args) <= 2:
        return graph.call_function(OPERATORS[target], args)
    if target in FUNCTIONS:
        return graph.call_function(FUNCTIONS[target], args, kwargs)
    if target in _FACTORIES and anchor is not None:
        return _factory(graph, node, args, kwargs, anchor)
    if anchor is not None and device is not None and kwargs.get("device") == device:
        kwargs = {**kwargs, "device": graph.call_function(getattr, (anchor, "device"))}
    return graph.call_function(target, args, kwargs)


_FACTORIES: dict[Any, tuple[str, int]] = {
    _aten.zeros.default: ("new_zeros", 1),
    _aten.ones.default: ("new_ones", 1),
    _aten.full.default: ("new_full", 2),
    _aten.empty.memory_format: ("new_empty", 1),
}


def _factory(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any, anchor: fx.Node) -> fx.Node:
    """A new tensor of a computed size, made on the device of the input instead of the device of the capture."""
    method, count = _FACTORIES[node.target]
    dtype = kwargs.get("dtype")
    if dtype is None:
        value = node.meta.get("val")
        dtype = value.dtype if isinstance(value, torch.Tensor) else torch.get_default_dtype()
    return graph.call_method(method, (anchor, *args[:count]), {"dtype": dtype})


def _max_pool(function: Callable[..., Any]) -> Callable[..., fx.Node]:
    def emit(graph: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> fx.Node:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        size, stride, padding, dilation, ceil = (argument(node, name) for name in names)
        args = (lookup(node.args[0]), size, stride or None, padding, dilation, ceil)  # type: ignore[arg-type]
        return graph.call_function(function, args)

    return emit


def _slice(graph: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> fx.Node:
    dim, start, end, step = (argument(node, name) for name in ("dim", "start", "end", "step"))
    start, end = fx.node.map_arg((start, end), lookup)
    index = slice(start, None if isinstance(end, int) and end == _END else end, None if step == 1 else step)
    whole = slice(None)
    place = (whole,) * dim + (index,) if dim >= 0 else (Ellipsis, index) + (whole,) * (-dim - 1)
    return graph.call_function(operator.getitem, (lookup(node.args[0]), place))  # type: ignore[arg-type]


def _index(graph: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> fx.Node:
    indices: Any = fx.node.map_arg(node.args[1], lookup)
    place = tuple(slice(None) if index is None else index for index in indices)
    return graph.call_function(operator.getitem, (lookup(node.args[0]), place))  # type: ignore[arg-type]


def _keywords(function: Callable[..., Any], *names: tuple[str, str]) -> Callable[..., fx.Node]:
    """A function of ``torch.nn.functional`` whose arguments have another order: pass them by name."""

    def emit(graph: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> fx.Node:
        given = {new: fx.node.map_arg(argument(node, old), lookup) for old, new in names}
        source = given.pop("input")
        return graph.call_function(function, (source,), given)

    return emit


def _same(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def _embedding(graph: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> fx.Node:
    padding = argument(node, "padding_idx")
    options = {
        "padding_idx": None if padding < 0 else padding,
        "scale_grad_by_freq": argument(node, "scale_grad_by_freq"),
        "sparse": argument(node, "sparse"),
    }
    return graph.call_function(
        F.embedding, (lookup(argument(node, "indices")), lookup(argument(node, "weight"))), options
    )


def _split(graph: fx.Graph, node: fx.Node, lookup: Callable[[fx.Node], Any]) -> fx.Node:
    return graph.call_function(torch.split, fx.node.map_arg(node.args, lookup))


_NORM = ("input", "running_mean", "running_var", "weight", "bias")
_SPECIAL: dict[Any, Callable[..., fx.Node | None]] = {
    _aten.max_pool1d.default: _max_pool(F.max_pool1d),
    _aten.max_pool2d.default: _max_pool(F.max_pool2d),
    _aten.max_pool3d.default: _max_pool(F.max_pool3d),
    _aten.slice.Tensor: _slice,
    _aten.index.Tensor: _index,
    _aten.embedding.default: _embedding,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.split.sizes: _split,
    _aten.batch_norm.default: _keywords(F.batch_norm, *_same(*_NORM, "training", "momentum", "eps")),
    _aten.instance_norm.default: _keywords(F.instance_norm, *_same(*_NORM, "use_input_stats", "momentum", "eps")),
    _aten.layer_norm.default: _keywords(F.layer_norm, *_same("input", "normalized_shape", "weight", "bias", "eps")),
    _aten.group_norm.default: _keywords(F.group_norm, *_same("input", "num_groups", "weight", "bias", "eps")),
    _aten.rms_norm.default: _keywords(F.rms_norm, *_same("input", "normalized_shape", "weight", "eps")),
    _aten.dropout.default: _keywords(F.dropout, ("input", "input"), ("p", "p"), ("train", "training")),
}

"""Pure data movement: one rule, because the operator itself is run on the labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .effects import Barrier, Concat, Effect, Movement, Op, size_of
from .registry import names, rule

# Operators whose arguments spell out the whole result shape; the name of that argument.
_SIZED = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "expand": "size", "unflatten": "sizes"}


@rule(
    *names(
        "aten",
        "view reshape _unsafe_view flatten.using_ints unflatten.int permute transpose.int t numpy_T "
        "movedim.int movedim.intlist swapaxes swapdims unsqueeze squeeze squeeze.dim squeeze.dims expand expand_as "
        "repeat repeat_interleave.self_int tile slice.Tensor select.int narrow roll flip channel_shuffle "
        "pixel_unshuffle pixel_shuffle chunk split.Tensor split_with_sizes split.sizes tensor_split.sections "
        "tensor_split.indices unbind.int unfold diagonal rot90 index_select index.Tensor fliplr flipud",
    )
)
def movement(op: Op) -> Effect:
    operand = next(iter(op.tensors), None)
    stem = op.name.split(".")[1]
    if operand is None:
        return Barrier("moves a list of tensors", op.tensors)
    values: dict[Node, torch.Tensor] = {}
    for other in op.tensors[1:]:
        if stem == "expand_as":
            values[other] = torch.empty(op.shape(other), device="meta")
            continue
        value = op.value_of(other)
        if value is None:
            return Barrier("indexed by a tensor that is not constant", op.tensors)
        values[other] = value
    return Movement(operand, _on_labels(op.node, operand, values), _SIZED.get(stem))


@rule(
    *names(
        "aten",
        "contiguous clone detach alias lift_fresh_copy to.dtype to.device to.dtype_layout _to_copy to.other type_as",
    )
)
def same_elements(op: Op) -> Effect:
    return Movement(op.tensors[0], lambda labels: labels)


@rule(*names("aten", "cat concat concatenate"))
def concatenate(op: Op) -> Effect:
    tensors = tuple(op["tensors"])
    if len(tensors) == 1:
        return Movement(tensors[0], lambda labels: labels)
    return Concat(tensors, op["dim"] % len(op.shape()))


@rule("aten.stack.default")
def stack(op: Op) -> Effect:
    return Concat(tuple(op["tensors"]), op["dim"] % len(op.shape()), new_dim=True)


def getitem(node: Node) -> Movement:
    """``chunk(x)[1]``: the list operator and the pick, as one movement of ``x``."""
    parent: Any = node.args[0]
    index: Any = node.args[1]
    source = next(n for n in parent.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
    run = _on_labels(parent, source, {})
    return Movement(source, lambda labels: run(labels)[index])


def _on_labels(node: Node, operand: Node, values: dict[Node, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The operator as a function of its first tensor, every other argument filled in with plain numbers."""

    def plain(labels: torch.Tensor) -> Callable[[Node], Any]:
        def swap(n: Node) -> Any:
            if n is operand:
                return labels
            return values[n] if n in values else size_of(n.meta["val"])

        return swap

    def run(labels: torch.Tensor) -> torch.Tensor:
        args = map_arg(node.args, plain(labels))
        kwargs = map_arg(node.kwargs, plain(labels))
        target: Any = node.target
        if str(target).split(".")[1] in ("view", "_unsafe_view"):
            target = torch.ops.aten.reshape.default  # labels are strided with step 0: a view may not exist
        try:
            return target(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            # no integer kernel for this operator: floats hold labels exactly
            moved: torch.Tensor = target(*map_arg(node.args, plain(labels.double())), **kwargs)
            return moved.to(torch.int32)

    return run

"""The layers that can be repaired: where their weights lie, who calls them, where their shift goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..aliases import argument
from ..program import Program
from ..temporary import ChannelMask
from .geometry import Geometry, geometry_of, is_contraction
from .pair import Pair

__all__ = ["Call", "Shift", "Site", "bias_node", "find_sites", "is_frozen", "weight_node", "writer"]

_aten = torch.ops.aten
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer in the masked network (``node``) and in the original (``origin``).

    ``norm``: the batch norm that alone reads the result; ``other``: what is then added to it, where that is computed
    before the layer and nobody else reads the sum's operand. Pairs are (masked network's node, original's).
    ``clamp``: the least and the greatest value that an activation which alone reads all that lets through.
    """

    node: fx.Node
    origin: fx.Node
    norm: tuple[fx.Node, fx.Node] | None
    other: tuple[fx.Node, fx.Node] | None
    clamp: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Shift:
    """Where a constant for each output goes. ``tensor`` plus ``sign`` times the constant is written by ``write``."""

    tensor: Tensor
    sign: int
    write: Callable[[Tensor], None]


@dataclass(frozen=True, eq=False)
class Site:
    """A layer: its weight and bias as the masked program has them, the way to write the weight, its calls in order,
    and its shift."""

    name: str
    geometry: Geometry
    weight: Tensor
    bias: Tensor | None
    write: Callable[[Tensor], None]
    calls: tuple[Call, ...]
    shift: Shift | None

    @property
    def unknowns(self) -> int:
        """Weights that one output has, masked ones too, and its shift."""
        return self.weight.numel() // self.geometry.rows_of(self.weight).flatten(0, 1).shape[0] + bool(self.shift)


def find_sites(pair: Pair, model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """The layers of ``model``, the masked copy that ``pair.masked`` was captured from, in the order of their first
    call, and those that are left alone, with the reason."""
    program = pair.masked
    calls: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and is_contraction(node):
            calls.setdefault(str(weight_node(node).target), []).append(node)
    sites, left = [], {}
    for name, nodes in calls.items():
        layer = name.removesuffix(".weight")
        site = _site(pair, model, layer, name, nodes)
        if isinstance(site, str):
            left[layer] = site
        else:
            sites.append(site)
    return sites, left


def weight_node(node: fx.Node) -> fx.Node:
    """What a contraction's call multiplies with; the call itself where that is computed."""
    found = argument(node, "other" if node.target is _aten.matmul.default else "weight")
    return found if isinstance(found, fx.Node) and found.op == "get_attr" else node


def _site(pair: Pair, model: nn.Module, layer: str, name: str, nodes: list[fx.Node]) -> Site | str:
    program = pair.masked
    attribute = weight_node(nodes[0])
    if attribute is nodes[0]:
        return "its weight is computed from the input"
    if any(user not in nodes for user in attribute.users):
        return "its weight has a second use"
    weight = program.tensors[name]
    if not weight.is_floating_point() or weight.is_complex():
        return f"its weight is of type {weight.dtype}"
    write = writer(model, program, name)
    if write is None:
        return "its weight is computed from other tensors"
    geometries = {geometry_of(node, weight) for node in nodes}
    if len(geometries) > 1:
        return "it is called in different ways"
    found = tuple(_call(pair, node) for node in nodes)
    bias = bias_node(nodes[0])
    if any(bias_node(node) is not bias for node in nodes):
        return "its calls add different biases"
    if bias is not None and bias.op != "get_attr":
        return "its bias is computed from the input"
    value = None if bias is None else program.tensors[str(bias.target)]
    return Site(layer, geometries.pop(), weight, value, write, found, _shift(pair, model, found))


def bias_node(node: fx.Node) -> fx.Node | None:
    """What a contraction's call adds to each output."""
    return None if node.target is _aten.matmul.default else argument(node, "bias")


def _call(pair: Pair, node: fx.Node) -> Call:
    origin = pair.origin[node]
    end = _only_user(node)
    norm = None
    if end is not None and end.target is _aten.batch_norm.default and is_frozen(end):
        norm, end = (end, pair.origin[end]), _only_user(end)
    other = None
    if end is not None and end.target in _ADDS and argument(end, "alpha") == 1:
        summand = norm[0] if norm else node
        beside = [value for value in end.args[:2] if value is not summand]
        if len(beside) == 1 and isinstance(beside[0], fx.Node) and _comes_before(beside[0], node):
            same = beside[0].meta["val"].shape == summand.meta["val"].shape
            at = end.args.index(beside[0])
            behind = pair.origin[end].args[at]
            if same and isinstance(behind, fx.Node):
                other, end = (beside[0], behind), _only_user(end)
    return Call(node, origin, norm, other, None if end is None else _clamp(end))


def _clamp(node: fx.Node) -> tuple[float, float] | None:
    """What a rectifier lets through."""
    if node.target is _aten.relu.default:
        return 0.0, math.inf
    if node.target is _aten.relu6.default:
        return 0.0, 6.0
    if node.target is _aten.hardtanh.default:
        return float(argument(node, "min_val")), float(argument(node, "max_val"))
    return None


def _comes_before(first: fx.Node, second: fx.Node) -> bool:
    return first.op in ("call_function", "placeholder") and first < second


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_frozen(norm: fx.Node) -> bool:
    """Whether a batch norm's call uses the running statistics."""
    return argument(norm, "training") is False and argument(norm, "running_mean") is not None


def _shift(pair: Pair, model: nn.Module, calls: tuple[Call, ...]) -> Shift | None:
    """The layer's bias if it has one of its own, else the running mean of the batch norm behind its only call."""
    program = pair.masked
    nodes = {call.node for call in calls}
    call = calls[0]
    bias = bias_node(call.node)
    if bias is not None:
        return _shift_in(program, model, bias, nodes, 1)
    if len(calls) > 1 or call.norm is None:
        return None
    return _shift_in(program, model, argument(call.norm[0], "running_mean"), {call.norm[0]}, -1)


def _shift_in(program: Program, model: nn.Module, place: object, users: set[fx.Node], sign: int) -> Shift | None:
    if not isinstance(place, fx.Node) or place.op != "get_attr" or set(place.users) - users:
        return None
    write = writer(model, program, str(place.target))
    return None if write is None else Shift(program.tensors[str(place.target)], sign, write)


def writer(model: nn.Module, program: Program, name: str) -> Callable[[Tensor], None] | None:
    """How to give the tensor ``name`` of ``program`` a new value in ``model`` too; None where it cannot be.

    Under a mask (a :class:`ChannelMask` or one of ``torch.nn.utils.prune``) the value below is written, and the
    masked entries of it stay as they are.
    """
    tensor = program.tensors[name]
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    own: Tensor | None = module._parameters.get(leaf)
    if own is None:
        own = module._buffers.get(leaf)
    if own is not None:
        return (lambda value: _copy(value, tensor)) if own is tensor else None
    below = _masked_parameter(module, leaf)
    if below is None:
        return None
    parameter, kept = below

    def write(value: Tensor) -> None:
        _copy(value * kept, tensor)
        _copy(torch.where(kept, value.to(parameter.dtype), parameter), parameter)
        if leaf in module.__dict__:  # what torch.nn.utils.prune computed last
            module.__dict__[leaf] = parameter.detach() * kept

    return write


def _masked_parameter(module: nn.Module, leaf: str) -> tuple[Tensor, Tensor] | None:
    """The parameter below a mask, and the mask: bool, True where it keeps."""
    if parametrize.is_parametrized(module, leaf):
        chain = module.parametrizations[leaf]  # type: ignore[index]
        masks = [entry for entry in chain if isinstance(entry, ChannelMask)]
        below = getattr(chain, "original", None)
        if not isinstance(below, Tensor) or len(masks) < len(chain):
            return None
        kept = torch.ones_like(below, dtype=torch.bool)
        for entry in masks:
            kept = kept & entry.kept
        return below, kept
    original, mask = module._parameters.get(f"{leaf}_orig"), module._buffers.get(f"{leaf}_mask")
    return None if original is None or mask is None else (original, mask != 0)


@torch.no_grad()
def _copy(value: Tensor, tensor: Tensor) -> None:
    tensor.copy_(value)

"""The forward pass of constants: channels that hold one known value at every pixel of every image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.fx import Node

from ..aliases import first_tensor
from ..program import Program
from .effects import Concat, Constants, Contract, Mixing, Movement, Pad, PerChannel, Pointwise
from .groups import as_rows
from .model import FlowNode, Link, Support


def support_of(program: Program, effect: Contract, only: Mapping[str, torch.Tensor] | None = None) -> Support:
    """Which inputs every row of a contraction uses; of a grouped one, the inputs of the row's own group.

    ``only``: where given, zeros count as masked only at these entries (weight name -> bool of the weight's shape).
    """
    weight = program.tensors[str(effect.weight.target)].detach()
    bias = program.tensors[str(effect.bias.target)].detach().cpu() if effect.bias is not None else None
    if effect.weight_in is None:  # embedding: one row per column of the table, no inputs
        table = weight.movedim(effect.weight_out, 0).flatten(1).cpu()
        varies = (table != table[:, :1]).any(1, keepdim=True)
        return Support(varies.numpy(), table[:, :1, None], None)
    matrix = _matrix(weight, effect)
    if only is None:
        return Support(_nonzero(matrix), matrix, bias)
    masked = only.get(str(effect.weight.target), torch.zeros((), dtype=torch.bool)).expand(weight.shape)
    return Support(~_matrix(masked, effect).all(2).numpy(), matrix, bias)


def _matrix(weight: torch.Tensor, effect: Contract) -> torch.Tensor:
    """A weight as (rows, inputs, window)."""
    assert effect.weight_in is not None
    if effect.groups > 1 and effect.weight_out == 1:
        matrix = as_rows(weight, effect.groups)
    else:
        matrix = weight.movedim((effect.weight_out, effect.weight_in), (0, 1))
    return matrix.unsqueeze(-1).flatten(2)


def _nonzero(matrix: torch.Tensor) -> np.ndarray:
    """Whether any entry of a window is not zero. A matrix product: torch reduces short last dimensions slowly."""
    window = matrix.shape[2]
    if window == 1:
        found = matrix[:, :, 0] != 0
    elif matrix.dtype in (torch.float32, torch.float64):
        sums = matrix.abs().reshape(-1, window) @ torch.ones(window, dtype=matrix.dtype, device=matrix.device)
        found = (sums > 0).view(matrix.shape[:2])
    else:
        found = (matrix != 0).any(2)
    result: np.ndarray = found.cpu().numpy()
    return result


def find_constants(
    program: Program, nodes: dict[Node, FlowNode], supports: dict[Node, Support]
) -> dict[Node, Constants | None]:
    """Known constants of every tensor that carries channels (None: none known)."""
    found: dict[Node, Constants | None] = {}
    for node, flow in nodes.items():
        result = _constants_of(program, flow, supports.get(node), found)
        found[node] = _as_stored(node, result) if result is not None and bool(result.known.any()) else None
    return found


def _as_stored(node: Node, constants: Constants) -> Constants:
    """Values in the dtype that the tensor has: an operator that converts passes its operand's on."""
    value = first_tensor(node.meta.get("val"))
    return constants if value is None else Constants(constants.known, constants.value.to(value.dtype))


def _constants_of(
    program: Program, flow: FlowNode, support: Support | None, found: dict[Node, Constants | None]
) -> Constants | None:
    if flow.channels is None:
        return None
    if flow.kind == "param":
        value = program.tensors[str(flow.node.target)].detach().cpu().flatten()
        return Constants(torch.ones(len(value), dtype=torch.bool), value)
    if isinstance(flow.effect, Contract) and support is not None:
        return _contract(flow, flow.effect, support, found)
    operands = [_through(link, found) for link in flow.links]
    if flow.kind in ("select", "concat"):
        return _pieces(flow, operands)
    match flow.effect:
        case Movement():
            return operands[0]
        case PerChannel(constant=rule):
            return rule(operands) if rule is not None else None
        case Pointwise(constant=rule):
            return rule(_every_operand(program, flow, operands)) if rule is not None else None
        case Pad(value=padding):
            c = operands[0]
            return None if c is None else Constants(c.known & (c.value == padding), c.value)
        case Concat():
            return _agreeing(operands)
        case Mixing():
            return None
    return None


def _through(link: Link, found: dict[Node, Constants | None]) -> Constants | None:
    operand = None if link.anchored else found.get(link.operand)
    if operand is None:
        return None
    index = torch.from_numpy(np.maximum(link.positions, 0))
    known, value = operand.known[index] & torch.from_numpy(link.positions >= 0), operand.value[index]
    if known.ndim > 1:  # a block is known where all of it holds one value
        return Constants(known.all(1) & (value == value[:, :1]).all(1), value[:, 0])
    return Constants(known, value)


def _every_operand(program: Program, flow: FlowNode, linked: list[Constants | None]) -> list[Constants | None]:
    """One entry per operand of a pointwise operator; a learned scalar is a constant too."""
    assert isinstance(flow.effect, Pointwise) and flow.channels is not None
    by_node = {link.operand: c for link, c in zip(flow.links, linked, strict=True)}
    result: list[Constants | None] = []
    for n in flow.effect.operands:
        if n in by_node:
            result.append(by_node[n])
            continue
        tensor = program.tensors.get(str(n.target)) if n.op == "get_attr" else None
        if tensor is None or tensor.numel() != 1:
            result.append(None)
            continue
        size = flow.channels.size
        result.append(Constants(torch.ones(size, dtype=torch.bool), tensor.detach().cpu().flatten().expand(size)))
    return result


def _pieces(flow: FlowNode, operands: list[Constants | None]) -> Constants | None:
    assert flow.channels is not None
    dtype = next((c.value.dtype for c in operands if c is not None), flow.node.meta["val"].dtype)
    covered = np.zeros(flow.channels.size, dtype=bool)
    known = torch.zeros(flow.channels.size, dtype=torch.bool)
    value = torch.full((flow.channels.size,), flow.fill, dtype=dtype)
    for link, c in zip(flow.links, operands, strict=True):
        covered |= link.positions >= 0
        if c is not None:
            value = torch.where(c.known, c.value, value)
            known |= c.known
    return Constants(known | torch.from_numpy(~covered), value)


def _agreeing(operands: list[Constants | None]) -> Constants | None:
    first = operands[0]
    if first is None or any(c is None for c in operands):
        return None
    known = first.known.clone()
    for c in operands[1:]:
        assert c is not None
        known &= c.known & (c.value == first.value)
    return Constants(known, first.value)


def _contract(
    flow: FlowNode, effect: Contract, support: Support, found: dict[Node, Constants | None]
) -> Constants | None:
    """A row is constant if every input it uses is a constant that contributes the same everywhere."""
    rows = support.used.shape[0]
    bias = torch.zeros(rows, dtype=support.matrix.dtype) if support.bias is None else support.bias
    if effect.operand is None:
        return Constants(torch.from_numpy(~support.used[:, 0]), support.matrix[:, 0, 0])
    operand = _through(flow.links[0], found) if effect.groups == 1 else None
    if operand is None:
        return Constants(torch.from_numpy(~support.used.any(1)), bias)
    foldable = operand.known & ((operand.value == 0) | effect.exact)
    known = torch.from_numpy(~support.used[:, ~foldable.numpy()].any(1))
    value = torch.where(foldable, operand.value, torch.zeros_like(operand.value)).to(bias.dtype)
    return Constants(known, bias + support.weighted(value))

"""Constant rules: what an operator makes of channels that hold one known value."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .effects import ConstantRule, Constants, Op


def evaluate(op: Op) -> ConstantRule | None:
    """Run the operator itself on the vector of constants; known where all operands are known.

    The operator is applied to one value per channel, so nothing is assumed about f(0).
    """
    tensors = op.tensors
    if any(isinstance(n, Node) and n not in tensors for n in op.node.all_input_nodes):
        return None  # a symbolic size takes part: the value is not known before the call

    def constant(operands: list[Constants | None]) -> Constants | None:
        if any(c is None for c in operands):
            return None
        present = [c for c in operands if c is not None]
        known = torch.stack([c.known for c in present]).all(0)
        if not bool(known.any()):
            return None
        values: dict[Node, torch.Tensor] = {n: c.value for n, c in zip(tensors, present, strict=True)}
        return Constants(known, _call(op, values))

    return constant


def _call(op: Op, values: dict[Node, torch.Tensor]) -> torch.Tensor:
    def swap(n: Node) -> Any:
        return values[n]

    args = map_arg(op.node.args, swap)
    kwargs = map_arg(op.node.kwargs, swap)
    with torch.no_grad():
        result: torch.Tensor = op.node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def product(op: Op) -> ConstantRule | None:
    """Multiplication: also zero wherever one factor is known to be zero."""
    general = evaluate(op)

    def constant(operands: list[Constants | None]) -> Constants | None:
        known = general(operands) if general is not None else None
        zeros = [c.known & (c.value == 0) for c in operands if c is not None]
        if not zeros:
            return known
        zero = torch.stack(zeros).any(0)
        if known is None:
            dtype = next(c.value.dtype for c in operands if c is not None)
            return Constants(zero, torch.zeros(len(zero), dtype=dtype))
        return Constants(known.known | zero, torch.where(zero, torch.zeros_like(known.value), known.value))

    return constant


def keep(operands: list[Constants | None]) -> Constants | None:
    """The value passes unchanged: pooling, resampling, dropout in evaluation, a mean over space."""
    return operands[0]


def affine(scale: torch.Tensor, shift: torch.Tensor, blocked: torch.Tensor) -> ConstantRule:
    """``scale * c + shift`` per channel; where ``blocked`` the result is the shift whatever comes in."""

    def constant(operands: list[Constants | None]) -> Constants | None:
        operand = operands[0]
        if operand is None:
            return Constants(blocked, shift) if bool(blocked.any()) else None
        value = torch.where(blocked, shift, operand.value.to(shift.dtype) * scale + shift)
        return Constants(operand.known | blocked, value)

    return constant


def zero_only(shift: torch.Tensor, blocked: torch.Tensor) -> ConstantRule:
    """Zero in gives ``shift`` out; any other constant is not constant any more (a zero-padded border)."""

    def constant(operands: list[Constants | None]) -> Constants | None:
        operand = operands[0]
        known = blocked if operand is None else blocked | (operand.known & (operand.value == 0))
        return Constants(known, shift) if bool(known.any()) else None

    return constant

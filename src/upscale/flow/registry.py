"""The table from ATen overloads to flow rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch._ops import OpOverload

from ..errors import RuleError
from .effects import Barrier, Effect, Op, Pointwise
from .evaluate import evaluate

Rule = Callable[[Op], Effect]
_TABLE: dict[OpOverload, Rule] = {}


def rule(*targets: OpOverload | str) -> Callable[[Rule], Rule]:
    """Register a flow rule for ATen overloads (or names such as ``"aten.relu.default"``).

    A name that this version of torch does not have is skipped; an overload that already has a rule is an error.

    Raises:
        RuleError: no target, a target that is not an ``OpOverload``, or one that has a rule already.
    """
    if not targets:
        raise RuleError("upscale.rule() needs at least one operator, for example torch.ops.aten.relu.default")

    def register(function: Rule) -> Rule:
        for target in targets:
            overload = _overload(target) if isinstance(target, str) else target
            if overload is None:
                continue
            if not isinstance(overload, OpOverload):
                raise RuleError(
                    f"{overload!r} is not an operator overload; write torch.ops.<namespace>.<name>.<overload>"
                )
            if overload in _TABLE:
                raise RuleError(f"{overload} already has the rule {_TABLE[overload].__name__}")
            _TABLE[overload] = function
        return function

    return register


def _overload(name: str) -> OpOverload | None:
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        return None


def names(namespace: str, stems: str | Iterable[str]) -> tuple[str, ...]:
    """``names("aten", "relu gelu add.Tensor")`` gives full names; a bare stem means its ``default`` overload."""
    parts = stems.split() if isinstance(stems, str) else stems
    return tuple(f"{namespace}.{p}" if "." in p else f"{namespace}.{p}.default" for p in parts)


def find(op: Op) -> Effect:
    """The effect of one call: its rule's, pointwise for operators torch tags so, else a barrier that is reported."""
    target = op.node.target
    if isinstance(target, OpOverload) and target._schema.is_mutable:
        return Barrier("writes to a buffer", op.tensors)
    found = _TABLE.get(target) if isinstance(target, OpOverload) else None
    if found is not None:
        effect = found(op)
        if not isinstance(effect, Effect):
            raise RuleError(f"the rule {found.__name__} for {target} returned {effect!r}, which is no effect")
        return effect
    if isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags:
        return Pointwise(op.tensors, evaluate(op))
    return Barrier("no flow rule for this operator", op.tensors)

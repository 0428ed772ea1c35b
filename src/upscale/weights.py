"""Weights that are computed: pruning masks, parametrisations, weight norm, weight standardisation.

Where the weight or bias of a layer is computed from parameters and buffers only, it is evaluated once and becomes the
layer's own parameter: masks are then read as the zeros they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from upscale.aliases import is_random, storage_id, targets_of
from upscale.functional import remove_dead
from upscale.importing import Imported
from upscale.program import module_path

_aten = torch.ops.aten

_MOST_NOTES = 5
_WEIGHT_BIAS = {1: "weight", 2: "bias"}
#: Position of weight and bias in the arguments of each layer operator.
SLOTS: dict[Any, dict[int, str]] = {
    **{getattr(_aten, f"conv{d}d").default: _WEIGHT_BIAS for d in (1, 2, 3)},
    **{getattr(_aten, f"conv{d}d").padding: _WEIGHT_BIAS for d in (1, 2, 3)},
    _aten.conv_transpose1d.default: _WEIGHT_BIAS,
    _aten.conv_transpose2d.input: _WEIGHT_BIAS,
    _aten.conv_transpose3d.input: _WEIGHT_BIAS,
    _aten.linear.default: _WEIGHT_BIAS,
    _aten.batch_norm.default: _WEIGHT_BIAS,
    _aten.instance_norm.default: _WEIGHT_BIAS,
    _aten.layer_norm.default: {2: "weight", 3: "bias"},
    _aten.group_norm.default: {2: "weight", 3: "bias"},
    _aten.rms_norm.default: {2: "weight"},
    _aten.prelu.default: {1: "weight"},
    _aten.embedding.default: {0: "weight"},
}


def fold_weight_slots(imported: Imported) -> list[str]:
    """Evaluate computed weights; returns one note for each."""
    fixed = _fixed_nodes(imported)
    taken = {storage_id(tensor) for tensor in imported.tensors.values()}
    notes = []
    pending: list[tuple[fx.Node, int, str, torch.Tensor, set[str], bool]] = []
    cache: dict[fx.Node, torch.Tensor] = {}
    for node in imported.graph.nodes:
        for position, slot in SLOTS.get(node.target, {}).items():
            source = node.args[position] if position < len(node.args) else None
            if isinstance(source, fx.Node) and source.op != "get_attr" and source in fixed:
                value = _evaluate(source, imported, cache)
                sources = _sources(source)
                trainable = any(imported.tensors[name].requires_grad for name in sources)
                pending.append((node, position, slot, value, sources, trainable))
    if not pending:
        return []
    for node, position, *_ in pending:  # detach them all first: an original name may thereby become free
        node.update_arg(position, None)
    remove_dead(imported)
    made: dict[str, fx.Node] = {}
    for node, position, slot, value, sources, trainable in pending:
        name = _place(imported, made, node, slot, value, trainable, taken)
        node.update_arg(position, made[name])
        notes.append(f"{name} is computed from {', '.join(sorted(sources))}: exported as one parameter")
        imported.consumed |= sources - set(imported.tensors)
    notes = list(dict.fromkeys(notes))
    more = len(notes) - _MOST_NOTES
    return (
        notes if more <= 0 else [*notes[:_MOST_NOTES], f"{more} more weights are computed: exported as parameters too"]
    )


def _fixed_nodes(imported: Imported) -> set[fx.Node]:
    """Nodes computed from parameters, constants and unwritten buffers only."""
    written = {target.target for node in imported.graph.nodes for target in targets_of(node)}
    fixed: set[fx.Node] = set()
    for node in imported.graph.nodes:
        if node.op == "get_attr":
            if node.target not in written:
                fixed.add(node)
        elif node.op == "call_function" and not is_random(node.target) and not targets_of(node):
            inputs = node.all_input_nodes
            if inputs and all(used in fixed for used in inputs):
                fixed.add(node)
    return fixed


def _evaluate(node: fx.Node, imported: Imported, cache: dict[fx.Node, Any]) -> torch.Tensor:
    """The value of a fixed node, without gradients."""
    stack = [node]
    with torch.no_grad():
        while stack:
            top = stack[-1]
            waiting = [used for used in top.all_input_nodes if used not in cache]
            if top.op == "get_attr":
                cache[top] = imported.tensors[str(top.target)].detach()
            elif waiting:
                stack.extend(waiting)
                continue
            else:
                args = fx.node.map_arg(top.args, cache.__getitem__)
                kwargs = fx.node.map_arg(top.kwargs, cache.__getitem__)
                cache[top] = top.target(*args, **kwargs)  # type: ignore[operator]
            stack.pop()
    value = cache[node]
    assert isinstance(value, torch.Tensor)
    return value


def _sources(node: fx.Node) -> set[str]:
    """Names of the tensors a fixed node is computed from."""
    seen, stack, names = {node}, [node], set()
    while stack:
        top = stack.pop()
        if top.op == "get_attr":
            names.add(str(top.target))
        for used in top.all_input_nodes:
            if used not in seen:
                seen.add(used)
                stack.append(used)
    return names


def _place(
    imported: Imported,
    made: dict[str, fx.Node],
    node: fx.Node,
    slot: str,
    value: torch.Tensor,
    trainable: bool,
    taken: set[int],
) -> str:
    """Name of the parameter that holds ``value``: the one made for the same layer before, or a new one.

    ``taken``: storages that belong to somebody else.
    """
    owner = _owner(node, slot)
    stem = f"{owner}.{slot}" if owner else slot
    name, number = stem, 2
    while name in imported.tensors:
        if name in made and torch.equal(imported.tensors[name], value):
            return name
        name, number = f"{stem}_{number}", number + 1
    first = next(iter(imported.graph.nodes))
    anchor = next((n for n in imported.graph.nodes if n.op not in ("placeholder", "get_attr")), first)
    with imported.graph.inserting_before(anchor):
        made[name] = imported.graph.get_attr(name)
    made[name].meta = {"val": _fake_like(node, value)}
    imported.tensors[name] = nn.Parameter(_owned(value.detach(), taken), requires_grad=trainable)
    imported.kinds[name] = "parameter"
    return name


def _owned(value: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """``value`` in memory of its own: as it is where it was computed for this, else a copy."""
    own = storage_id(value)
    if own in taken or not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
        return value.clone()
    taken.add(own)
    return value


def _fake_like(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor for ``value`` in the mode of ``node``'s own."""
    mode = getattr(node.meta.get("val"), "fake_mode", None)
    return value if mode is None else mode.from_tensor(value.detach(), static_shapes=True)


def _owner(node: fx.Node, slot: str) -> str:
    """Path of the layer: that of its other parameter where there is one, else the module that was running."""
    for position, other in SLOTS[node.target].items():
        source = node.args[position] if position < len(node.args) else None
        if other != slot and isinstance(source, fx.Node) and source.op == "get_attr":
            path, _, leaf = str(source.target).rpartition(".")
            if leaf == other:
                return path
    return module_path(node)

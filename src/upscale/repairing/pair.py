"""The masked network and the original, captured, with the calls of one matched to those of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ..capture import capture
from ..errors import InputError
from ..importance.batches import call_of
from ..program import Program, where
from ..signature import Argument, bind

__all__ = [
    "Inputs",
    "Pair",
    "batch_size",
    "capture_pair",
    "check_order",
    "check_same_layers",
    "collect",
    "paired_with_itself",
]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The batches as flat tensors, in the order of the model's arguments. ``first``: the first one as a call."""

    first: tuple[tuple[Any, ...], dict[str, Any]]
    leaves: tuple[tuple[Tensor, ...], ...]
    sizes: tuple[int, ...]  # examples of each batch
    device: torch.device  # of the model


@dataclass(frozen=True, eq=False)
class Pair:
    """Two programs of one structure. ``origin``: the original's call for each of the masked network's calls."""

    masked: Program
    original: Program
    origin: Mapping[fx.Node, fx.Node]


def collect(model: nn.Module, batches: Any, title: str = "repair") -> Inputs:
    """All batches, held where they lie: an iterable may be one that can be used only once.

    Raises ``InputError`` where there are none, or one does not nest like the first; ``NonFiniteError`` for NaN.
    """
    first: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    arguments: tuple[Argument, ...] = ()
    found, sizes = [], []
    for number, batch in enumerate(batches):
        args, kwargs = call_of(model, number, batch)
        try:
            here, leaves, _ = bind(model.forward, args, kwargs)
        except InputError as error:
            raise InputError(f"batch {number}: {error}") from error
        if first is None:
            first, arguments = (args, kwargs), here
        elif here != arguments:
            raise InputError(f"batch {number} is not built like batch 0: other arguments, or other values in them")
        found.append(tuple(leaf.detach() for leaf in leaves))
        sizes.append(batch_size(leaves))
    if first is None:
        raise InputError(f"{title}: there are no batches (a generator can be used only once)")
    if sum(sizes) < 2:
        raise InputError(f"{title} needs at least two examples: one of them is held out, to check the result on")
    return Inputs(first, tuple(found), tuple(sizes), device_of(model))


def capture_pair(masked: nn.Module, original: nn.Module, inputs: Inputs) -> Pair:
    """Capture both on the first batch; the other batches must fit what was captured.

    Raises ``InputError`` where the networks differ in structure, or a batch in a size that the capture fixed.
    """
    args, kwargs = _moved(inputs)
    programs = _captured(masked, args, kwargs), _captured(original, args, kwargs)
    calls = [[node for node in program.graph.nodes if node.op == "call_function"] for program in programs]
    for one, other in zip(*calls, strict=False):
        if one.target is not other.target:
            raise InputError(
                f"masked is no masked original: the first call that differs is {one.target} at {where(one)}, "
                f"{other.target} in the original"
            )
    if len(calls[0]) != len(calls[1]):
        raise InputError(f"masked is no masked original: {len(calls[0])} calls to the original's {len(calls[1])}")
    _check_sizes(programs[0], inputs.leaves)
    inner = [[n for n in program.graph.nodes if n.op == "placeholder"] for program in programs]
    return Pair(*programs, dict(zip([*inner[0], *calls[0]], [*inner[1], *calls[1]], strict=True)))


def paired_with_itself(model: nn.Module, inputs: Inputs) -> Pair:
    """``model`` as both networks. Raises ``InputError`` where a batch does not fit what was captured."""
    args, kwargs = _moved(inputs)
    program = _captured(model, args, kwargs)
    _check_sizes(program, inputs.leaves)
    return Pair(program, program, {node: node for node in program.graph.nodes})


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Raises ``InputError`` where the model does not accept the first batch, which is the example here."""
    try:
        return capture(model, args, kwargs)
    except InputError as error:
        raise InputError(f"batch 0: {error}") from error


def _moved(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first batch, on the model's device."""
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.to(inputs.device) if isinstance(leaf, Tensor) else leaf, inputs.first
    )
    return args, kwargs


def batch_size(leaves: Sequence[Tensor]) -> int:
    """How many examples a call has."""
    return next((leaf.shape[0] for leaf in leaves if leaf.dim()), 1)


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def check_same_layers(masked: nn.Module, original: nn.Module) -> None:
    """Raises ``InputError`` that names the first parameter or buffer whose shape differs, or that one of the two
    lacks."""
    ours, theirs = shapes(masked), shapes(original)
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if ours.get(name) != theirs.get(name):
            here, there = (str(s[name]) if name in s else "missing" for s in (ours, theirs))
            raise InputError(f"masked is no masked original: {name} is {here} in masked, {there} in original")


def check_order(masked: nn.Module, original: nn.Module) -> None:
    """Raises ``InputError`` where ``original`` is ``masked`` with zeros in it: they were given the other way round."""
    theirs = dict(original.named_parameters())
    pairs = [(p, theirs[name].to(p.device)) for name, p in masked.named_parameters() if name in theirs]
    gone = [(other == 0) & (own != 0) for own, other in pairs]
    same = (torch.equal(other, own.masked_fill(where, 0)) for (own, other), where in zip(pairs, gone, strict=True))
    if any(bool(where.any()) for where in gone) and all(same):
        raise InputError(
            "original is masked with more weights zeroed, not the other way round: call repair(masked, original, ...)"
        )


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter and buffer as the layers see it: under a mask, that of what is masked."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        if leaf.endswith("_mask") and f"{leaf.removesuffix('_mask')}_orig" in model.get_submodule(path)._parameters:
            continue  # torch.nn.utils.prune
        if ".parametrizations." in f".{name}":
            owner, _, slot = f".{name}".partition(".parametrizations.")
            module = model.get_submodule(owner.removeprefix("."))
            leaf = slot.split(".")[0]
            assert parametrize.is_parametrized(module, leaf)
            name, tensor = f"{owner.removeprefix('.')}.{leaf}".removeprefix("."), getattr(module, leaf)
        found[name.removesuffix("_orig")] = tuple(tensor.shape)
    return found


def _check_sizes(program: Program, batches: Sequence[Sequence[Tensor]]) -> None:
    from torch.fx.experimental.symbolic_shapes import has_free_symbols  # imports sympy

    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for number, leaves in enumerate(batches):
        for node, leaf, name in zip(placeholders, leaves, program.signature.names, strict=True):
            sizes = node.meta["val"].shape  # of those that torch found to be fixed some are symbols by type
            fits = leaf.dim() == len(sizes) and all(
                has_free_symbols(size) or size == here for size, here in zip(sizes, leaf.shape, strict=True)
            )
            if not fits or leaf.dtype != node.meta["val"].dtype:
                wanted = ", ".join("any" if has_free_symbols(size) else str(size) for size in sizes)
                raise InputError(
                    f"batch {number} does not fit: {name} is {tuple(leaf.shape)} of {leaf.dtype}, where the first "
                    f"batch asks for ({wanted}) of {node.meta['val'].dtype}"
                )

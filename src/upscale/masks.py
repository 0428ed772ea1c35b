"""Masks by name: zero channels of a captured program without touching the user's weights."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch.fx import Node

from .errors import InputError, UnknownChannelError
from .flow import Flow
from .flow.analysis import analyse
from .flow.constants import support_of
from .flow.effects import Contract, PerChannel
from .program import Program
from .segments import Port, sharing

Named = Iterable[tuple[str, int]]


def checked(name: str, pairs: Named | None) -> tuple[tuple[str, int], ...]:
    """``pairs`` as (parameter name, channel index) with everything else refused."""
    if pairs is None:
        return ()
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise InputError(f"{name} must be a list of (parameter name, channel) pairs, not {pairs!r}")
    found = []
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(
                f"{name} holds {pair!r}; write (parameter name, channel), e.g. ('layer1.0.conv1.weight', 5)"
            )
        index = pair[1]
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"{name} holds channel {index!r} of {pair[0]}; a channel is an integer")
        found.append((pair[0], index))
    return tuple(found)


def zeroed_by_name(program: Program, inputs: Named, outputs: Named) -> tuple[Program, dict[str, torch.Tensor]]:
    """The program with the named channels zeroed, and per weight where (bool, the weight's shape).

    An output channel is zeroed with its bias and the affine parameters of a batch norm that directly follows.

    Raises:
        UnknownChannelError: no layer's weight has that name, or it has no such channel.
    """
    layers = _layers(program)
    tensors: dict[str, torch.Tensor] = dict(program.tensors)
    masks: dict[str, torch.Tensor] = {}
    for side, pairs in (("input", inputs), ("output", outputs)):
        chosen: dict[str, set[int]] = defaultdict(set)
        for name, index in pairs:
            chosen[name].add(index)
        for name, channels in chosen.items():
            node = _find(layers, name)
            _zero(tensors, masks, name, node, layers[name], side, sorted(channels))
    return replace(program, tensors=tensors), masks


def _layers(program: Program) -> dict[str, tuple[Node, Contract | PerChannel]]:
    found: dict[str, tuple[Node, Contract | PerChannel]] = {}
    for node, f in analyse(program).items():
        if isinstance(f.effect, Contract):
            found[str(f.effect.weight.target)] = (node, f.effect)
        elif isinstance(f.effect, PerChannel) and f.effect.groups_arg == "groups":
            found[str(f.effect.slices[0][0].target)] = (node, f.effect)
    return found


def _find(layers: Mapping[str, tuple[Node, Contract | PerChannel]], name: str) -> Node:
    if name in layers:
        return layers[name][0]
    near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise UnknownChannelError(f"no layer's weight is called {name!r}{hint}")


def _zero(
    tensors: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
    name: str,
    node: Node,
    layer: tuple[Node, Contract | PerChannel],
    side: str,
    channels: list[int],
) -> None:
    effect, weight = layer[1], tensors[name].detach()
    # a depthwise convolution has one filter per channel, whichever way it is looked at
    groups = 1 if isinstance(effect, PerChannel) else effect.groups
    dim = 0 if isinstance(effect, PerChannel) else effect.weight_out if side == "output" else effect.weight_in
    grouped = side == "input" and groups > 1 and dim == 1
    size = 0 if dim is None else weight.shape[dim] * (groups if grouped else 1)
    for c in channels:
        if not 0 <= c < size:
            raise UnknownChannelError(f"{name} has {size} {side} channels (0 to {size - 1}); there is no channel {c}")
    mask = masks.setdefault(name, torch.zeros(weight.shape, dtype=torch.bool))
    for c in channels:
        if grouped:
            width, rows = weight.shape[1], weight.shape[0] // groups
            mask[(c // width) * rows : (c // width + 1) * rows, c % width] = True
        else:
            mask.select(dim or 0, c).fill_(True)
    tensors[name] = _replace(tensors[name], mask)
    if side == "output":
        _zero_vectors(tensors, node, effect, channels)


def _zero_vectors(
    tensors: dict[str, torch.Tensor], node: Node, effect: Contract | PerChannel, channels: list[int]
) -> None:
    vectors = [effect.bias] if isinstance(effect, Contract) else [p for p, _ in effect.slices[1:]]
    users = list(node.users)
    if len(users) == 1 and str(users[0].target) == "aten.batch_norm.default":
        vectors += [a for a in users[0].args[1:3] if isinstance(a, Node)]
    for vector in vectors:
        if vector is not None:
            old = tensors[str(vector.target)]
            mask = torch.zeros(old.shape, dtype=torch.bool)
            mask[channels] = True
            tensors[str(vector.target)] = _replace(old, mask)


def _replace(old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    new = old.detach().masked_fill(mask.to(old.device), 0.0)
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def grown(program: Program, flow: Flow) -> tuple[Program, dict[str, torch.Tensor]]:
    """Zero more columns until all readers of a shared channel agree: what one of them does not read, none does.

    A channel also goes where one of its producers writes zero. Channels that a barrier or the model output reads stay,
    and so do the columns for them: leaving those out would take a copy. Returns the program and, per weight, the zeros
    that count (bool, the weight's shape).
    """
    shared = sharing(flow)
    gone = np.zeros(len(shared.segment), dtype=bool)
    for port in shared.ports:
        # After a flatten a layer has several columns for one channel: it does not read it where it reads none of them.
        used, found = _used(program, flow, port), port.classes >= 0
        unread = np.ones(len(gone), dtype=bool)
        unread[port.classes[found & used]] = False
        gone[port.classes[found]] |= unread[port.classes[found]]
    gone &= ~shared.pinned
    tensors = dict(program.tensors)
    counted: dict[str, torch.Tensor] = {}
    for port in shared.ports:
        effect = flow.nodes[port.node].effect
        assert isinstance(effect, Contract)
        name = str(effect.weight.target)
        dim = effect.weight_in if port.side == "input" else effect.weight_out
        columns = torch.from_numpy((port.classes >= 0) & gone[port.classes])
        shape = [1] * tensors[name].ndim
        shape[dim or 0] = -1
        mask = columns.view(shape).expand(tensors[name].shape)
        if port.side == "input":
            tensors[name] = _replace(tensors[name], mask)
        before = counted.get(name, torch.zeros(mask.shape, dtype=torch.bool))
        counted[name] = before | (mask & (tensors[name] == 0).cpu())
    return replace(program, tensors=tensors), counted


def _used(program: Program, flow: Flow, port: Port) -> np.ndarray:
    """Which channels of a port its layer uses: columns, or rows and biases, that are not all zero."""
    effect = flow.nodes[port.node].effect
    assert isinstance(effect, Contract)
    support = support_of(program, effect)
    if port.side == "input":
        return np.asarray(support.used.any(0))
    constants = flow.constants[_written(port.node)]
    zero = torch.zeros(len(port.classes), dtype=torch.bool)
    if constants is not None:
        zero = constants.known & (constants.value == 0)
    return ~zero.numpy()


def _written(node: Node) -> Node:
    """The tensor a layer hands on: behind the batch norm that directly follows it, if one does."""
    users = list(node.users)
    return users[0] if len(users) == 1 and str(users[0].target) == "aten.batch_norm.default" else node

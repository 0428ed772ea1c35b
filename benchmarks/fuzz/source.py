"""Networks as source text, and the masked module that such a text makes."""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .build import NAMESPACE, Builder, fill
from .classes import needed_by
from .graph import Graph, Zero

RETURNS = {
    "tensor": "{0}",
    "tuple": "({all},)",
    "list": "[{all}]",
    "dict": "{{{named}}}",
    "nested": '{{"first": {0}, "rest": ({all}, [None, 3])}}',
    "twice": "({0}, {all})",
}


def network(builder: Builder, graph: Graph) -> str:
    """The source of ``class Net``."""
    named = ", ".join(f'"o{i}": {name}' for i, name in enumerate(graph.outputs))
    form = graph.form if graph.form != "tensor" or len(graph.outputs) == 1 else "tuple"
    value = RETURNS[form].format(graph.outputs[0], all=", ".join(graph.outputs), named=named)
    lines = [
        *needed_by("\n".join(builder.init)).splitlines(),
        "class Net(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
    ]
    lines += [f"        {line}" for line in builder.init]
    lines += ["", f"    def forward(self, {', '.join(builder.inputs)}):"]
    lines += [f"        {line}" for block in builder.body for line in block.splitlines()]
    return "\n".join([*lines, f"        return {value}", ""])


def instance(source: str, seed: int, zeros: Sequence[Zero]) -> nn.Module:
    """The network of that source in float64 and eval mode, filled with random numbers and masked."""
    namespace: dict[str, Any] = dict(NAMESPACE)
    name = f"<fuzz {seed}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for messages with lines
    exec(compile(source, name, "exec"), namespace)
    model: nn.Module = namespace["Net"]().double().eval()
    fill(model, seed)
    mask(model, zeros)
    return model


def mask(model: nn.Module, zeros: Sequence[Zero]) -> None:
    """Write zeros into parameters and buffers."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for zero in zeros:
            if zero.name in state:
                state[zero.name][_index(zero, state[zero.name].dim())] = 0


def _index(zero: Zero, rank: int) -> tuple[Any, ...]:
    """An index that meets exactly the block of ``zero``: lists that broadcast, one per dimension of the block."""
    index: list[Any] = [slice(None)] * rank
    for position, (dim, chosen) in enumerate(zero.block):
        shape = [1] * len(zero.block)
        shape[position] = -1
        index[dim] = torch.tensor(chosen).view(shape)
    return tuple(index)

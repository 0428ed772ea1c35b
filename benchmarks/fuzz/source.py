"""Networks as source text: the class that is tested, and the standalone script that repeats a failure."""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .build import NAMESPACE, Builder, fill
from .graph import Graph, Zero

RETURNS = {"tensor": "{0}", "tuple": "({all},)", "list": "[{all}]", "dict": "{{{named}}}"}


def network(builder: Builder, graph: Graph) -> str:
    """The source of ``class Net``."""
    named = ", ".join(f'"o{i}": {name}' for i, name in enumerate(graph.outputs))
    form = graph.form if graph.form != "tensor" or len(graph.outputs) == 1 else "tuple"
    value = RETURNS[form].format(graph.outputs[0], all=", ".join(graph.outputs), named=named)
    lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in builder.init]
    lines += ["", f"    def forward(self, {', '.join(builder.inputs)}):"]
    lines += [f"        {line}" for line in builder.body]
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


_SCRIPT = '''"""{title}

{diagnosis}
"""

import math
import zlib

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

import upscale


{network}

def fill(model, seed):
    """Random values, each parameter from a seed of its own name."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("_mask"):
            value = torch.ones_like(value)
        elif name.endswith("running_var"):
            value = 0.5 + value.abs()
        elif tensor.dim() > 1:
            value = value / max(1, tensor[0].numel()) ** 0.5
        else:
            value = 0.2 + 0.6 * value
        tensor.copy_(value)


def inputs(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return ({inputs})


def tensors(value):
    """The tensors of a nested output."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in tensors(part)]


def copied(value):
    return tuple(t.clone() for t in value)


torch.set_grad_enabled(False)
model = Net().double().eval()
fill(model, {seed})
state = {{**dict(model.named_parameters()), **dict(model.named_buffers())}}
{zeros}
before = {{name: tensor.clone() for name, tensor in state.items()}}
example = inputs({batch}, {example_seed})
for reads in {reads!r}:
    {export}
    for args in {trials}:
        expected, actual = tensors(model(*copied(args))), tensors(pruned(*copied(args)))
        for a, b in zip(expected, actual, strict=True):
            assert a.shape == b.shape, f"{{reads}}: shape {{tuple(a.shape)}} became {{tuple(b.shape)}}"
            error = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300)
            print(f"reads={{reads}}, batch {{len(args[0])}}: relative error {{error:.2e}}")
            assert error <= 1e-10, f"reads={{reads}}: relative error {{error:.2e}} at batch {{len(args[0])}}"
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    assert sizes[1] <= sizes[0], f"{{sizes[0]}} parameters became {{sizes[1]}}"
for name, tensor in state.items():
    assert torch.equal(tensor, before[name]), f"the export changed {{name}} of the user's model"
print("no failure")
'''


_CALL = "pruned = upscale.export(model, copied(example), reads=reads, verify={verify}{spatial})"
_CALL_OR_REFUSAL = f"""try:
        {_CALL}
    except (upscale.NothingToPruneError, upscale.ConstantOutputError) as refusal:
        print(refusal)  # not the failure that was found
        continue"""


def script(
    builder: Builder, graph: Graph, title: str, diagnosis: str, *, verify: bool, batched: bool, refused: bool
) -> str:
    """A script that needs torch and upscale only, and fails as the fuzzer saw it fail."""
    made = []
    for item in graph.inputs:
        shape = f"(batch, {''.join(f'{n}, ' for n in item.dims).rstrip(', ')})" if item.dims else "(batch,)"
        if item.vocabulary:
            made.append(f"torch.randint(0, {item.vocabulary}, {shape}, generator=generator),")
        else:
            made.append(f"torch.randn({shape}, generator=generator, dtype=torch.float64),")
    spatial = ', dynamic_shapes="spatial"' if graph.spatial else ""
    zeros = [f"state[{zero.name!r}][{_index_text(zero)}] = 0" for zero in graph.zeros]
    return _SCRIPT.format(
        title=title,
        diagnosis=diagnosis,
        network=network(builder, graph),
        inputs=" ".join(made),
        seed=graph.seed,
        zeros="\n".join(zeros),
        batch=graph.batch,
        example_seed=graph.seed + 100,
        reads=tuple(graph.reads),
        export=(_CALL if refused else _CALL_OR_REFUSAL).format(verify=verify, spatial=spatial),
        trials=f"(example, inputs({graph.other}, {graph.seed + 101}))" if batched else "(example,)",
    )


def _index_text(zero: Zero) -> str:
    """``:, [0, 2]``; blocks over several dimensions are written with lists that broadcast."""
    if len(zero.block) == 1:
        dim, chosen = zero.block[0]
        return ", ".join([*[":"] * dim, str(list(chosen))])
    last = max(dim for dim, _ in zero.block)
    text = [":"] * (last + 1)
    for position, (dim, chosen) in enumerate(zero.block):
        shape = ["1"] * len(zero.block)
        shape[position] = "-1"
        text[dim] = f"torch.tensor({list(chosen)}).view({', '.join(shape)})"
    return ", ".join(text)

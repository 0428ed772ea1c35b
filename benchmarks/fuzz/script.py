"""A failure as a script of its own: the network, its weights and zeros, the export, the comparison that fails."""

from __future__ import annotations

from collections.abc import Sequence

from .build import rebuild
from .catalogue import CATALOGUE
from .extras import other_sizes
from .graph import Graph, Input, Zero
from .source import network
from .targets import target_text
from .verdict import Verdict

_HEAD = """
import copy
import math
import zlib

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import nn

import upscale

torch.set_grad_enabled(False)


"""

_BODY = """

def masked():
    # every parameter from a seed of its own name, then the zeros
    model = Net().double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(%(seed)d + zlib.crc32(name.encode()))
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
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
%(zeros)s    return model


def inputs(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return (%(inputs)s)


def copied(args):
    return tuple(t.clone() for t in args)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (dict, list, tuple)):
        return []
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in tensors(part)]


def check(one, two, args, what):
    for a, b in zip(tensors(one(*copied(args))), tensors(two(*copied(args))), strict=True):
        assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)} became {tuple(b.shape)}"
        error = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300)
        print(f"{what}: relative error {error:.2e}")
        assert error <= 1e-10, f"{what}: relative error {error:.2e}"


model = masked()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
example = inputs(%(batch)d, %(example)d)
"""

_TAIL = """    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    assert sizes[1] <= sizes[0], f"{sizes[0]} parameters became {sizes[1]}"
for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, before[name]), f"the export changed {name} of the user's model"
print("no failure")
"""


def standalone(graph: Graph, verdict: Verdict, command: str) -> str:
    """The script that repeats a failure; it needs torch and upscale only."""
    builder, graph = rebuild(graph, CATALOGUE)
    fields = {
        "seed": graph.seed,
        "zeros": "".join(f"    state[{zero.name!r}][{_index(zero)}] = 0\n" for zero in graph.zeros),
        "inputs": _inputs(graph.inputs),
        "batch": graph.batch,
        "example": graph.seed + 100,
    }
    title = [f"{verdict.outcome}: found by `{command}`"]
    title += [line for line in (verdict.mark, *verdict.detail.splitlines()) if line]
    comment = "".join(f"# {line}\n" for line in title)
    calls = "\n".join(_calls(graph, verdict)) + "\n"
    return comment + _HEAD + network(builder, graph) + _BODY % fields + calls + _TAIL


def _calls(graph: Graph, verdict: Verdict) -> list[str]:
    """The loop over ways to read: exports, comparisons, and what else the verdict is about."""
    verify = verdict.outcome in ("wrong, verified", "false alarm") or verdict.mark.startswith("verification")
    options = f"reads=reads, target={target_text(graph.seed)}, verify={verify}" + (
        ', dynamic_shapes="spatial"' if graph.spatial else ""
    )
    call = f"upscale.export(model, copied(example), {options})"
    lines = [f"for reads in {graph.reads!r}:"]
    if verdict.outcome == "refused":
        lines.append(f"    pruned = {call}")
    else:
        lines += ["    try:", f"        pruned = {call}"]
        lines.append("    except (upscale.NothingToPruneError, upscale.ConstantOutputError) as refusal:")
        lines += ["        print(refusal)  # a refusal is not the failure that was found", "        continue"]
    lines.append(f'    check(model, pruned, example, f"reads={{reads}}, batch {graph.batch}")')
    if not any("batch size specialised" in note for note in verdict.notes):
        other = f"inputs({graph.other}, {graph.seed + 101})"
        lines.append(f'    check(model, pruned, {other}, f"reads={{reads}}, batch {graph.other}")')
    return lines + [f"    {line}" for line in _more(graph, verdict.mark, options)]


def _more(graph: Graph, mark: str, options: str) -> list[str]:
    """What else a verdict of that mark is about."""
    if mark == "in place":
        call = f"upscale.export(other, copied(example), {options}, inplace=True)"
        return ["other = masked()", f"assert {call} is other", 'check(model, other, example, "in place")']
    if mark == "at another size":
        make = f"generator, batch = torch.Generator().manual_seed({graph.seed + 102}), {graph.batch}"
        return [make, f'check(model, pruned, ({_inputs(other_sizes(graph))}), "at another size")']
    if mark.startswith("a deep copy"):
        return ['check(pruned, copy.deepcopy(pruned), example, "a deep copy")']
    if "exported" in mark and "again" in mark:
        again = "again = upscale.export(pruned, copied(example), verify=False)"
        return [again, 'check(pruned, again, example, "exported again")']
    if mark.startswith("state_dict"):
        return ["new = set(pruned.state_dict()) - set(model.state_dict())", 'assert not new, f"new keys: {new}"']
    return []


def _inputs(inputs: Sequence[Input]) -> str:
    made = []
    for item in inputs:
        shape = f"({', '.join(['batch', *map(str, item.dims)])}{'' if item.dims else ','})"
        if item.vocabulary:
            made.append(f"torch.randint(0, {item.vocabulary}, {shape}, generator=generator),")
        else:
            made.append(f"torch.randn({shape}, generator=generator, dtype=torch.float64),")
    return " ".join(made)


def _index(zero: Zero) -> str:
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

"""What tests of saving share: architectures built anew with other weights, and exact comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import upscale
from support.oracle import leaves


@torch.no_grad()
def scrambled(model: nn.Module, seed: int = 7) -> Any:
    """``model`` with other weights and statistics, as a process finds it that never saw the trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nested outputs are equal in structure and in every bit, NaN being NaN."""
    left, right = list(leaves(a)), list(leaves(b))
    if [path for path, _ in left] != [path for path, _ in right]:
        return False
    return all(_same(x, y) for (_, x), (_, y) in zip(left, right, strict=True))


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, torch.Tensor):
        return bool(x == y)
    return x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@torch.no_grad()
def round_trip(pruned: nn.Module, fresh: nn.Module, path: Path, *inputs: Any, **kwargs: Any) -> Any:
    """Save, load into ``fresh``, and compare: outputs bit by bit, state dict, report, plan. Returns what was loaded."""
    upscale.save(pruned, path)
    loaded = upscale.load(path, fresh)
    assert same_bits(pruned(*inputs, **kwargs), loaded(*inputs, **kwargs))
    loaded.load_state_dict(pruned.state_dict(), strict=True)
    pruned.load_state_dict(loaded.state_dict(), strict=True)
    assert loaded.report == pruned.report and loaded.report.plan == pruned.report.plan
    assert str(loaded.report) == str(pruned.report)
    count = sum(leaf.numel() for leaf in pytree.tree_leaves(list(loaded.parameters())))
    assert count == sum(leaf.numel() for leaf in pytree.tree_leaves(list(pruned.parameters())))
    return loaded

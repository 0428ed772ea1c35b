"""Budgets of whole networks, met by the exported model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import upscale
from support.vision import torchvision


def flops(model: torch.nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def size(model: torch.nn.Module, _: torch.Tensor) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("resnet50", flops), ("mobilenet_v2", size)])
def test_budgets_of_whole_networks(name: str, count: object) -> None:
    what = "flops" if count is flops else "params"
    assert callable(count)
    x = torch.rand(2, 3, 64, 64)
    for left in (0.8, 0.5, 0.3):
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        total = count(model, x)
        upscale.MaskingManager(model, example_inputs=x).mask(**{what: left})
        pruned = upscale.export(model, (x,), verify=False)
        assert count(pruned, x) == pytest.approx(left * total, rel=0.01)

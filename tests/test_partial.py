"""Additions of operands with zero channels: what is zero on one side is neither computed nor added."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, fingerprint, randomise
from upscale.plan import Plan


class Sum(nn.Module):
    """Two branches of convolution and batch norm on one sum, and a reader of it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(3, width, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x))))


def zero_rows(conv: nn.Module, norm: nn.Module, rows: list[int]) -> None:
    """Output channels that are zero behind the batch norm too."""
    with torch.no_grad():
        for tensor in (conv.weight, conv.bias, norm.weight, norm.bias):
            tensor[rows] = 0


def image() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, reads: str = "auto") -> nn.Module:
    before = fingerprint(model)
    pruned = upscale.export(model, (image(),), reads=reads)  # type: ignore[arg-type]
    assert fingerprint(model) == before
    check_equal(model, pruned, image(), batches=(1, 3))
    return pruned


@pytest.mark.parametrize("reads", ["auto", "gather", "baseline"])
@pytest.mark.parametrize("rows", [[1, 4, 5, 9], [0, 1, 2, 3], [12, 13, 14, 15], [6, 7]])
def test_a_row_that_is_zero_on_one_side_is_gone(rows: list[int], reads: str) -> None:
    model = randomise(Sum().double().eval(), seed=1)
    zero_rows(model.a, model.norm_a, rows)
    pruned = exported(model, reads)
    assert pruned.a.out_channels == pruned.norm_a.num_features == 16 - len(rows)
    assert (pruned.b.out_channels, pruned.head.in_channels) == (16, 16)


@pytest.mark.parametrize("rows", [[1, 4, 5, 9], [0, 1, 2, 3]])
def test_parts_of_channels_last_sums_stay_channels_last(rows: list[int]) -> None:
    model = randomise(Sum().double().eval(), seed=1).to(memory_format=torch.channels_last)
    zero_rows(model.a, model.norm_a, rows)
    x = image().contiguous(memory_format=torch.channels_last)
    pruned = upscale.export(model, (x,))
    assert pruned.a.out_channels == 16 - len(rows)
    check_equal(model, pruned, x, batches=(1, 3))
    seen = []
    pruned.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    pruned(x)
    assert [strides[1] for strides in seen] == [1]


def test_both_sides_and_the_reader_have_masks_of_their_own() -> None:
    model = randomise(Sum().double().eval(), seed=2)
    zero_rows(model.a, model.norm_a, [0, 3, 7, 8, 9])
    zero_rows(model.b, model.norm_b, [3, 11])
    with torch.no_grad():
        model.head.weight[:, [2, 5]] = 0
    pruned = exported(model)
    assert pruned.head.in_channels == 13  # 2 and 5 are not read, 3 is zero on both sides
    assert pruned.a.out_channels == 16 - 2 - 5


def test_a_single_zero_among_many_is_not_worth_it() -> None:
    model = randomise(Sum(64).double().eval(), seed=3)
    zero_rows(model.a, model.norm_a, [5])
    pruned = exported(model)
    assert pruned.a.out_channels == 64


def test_a_chain_of_sums_keeps_its_gradients() -> None:
    """Training goes on: the parts get gradients, and an in-place activation behind a sum does not write into them."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 1)
            self.blocks = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
            self.act, self.head = nn.ReLU(inplace=True), nn.Conv2d(12, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = self.act(x + block(x))
            return self.head(x)

    model = randomise(Chain().double().eval(), seed=4)
    with torch.no_grad():
        for place, block in enumerate(model.blocks):
            block.weight[place : place + 4] = 0
            block.bias[place : place + 4] = 0
    pruned = exported(model)
    assert [block.out_channels for block in pruned.blocks] == [8, 8, 8]
    pruned.train()
    pruned(image()).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in pruned.parameters())
    again = torch.export.export(pruned.eval(), (image(),)).module()
    torch.testing.assert_close(again(image()), model(image()))


def test_the_plan_says_what_joins_and_survives_json() -> None:
    model = randomise(Sum().double().eval(), seed=5)
    zero_rows(model.a, model.norm_a, [0, 1, 5])
    plan = exported(model).report.plan
    ((operands,),) = [tuple(by_operand.values()) for by_operand in plan.partial.values()]
    assert len(operands) == 13
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

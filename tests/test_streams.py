"""Residual streams whose channels die early: later sums and branches are computed for the living only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, randomise


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.outer(torch.relu(self.inner(x)))))


class Stream(nn.Module):
    """Blocks on one stream, and a last reader of it."""

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Conv2d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@torch.no_grad()
def masked(gone: list[list[int]], head: list[int]) -> nn.Module:
    model = randomise(Stream(len(gone)).double().eval())
    for block, channels in zip(model.blocks, gone, strict=True):
        block.inner.weight[:, channels] = 0
    model.head.weight[:, head] = 0
    return model


IMAGE = torch.randn(2, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
EVEN, ODD = list(range(0, 32, 2)), list(range(1, 32, 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_channel_that_nobody_reads_any_more_is_not_carried_on(memory_format: torch.memory_format) -> None:
    """The first reader wants 0-23, the second 0-15, the last 0-7: the stream shrinks from 32 to 24 to 16 to 8."""
    model = masked([list(range(24, 32)), list(range(16, 32)), []], list(range(8, 32)))
    with torch.no_grad():
        model.blocks[2].inner.weight[:, 12:] = 0
    model = model.to(memory_format=memory_format)
    x = IMAGE.contiguous(memory_format=memory_format)
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x)
    assert [block.outer.out_channels for block in pruned.blocks] == [16, 12, 8]
    assert [block.norm.num_features for block in pruned.blocks] == [16, 12, 8]
    assert pruned.stem.out_channels == 24
    assert set(pruned.report.reads) == {"whole", "view"}


def test_what_is_read_late_is_kept_from_the_start() -> None:
    """Each reader wants channels of its own: only what no later one wants can go."""
    model = masked([EVEN, ODD, []], EVEN)
    with torch.no_grad():
        model.blocks[2].inner.weight[:, EVEN] = 0
    pruned = upscale.export(model, (IMAGE,))
    check_equal(model, pruned, IMAGE)
    # block 0 reads odd ones, block 1 even ones, block 2 and the head odd ones
    assert [block.outer.out_channels for block in pruned.blocks] == [32, 16, 16]


def test_a_single_channel_is_not_worth_a_copy() -> None:
    """Small images: a gather costs more than the row that it saves."""
    model = masked([[], []], [3])
    with torch.no_grad():
        model.blocks[1].inner.weight[:, [5, 9, 12]] = 0
    small = IMAGE[:, :, :3, :3]
    pruned = upscale.export(model, (small,))
    check_equal(model, pruned, small)
    assert pruned.blocks[1].outer.out_channels == 32


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_on_both_sides(seed: int) -> None:
    model = masked([[], [], [], []], [])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            block.inner.weight[:, torch.randperm(32, generator=generator)[:16]] = 0
            rows = torch.randperm(32, generator=generator)[:6]
            for tensor in (block.outer.weight, block.outer.bias, block.norm.weight, block.norm.bias):
                tensor[rows] = 0
        model.head.weight[:, torch.randperm(32, generator=generator)[:20]] = 0
    pruned = upscale.export(model, (IMAGE,))
    check_equal(model, pruned, IMAGE)
    assert pruned.blocks[3].outer.out_channels <= 12
    gathered = upscale.export(model, (IMAGE,), reads="gather")
    check_equal(model, gathered, IMAGE)
    assert sum(p.numel() for p in pruned.parameters()) <= sum(p.numel() for p in gathered.parameters())

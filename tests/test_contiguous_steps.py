"""Contiguous masks in several steps: inside those of the step before, in its order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, randomise
from upscale import MaskingManager
from upscale.contiguous import Arrangement, Chain, Piece, Reader, Space, arrange, narrowed

IMAGE = torch.rand(2, 3, 12, 12, dtype=torch.float64)


class Stream(nn.Module):
    """Four convolutions read one stream, and one its concatenation with another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.branch = nn.ModuleList(nn.Conv2d(24, 8, 3, padding=1) for _ in range(4))
        self.joined, self.head = nn.Conv2d(36, 16, 3, padding=1), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.stem(x).relu(), self.other(x).relu()
        found = [branch(y).relu() for branch in self.branch] + [self.joined(torch.cat([y, z], 1)).relu()]
        return self.head(torch.cat(found, 1).mean((2, 3)))


def made() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Stream().double().eval())


def zero_columns(model: nn.Module) -> dict[str, Tensor]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: (m.weight.detach().transpose(0, 1).flatten(1) == 0).all(1) for n, m in layers.items()}


@pytest.mark.parametrize(
    ("call", "is_global"), [({"amount": 0.6}, False), ({"amount": 0.6}, True), ({"params": 0.5}, False)]
)
def test_every_step_masks_what_the_one_before_did_and_reads_stay_contiguous(
    call: dict[str, float], is_global: bool
) -> None:
    model = made()
    seen: list[dict[str, Tensor]] = []

    def score(weight: Tensor) -> Tensor:
        seen.append(zero_columns(model))
        return weight.abs()

    manager = MaskingManager(model, method="contiguous", is_global=is_global, example_inputs=IMAGE)
    manager.importance(score).mask(**call, steps=3)
    final = zero_columns(model)
    assert any(gone.any() for gone in seen[-1].values()), "the last scores saw no zeros of the steps before"
    for name, mask in manager.masks.items():
        assert torch.equal(~mask, final[name]), f"{name}: the mask and the weights disagree"
        assert not mask[seen[-1][name]].any(), f"{name}: a masked channel came back"
    pruned = upscale.export(model, (IMAGE,))
    assert not {"gather", "collect"} & set(pruned.report.reads)
    check_equal(model, pruned, IMAGE, batches=(1, 3))


def test_a_second_call_of_mask_starts_afresh() -> None:
    one, two = made(), made()
    manager = MaskingManager(one, method="contiguous", example_inputs=IMAGE).mask(0.3, steps=2, permanent=False)
    manager.mask(0.25, permanent=False)
    other = MaskingManager(two, method="contiguous", example_inputs=IMAGE).mask(0.25)
    assert all(torch.equal(mask, other.masks[name]) for name, mask in manager.masks.items())


def space(generator: np.random.Generator, keeps: tuple[int, ...], size: int = 9) -> Space:
    sees = np.ones(size, dtype=bool)
    readers = tuple(
        Reader((Piece(0, generator.random(size), sees), Piece(1, generator.random(size), sees)), k) for k in keeps
    )
    chain = Chain((np.arange(size),), np.zeros(size, dtype=bool))
    return Space((chain, chain), readers)


def best(scores: list[np.ndarray], keep: int) -> float:
    """The most that one window of each of two lists retains, together of size ``keep``: all are tried."""
    values = []
    for k in range(keep + 1):
        if k <= len(scores[0]) and keep - k <= len(scores[1]):
            windows = [
                max((s[i : i + n].sum() for i in range(len(s) - n + 1)), default=0.0)
                for s, n in zip(scores, (k, keep - k), strict=True)
            ]
            values.append(float(sum(windows)))
    return max(values)


@pytest.mark.parametrize("seed", range(5))
def test_narrowed_intervals_are_the_best_inside_the_earlier_ones(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first = space(generator, (12, 9, 14))
    second = space(generator, (7, 9, 3))
    earlier = arrange(first)
    found: Arrangement = narrowed(second, earlier)
    for number, reader in enumerate(second.readers):
        inside, kept = earlier.kept(first, number), found.kept(second, number)
        assert sum(map(len, kept)) == reader.keep
        assert all(set(k.tolist()) <= set(i.tolist()) for k, i in zip(kept, inside, strict=True))
        scores: list[Any] = [p.scores[i] for p, i in zip(reader.pieces, inside, strict=True)]
        assert found.retained[number] == pytest.approx(best(scores, reader.keep))

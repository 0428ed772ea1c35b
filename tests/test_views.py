"""What a step of the fit of blocks shows of images, and that it is no larger than the network allows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import upscale
from upscale.repairing import blockwise
from upscale.repairing.pair import capture_pair, collect
from upscale.repairing.views import View, shown, views_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_small_images_are_moved_by_whole_pixels_each_on_its_own(dtype: torch.dtype) -> None:
    images = torch.rand(8, 2, 32, 24, dtype=torch.float64).to(dtype)
    moved = shown(images, views_of(images)[-1], torch.Generator().manual_seed(0))
    assert moved.dtype == dtype and moved.shape == images.shape
    inner = moved[:, :, 4:28, 3:21]
    seen = set()
    for before, after in zip(images, inner, strict=True):
        found = [
            (turned, down, right)
            for turned in (False, True)
            for down in range(-4, 5)
            for right in range(-3, 4)
            for part in [(before.flip(2) if turned else before)[:, 4 + down : 28 + down, 3 + right : 21 + right]]
            if torch.allclose(part, after, rtol=1e-6, atol=1e-6)
        ]
        assert len(found) == 1, "mirrored or not, and shifted"
        seen.add(found[0])
    assert len(seen) > 4 and len({turned for turned, _, _ in seen}) == 2


def test_parts_of_large_images_are_enlarged() -> None:
    """Of an image whose values are its places, what is shown spans six to ten tenths of each side."""
    place = torch.linspace(0, 1, 80, dtype=torch.float64)
    images = torch.stack(torch.meshgrid(place, place, indexing="ij")).expand(32, 2, 80, 80)
    moved = shown(images, views_of(images)[-1], torch.Generator().manual_seed(0))
    inner = moved[:, :, 20:60, 20:60]  # no edge is seen in there
    spans = (inner.amax((2, 3)) - inner.amin((2, 3))) / (place[59] - place[20])
    torch.testing.assert_close(spans[:, 0], spans[:, 1], rtol=1e-6, atol=1e-6)
    assert 0.58 < float(spans.min()) < 0.7 and 0.9 < float(spans.max()) < 1.01


def test_views_of_large_images_are_smaller_and_hold_parts_of_all_of_them() -> None:
    place = torch.linspace(-1, 1, 224, dtype=torch.float64)
    images = torch.stack(torch.meshgrid(place, place, indexing="ij")).expand(64, 2, 224, 224)
    small = views_of(images)[0]
    seen = shown(images, small, torch.Generator().manual_seed(0))
    assert seen.shape == (64, 2, 160, 160) and seen.is_contiguous(memory_format=torch.channels_last)
    spans = seen.amax((2, 3)) - seen.amin((2, 3))
    assert 1.15 < float(spans.min()) < 1.4 and 1.8 < float(spans.max()) <= 2
    centres = (seen.amax((2, 3)) + seen.amin((2, 3))) / 2
    assert float(centres.min()) < -0.2 and float(centres.max()) > 0.2
    turned = seen[:, 1, 80, 0] > seen[:, 1, 80, -1]
    assert 0.2 < float(turned.double().mean()) < 0.8, "mirrored or not"
    assert bool((seen[:, 0, 0, 80] < seen[:, 0, -1, 80]).all()), "never upside down"


@pytest.mark.parametrize("size", [(32, 32), (127, 400)])
def test_views_of_small_images_are_as_large(size: tuple[int, int]) -> None:
    assert views_of(torch.zeros(2, 3, *size)) == [View(size)]


class Net(nn.Module):
    """Between two convolutions it does as it is told."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.last = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 6, 3, 4, 1), nn.Linear(6, 5)
        self.place = nn.Parameter(torch.zeros(1, 8, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x))
        if self.kind == "view":
            y = y.view(y.shape[0], 8, -1).view(y.shape[0], 8, y.shape[2], y.shape[3])
        if self.kind == "place":
            y = y + self.place
        y = self.two(y)
        if self.kind == "tokens":
            return self.last(y.flatten(2).mT)
        if self.kind == "strided":  # a view that wants channels in front, whatever the size
            return self.last(y.view(y.shape[0], -1).mean(1, keepdim=True).expand(-1, 6))
        return self.last(y.mean((2, 3)))


def fit_of(model: nn.Module, x: Tensor) -> blockwise._Fit:
    masked = copy.deepcopy(model)
    inputs = collect(masked, x.split(8))
    pair = capture_pair(masked, model, inputs)
    return blockwise._Fit(pair, inputs, blockwise._parameters(pair, masked), blockwise._ends(pair.masked))


@pytest.mark.parametrize(
    ("kind", "size", "layout"),
    [
        ("any", (96, 96), torch.channels_last),
        ("strided", (96, 96), torch.contiguous_format),
        ("place", (128, 128), torch.contiguous_format),
        ("view", (128, 128), torch.contiguous_format),
        ("tokens", (128, 128), torch.contiguous_format),
    ],
)
def test_views_are_as_small_as_a_network_allows(kind: str, size: tuple[int, int], layout: torch.memory_format) -> None:
    """``place`` and ``view`` have the size in them; ``tokens`` runs at another, but writes another number of them."""
    fit = fit_of(Net(kind).eval(), torch.rand(16, 3, 128, 128))
    assert fit._view == View(size, layout)


def test_what_is_fitted_on_small_views_is_closer_on_whole_images() -> None:
    torch.manual_seed(0)
    model, x = Net("any").eval(), torch.rand(32, 3, 1, 1) * torch.randn(32, 3, 128, 128)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.two.weight[:, :6] = 0
    ridge = upscale.repair(masked, model, x.split(8), progress=False).repair_report.outputs[1]
    fitted = upscale.repair(masked, model, x.split(8), method="blockwise", steps=100, progress=False)
    assert fitted.repair_report.outputs[1] < ridge

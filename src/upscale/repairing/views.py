"""What a step of the fit of blocks shows of images: mirrored or not, shifted, and of large ones a part.

The original network says what is right for each view, so no label has to survive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["View", "are_images", "are_large", "shown", "views_of"]

_LARGE = 64  # pixels of the shorter side from which on images are large
_SHIFT = 8  # small images move by an eighth of their size at most
_WINDOW, _STEP = 0.75, 32  # such a part of each side is the size of a view, in steps of so many pixels
_PART = 0.6  # the least part of each side of a large image that is shown


@dataclass(frozen=True)
class View:
    """``size``: height and width that are shown; ``layout``: how they lie in memory."""

    size: tuple[int, int]
    layout: torch.memory_format = torch.contiguous_format


def are_images(leaves: Sequence[Tensor]) -> bool:
    """Whether a batch of images is all that the model reads."""
    return len(leaves) == 1 and leaves[0].dim() == 4 and leaves[0].is_floating_point()


def are_large(images: Tensor) -> bool:
    return min(images.shape[2:]) >= _LARGE


def views_of(images: Tensor) -> list[View]:
    """Those to try, the cheapest first; the last is as large as the images. A network may demand a size, and a
    ``view`` in it a layout."""
    height, width = images.shape[2:]
    whole = View((height, width))
    if min(height, width) < 2 * _LARGE:
        return [whole]
    small = int(_WINDOW * height) // _STEP * _STEP, int(_WINDOW * width) // _STEP * _STEP
    return [View(small, torch.channels_last), View(small), whole]


def shown(images: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and a part of it: small ones shifted by whole pixels, of large ones from ``_PART``
    to all of each side, at any place, scaled to the size of the view."""
    count, size, large = len(images), images.shape[2:], are_large(images)
    turned = 1.0 - 2.0 * torch.randint(2, (count,), generator=generator)
    side = 1 - torch.rand(count, generator=generator) * (1 - _PART if large else 0)
    still, rows = torch.zeros_like(side), []
    for axis in (1, 0):  # across, then down
        room = 1 - side + (0 if large else 2 * (size[axis] // _SHIFT) / size[axis])  # in halves of the size
        away = room * (2 * torch.rand(count, generator=generator) - 1)
        scales = (side * turned, still) if axis == 1 else (still, side)
        rows.append(torch.stack([*scales, 2 / size[axis] * (away * size[axis] / 2).round()], 1))
    exact = images.to(torch.promote_types(images.dtype, torch.float32))
    grid = F.affine_grid(torch.stack(rows, 1).to(exact), [count, images.shape[1], *view.size], align_corners=False)
    moved = F.grid_sample(exact, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return moved.to(images.dtype).contiguous(memory_format=view.layout)

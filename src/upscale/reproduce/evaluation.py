"""Networks on images: top-1, and the scores of channels that images are needed for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import upscale

from ..importance import Heuristic
from .images import DataError, Images

__all__ = ["FROM_IMAGES", "accuracy", "batches_of", "check_outputs"]

_PIXELS = 1 << 19  # of the images of one batch, and of those that ranks of feature maps are taken of
_BATCH = 100  # images, at most


def check_outputs(model: nn.Module, images: Images) -> None:
    """Raises ``DataError`` where a model does not give one class for each label there is, at least."""
    with torch.no_grad():
        scores = model(images.batch(range(1)))
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        raise DataError(f"{type(model).__name__} must return one tensor of (images, classes), to be evaluated")
    if int(images.labels.max()) >= scores.shape[1]:
        raise DataError(
            f"the data has {int(images.labels.max()) + 1} classes, {type(model).__name__} only {scores.shape[1]}"
        )


def accuracy(model: nn.Module, images: Images) -> float:
    """Top-1 in percent."""
    size, right = _size(images), 0
    with torch.inference_mode():
        for at in range(0, len(images), size):
            some = range(at, min(at + size, len(images)))
            right += int((model(images.batch(some)).argmax(1) == images.labels[some.start : some.stop]).sum())
    return 100 * right / len(images)


def _size(images: Images) -> int:
    return max(1, min(_BATCH, _PIXELS // images.view.size**2))


def batches_of(images: Images) -> list[Tensor]:
    """The images, all normalised now, in batches of a size that fits their own."""
    size = _size(images)
    return [images.batch(range(at, min(at + size, len(images)))) for at in range(0, len(images), size)]


def _ranks(images: Images) -> Heuristic:
    few = max(4, _PIXELS // images.view.size**2)
    return upscale.HRank(batches_of(images.first(few)))


#: Scores that need images, by name.
FROM_IMAGES: Mapping[str, Callable[[Images], Heuristic]] = {
    "hrank": _ranks,
    "activation": lambda images: upscale.ActivationMagnitude(batches_of(images)),
    "obs": lambda images: upscale.OBS(batches_of(images)),
}

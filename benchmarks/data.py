"""Test images, normalised as the networks were trained on them, and top-1 accuracy."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from .nets import NETS, shared

__all__ = ["Images", "predictions", "test_set", "top1"]

_NORMALISATIONS = {
    "A": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "B": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
}


class Images:
    """Labelled images, decoded and normalised batch by batch."""

    def __init__(self, pixels: Callable[[int], np.ndarray], labels: Tensor, normalisation: str) -> None:
        self.labels = labels
        self._pixels = pixels
        mean, std = _NORMALISATIONS[normalisation]
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Images ``indices`` as float32 of shape (len(indices), 3, height, width), contiguous."""
        pixels = torch.from_numpy(np.stack([self._pixels(i) for i in indices]))
        # In memory the images are channels-last; convolutions would carry that layout on.
        images = pixels.permute(0, 3, 1, 2).contiguous()
        return (images.float() / 255 - self._mean) / self._std

    def first(self, count: int) -> Images:
        """The first ``count`` images: of CIFAR-10 class-balanced where it is a multiple of ten."""
        return self.of(range(min(count, len(self))))

    def of(self, chosen: Sequence[int]) -> Images:
        """The images ``chosen``, in that order."""
        part = object.__new__(Images)
        part.__dict__.update(self.__dict__)
        part.labels = self.labels[list(chosen)]
        part._pixels = lambda i: self._pixels(chosen[i])
        return part


def test_set(name: str) -> Images:
    """The whole test set of ``NETS[name]``: 10,000 CIFAR-10 or 1,000 ImageNet images."""
    net = NETS[name]
    if net.dataset == "cifar10":
        with np.load(shared() / "data" / "cifar10.npz", allow_pickle=False) as file:
            images, labels = file["test_images"], file["test_labels"]
        return Images(images.__getitem__, torch.from_numpy(labels), net.normalisation)
    with np.load(shared() / "data" / "imagenet_sample.npz", allow_pickle=False) as file:
        jpeg, offsets, labels = file["jpeg"], file["offsets"], file["labels"]
    return Images(lambda i: _decoded(jpeg[offsets[i] : offsets[i + 1]]), torch.from_numpy(labels), net.normalisation)


test_set.__test__ = False  # type: ignore[attr-defined] # a name that pytest would collect


def predictions(
    model: Callable[[Tensor], Tensor], images: Images, *, batch: int = 50, title: str = "", quiet: bool = False
) -> Tensor:
    """The class that ``model`` gives each image (int64), with a progress bar unless ``quiet``.

    Batches go to as many Python threads as there are cores; each should use one thread of torch's own
    (``torch.set_num_threads(1)``), which then never wait for each other.
    """

    @torch.no_grad()
    def classes(start: int) -> Tensor:
        found = model(images.batch(range(start, min(start + batch, len(images))))).argmax(1)
        progress.advance(task, len(found))
        return found

    with Progress(disable=quiet, transient=True) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task(title or "top-1", total=len(images))
        return torch.cat(list(pool.map(classes, range(0, len(images), batch))))


def top1(predicted: Tensor, images: Images) -> float:
    """Percent of ``predicted`` that are right."""
    return 100 * (predicted == images.labels).double().mean().item()


def _decoded(jpeg: np.ndarray) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg.tobytes())) as image:
        return np.asarray(image.convert("RGB"))

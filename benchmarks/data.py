"""Test images, normalised as the networks were trained on them, and top-1 accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.progress import Progress
from torch import Tensor

from upscale.reproduce.images import Images, load_dataset

from .nets import NETS, shared

__all__ = ["Images", "predictions", "test_set", "top1"]


def test_set(name: str) -> Images:
    """The whole test set of ``NETS[name]``: 10,000 CIFAR-10 or 1,000 ImageNet images."""
    recipe = NETS[name].recipe
    return load_dataset(shared() / "data", recipe.data, recipe.view).test


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

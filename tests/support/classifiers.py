"""Small classifiers of 16 x 16 images for the tests of ``upscale reproduce``."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CLASSES = 4


class Residual(nn.Module):
    """Two readers of one stream, so that methods differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, 1, 1)
        self.last = nn.Conv2d(16, 24, 3, 2, 1)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.inner(x))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def write_files(folder: Path, count: int) -> None:
    """``w.safetensors``, weights of :class:`Residual`, and ``d.npz``, so many images with labels in turn."""
    torch.manual_seed(1)
    save_file(Residual().state_dict(), folder / "w.safetensors")
    np.savez(folder / "d.npz", images=drawn_images(count), labels=np.arange(count) % CLASSES)


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Work in a folder with :func:`write_files`, where commands find this module by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    monkeypatch.chdir(folder)
    write_files(folder, count)


def drawn_images(count: int) -> np.ndarray:
    """Noise on a colour for each, uint8 (count, 16, 16, 3)."""
    draw = np.random.default_rng(0)
    return (draw.integers(0, 100, (count, 16, 16, 3)) + draw.integers(0, 156, (count, 1, 1, 3))).astype(np.uint8)


def residual() -> nn.Module:
    return Residual()


def dying() -> nn.Module:
    """Ends a worker at once, as the kernel does when memory runs out."""
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return Residual()


def sleeping() -> nn.Module:
    """Keeps a worker for ever."""
    if multiprocessing.parent_process() is not None:
        time.sleep(1000)
    return Residual()


def features() -> nn.Module:
    """Not a classifier: returns images."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1))

"""Builders that the tests of ``upscale bench`` name: small, and with readers that want different channels."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A stem, three readers of it, and a head on the concatenation of two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.a, self.b, self.c = (nn.Conv2d(16, 8, 1) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        joined = torch.cat([self.a(x) + self.c(x), self.b(x)], 1)
        return self.head(joined.mean((2, 3)))


def small() -> nn.Module:
    return Small()


class Named(nn.Module):
    """Called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(image) * scale}


def broken() -> nn.Module:
    raise RuntimeError("this model cannot be built")


def sleeping() -> nn.Module:
    time.sleep(120)
    return Small()

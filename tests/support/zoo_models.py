"""Builders that a suite file of the tests names: one model that works, and every way not to."""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn


def good() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )


class Tagger(nn.Module):
    """Tokens in by name, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.relu(self.hidden(self.embedding(tokens))) * mask.unsqueeze(-1)
        return {"tags": self.head(hidden)}


class Branching(nn.Module):
    """Control flow that depends on the data: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = good()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if bool(x.sum() > 0) else -self.net(x)


class Silent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0


def silent() -> nn.Module:
    return Silent()


class Deaf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e-9 + 1


def deaf() -> nn.Module:
    return Deaf()


def unmasked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())


def broken() -> nn.Module:
    raise RuntimeError("this model cannot be built\nand this line is not shown")


def no_module() -> int:
    return 3


def sleeping() -> nn.Module:
    time.sleep(120)
    return good()


def hungry() -> nn.Module:
    kept = [torch.ones(2**24) for _ in range(40)]  # 2.5 GB, and then some time to be seen in
    time.sleep(120)
    del kept
    return good()


def crashing() -> nn.Module:
    os.kill(os.getpid(), signal.SIGSEGV)
    return good()

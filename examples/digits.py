"""What the examples share: a small residual network on scikit-learn's digits, and an ordinary training loop."""

from __future__ import annotations

import torch
from torch import nn

from demo.demo import DigitNet, Digits, accuracy, load_digits

__all__ = ["DigitNet", "Digits", "accuracy", "calibration", "load_digits", "train", "trained"]


def train(model: nn.Module, data: Digits, epochs: int, rate: float) -> list[float]:
    """Train with AdamW on a one-cycle schedule, batches of 64. Returns the mean loss of each epoch."""
    steps = -(-len(data.labels) // 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * steps)
    shuffle = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(data.labels), generator=shuffle).split(64):
            loss = nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
    model.eval()
    return losses


def trained(data: Digits, epochs: int = 4, width: int = 16) -> DigitNet:
    """The network before pruning."""
    torch.manual_seed(0)
    model = DigitNet(width)
    train(model, data, epochs, 4e-3)
    return model


def calibration(data: Digits) -> list[torch.Tensor]:
    """Batches without labels."""
    return list(data.images[:512].split(64))

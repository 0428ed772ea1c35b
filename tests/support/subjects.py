"""A few small networks with masks that many tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.masks import Mask
from support.oracle import randomise


class Block(nn.Module):
    """A basic residual block with an optional strided shortcut."""

    def __init__(self, c: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or c != out:
            self.downsample = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions around a shortcut."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class SmallResNet(nn.Module):
    """A residual network of torchvision's layout: ``layer1[0].conv1`` is a layer."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(width, width), Block(width, width))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        """A custom method."""
        return self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.fc(self.dropout(torch.flatten(self.avgpool(self.features(x)), 1)))


def image(batch: int = 2, size: int = 12, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random image of shape (batch, 3, size, size)."""
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def dense(model: nn.Module, seed: int = 0) -> Any:
    """``model`` in float64 and eval mode with everything random and nothing masked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 / fan_in) ** 0.5)
    return randomise(model.double().eval(), seed)


def masked(model: nn.Module | None = None, kind: str = "input", amount: float = 0.5, seed: int = 0) -> Any:
    """The same with zeros; a :class:`SmallResNet` unless a model is given."""
    model = dense(model if model is not None else SmallResNet(), seed)
    Mask(kind, amount, seed).apply(model, (image(),) if kind.endswith("_bn") else ())
    return model

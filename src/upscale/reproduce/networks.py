"""The CIFAR-10 networks of the accuracy table: ResNets (He et al. 2016, arXiv 1512.03385, section 4.2) and DenseNet-BC
(Huang et al. 2017, arXiv 1608.06993), with the parameter names of the published weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DenseNet40", "ResNetCifar"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters: every second pixel, zeros for new channels."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.new_channels = width - width_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            side = self.new_channels // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(out + x)


class ResNetCifar(nn.Module):
    """He et al.'s CIFAR ResNet: three stages of widths 16, 32, 64 on 32x32 images; ``blocks`` a stage."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(width_in, width, stride)
        return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 to ``4 * growth``; norm, ReLU, 3x3 to ``growth``; the result joins the input."""

    def __init__(self, width_in: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out)))], 1)


class DenseBlock(nn.Module):
    def __init__(self, width_in: int, layers: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(DenseLayer(width_in + i * growth, growth) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 to half the channels, and half the size."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet40(nn.Module):
    """DenseNet-BC of depth 40, growth 12 and reduction 0.5 for 32x32 images."""

    def __init__(self, classes: int = 10, growth: int = 12) -> None:
        super().__init__()
        layers, width = 6, 2 * growth
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.block1 = DenseBlock(width, layers, growth)
        width += layers * growth
        self.trans1 = Transition(width, width // 2)
        self.block2 = DenseBlock(width // 2, layers, growth)
        width = width // 2 + layers * growth
        self.trans2 = Transition(width, width // 2)
        self.block3 = DenseBlock(width // 2, layers, growth)
        width = width // 2 + layers * growth
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.block3(self.trans2(self.block2(x)))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))

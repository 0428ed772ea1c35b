"""Small parts that the random networks are made of: layers by number of dimensions, activations, norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Kit:
    """Layers for ``ndim`` spatial dimensions (1, 2 or 3)."""

    def __init__(self, ndim: int) -> None:
        self.ndim = ndim
        self.spatial = tuple(range(2, 2 + ndim))

    def make(self, stem: str, *args: Any, **options: Any) -> Any:
        """``nn.<stem><ndim>d(*args, **options)``."""
        return getattr(nn, f"{stem}{self.ndim}d")(*args, **options)

    def conv(self, c: int, out: int, kernel: int = 3, **options: Any) -> Any:
        """A convolution that keeps the size unless told otherwise."""
        options.setdefault("padding", options.get("dilation", 1) * (kernel // 2))
        return self.make("Conv", c, out, kernel, **options)

    def bn(self, c: int, **options: Any) -> Any:
        """Batch norm."""
        return self.make("BatchNorm", c, **options)

    def shape(self, c: int) -> tuple[int, ...]:
        """The shape of a parameter with one entry per channel that broadcasts over an image."""
        return (1, c, *[1] * self.ndim)


class Map(nn.Module):
    """A module around a function written out in source, as people write them in ``forward``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function of that name."""
        if self.name == "plus1":
            return x + 1
        if self.name == "oneminus":
            return 1 - x
        if self.name == "exp":
            return torch.exp(x.clamp(max=2.0))
        if self.name == "clampmin":
            return x.clamp(min=0.5)
        if self.name == "square":
            return x * x
        if self.name == "swish":
            return x * torch.sigmoid(x)
        if self.name == "swish_":
            return x.mul_(torch.sigmoid(x))
        if self.name == "where":
            return torch.where(x > 0, x, 0.1 * x - 0.2)
        if self.name == "softsign":
            return x / (1 + x.abs())
        if self.name == "rsqrt":
            return torch.rsqrt(x * x + 2.0)
        if self.name == "relu_then_add_":
            return F.relu(x).add_(0.5)
        if self.name == "maximum":
            return torch.maximum(x, 0.3 * x)
        if self.name == "sin":
            return torch.sin(x) + torch.cos(x)
        if self.name == "float":
            return x.float().to(x.dtype)
        raise ValueError(self.name)


ACTS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda c: nn.ReLU(),
    "relu_": lambda c: nn.ReLU(inplace=True),
    "relu6_": lambda c: nn.ReLU6(inplace=True),
    "gelu": lambda c: nn.GELU(),
    "silu": lambda c: nn.SiLU(),
    "silu_": lambda c: nn.SiLU(inplace=True),
    "hardswish_": lambda c: nn.Hardswish(inplace=True),
    "hardsigmoid": lambda c: nn.Hardsigmoid(),
    "sigmoid": lambda c: nn.Sigmoid(),
    "leaky": lambda c: nn.LeakyReLU(0.1),
    "prelu": lambda c: nn.PReLU(c),
    "prelu1": lambda c: nn.PReLU(),
    "elu": lambda c: nn.ELU(),
    "tanh": lambda c: nn.Tanh(),
    "softplus": lambda c: nn.Softplus(),
    "mish": lambda c: nn.Mish(),
    "threshold": lambda c: nn.Threshold(0.1, 0.7),
    "dropout": lambda c: nn.Sequential(nn.ReLU(), nn.Dropout(0.3)),
    "identity": lambda c: nn.Identity(),
    **{
        name: (lambda c, name=name: Map(name))  # type: ignore[misc]
        for name in (
            "plus1 oneminus exp clampmin square swish swish_ where softsign rsqrt relu_then_add_ maximum sin"
        ).split()
    },
}
COMMON_ACTS = ("relu", "relu_", "relu6_", "gelu", "silu_", "hardswish_", "leaky")
ZERO_ACTS = COMMON_ACTS + ("silu", "prelu", "elu", "tanh", "mish", "swish", "square", "identity", "dropout", "swish_")
ODD_ACTS = tuple(name for name in ACTS if name not in ZERO_ACTS)


class ChannelsLastNorm(nn.Module):
    """Layer norm over the channels of an image, the way ConvNeXt's ``LayerNorm2d`` does it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        """Channels to the end, norm, and back."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class FrozenNorm(nn.Module):
    """Batch norm written out with buffers, as torchvision's FrozenBatchNorm2d."""

    def __init__(self, c: int, ndim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(c)
        self.shape = (1, c, *[1] * ndim)
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(c, generator=generator))
        self.register_buffer("running_var", torch.rand(c, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift per channel."""
        scale = self.weight.view(self.shape) * (self.running_var.view(self.shape) + 1e-5).rsqrt()  # type: ignore
        return x * scale + (self.bias.view(self.shape) - self.running_mean.view(self.shape) * scale)  # type: ignore


class FullNorm(nn.Module):
    """Layer norm over channels and space together (``normalized_shape`` not needed: written by hand)."""

    def __init__(self, c: int, ndim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, c, *[1] * ndim))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise each image."""
        dims = tuple(range(1, x.dim()))
        mean, var = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, unbiased=False)
        return (x - mean) * torch.rsqrt(var + 1e-3) * self.scale


def norm(name: str, kit: Kit, c: int) -> nn.Module:
    """A normalisation layer by name."""
    table: dict[str, Callable[[], nn.Module]] = {
        "bn": lambda: kit.bn(c),
        "bn_plain": lambda: kit.bn(c, affine=False),
        "bn_nostats": lambda: kit.bn(c, track_running_stats=False),
        "gn1": lambda: nn.GroupNorm(1, c),
        "gn2": lambda: nn.GroupNorm(2 if c % 2 == 0 else 1, c),
        "gnc": lambda: nn.GroupNorm(c, c),
        "in": lambda: kit.make("InstanceNorm", c),
        "in_affine": lambda: kit.make("InstanceNorm", c, affine=True),
        "in_stats": lambda: kit.make("InstanceNorm", c, affine=True, track_running_stats=True),
        "ln": lambda: ChannelsLastNorm(c),
        "frozen": lambda: FrozenNorm(c, kit.ndim),
        "full": lambda: FullNorm(c, kit.ndim),
        "none": lambda: nn.Identity(),
    }
    return table[name]()


NORM_NAMES = (
    "bn",
    "bn_plain",
    "bn_nostats",
    "gn1",
    "gn2",
    "gnc",
    "in",
    "in_affine",
    "in_stats",
    "ln",
    "frozen",
    "full",
)


def shuffle(x: Tensor, groups: int, style: str) -> Tensor:
    """Channel shuffle in four spellings."""
    n, c = x.shape[:2]
    rest = x.shape[2:]
    if style == "view":
        return x.view(n, groups, c // groups, *rest).transpose(1, 2).contiguous().view(n, c, *rest)
    if style == "reshape":
        return x.reshape(n, groups, c // groups, -1).transpose(1, 2).reshape(n, c, *rest)
    if style == "stack":
        return torch.stack(torch.chunk(x, groups, dim=1), dim=2).flatten(1, 2)
    if style == "flatten":
        return x.unflatten(1, (groups, c // groups)).transpose(2, 1).flatten(1, 2)
    raise ValueError(style)

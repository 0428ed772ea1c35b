"""Convolutional blocks of the random networks. Every block is ``Block(kit, channels, **options)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.parts import ACTS, Kit, norm, shuffle


class ConvNorm(nn.Module):
    """Convolution, norm and activation in one of four orders."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        out: int = 6,
        kernel: int = 3,
        stride: int = 1,
        mode: str = "zeros",
        bias: bool = True,
        normal: str = "bn",
        act: str = "relu",
        order: str = "cna",
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.order = order
        self.conv = kit.conv(c, out, kernel, stride=stride, padding_mode=mode, bias=bias, dilation=dilation)
        width = c if order in ("nac", "anc") else out
        self.norm, self.act = norm(normal, kit, width), ACTS[act](width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the parts in their order."""
        for part in self.order:
            x = {"c": self.conv, "n": self.norm, "a": self.act}[part](x)
        return x


class Residual(nn.Module):
    """Basic, bottleneck or pre-activation residual block with three kinds of shortcut."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        kind: str = "basic",
        shortcut: str = "conv",
        stride: int = 1,
        grow: int = 0,
        act: str = "relu",
        inplace: bool = True,
        normal: str = "bn",
        last: bool = True,
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.kit, self.kind, self.stride, self.inplace, self.flip = kit, kind, stride, inplace, flip
        out, self.grow = c + grow, grow
        self.shortcut = shortcut if stride > 1 or grow else "identity"
        mid = max(2, c // 2)
        act = ACTS[act]  # type: ignore[assignment]
        if kind == "basic":
            parts = [kit.conv(c, out, 3, stride=stride, bias=False), norm(normal, kit, out), act(out)]  # type: ignore
            parts += [kit.conv(out, out, 3, bias=False), norm(normal, kit, out)]
        elif kind == "bottleneck":
            parts = [kit.conv(c, mid, 1, bias=False), norm(normal, kit, mid), act(mid)]  # type: ignore[operator]
            parts += [kit.conv(mid, mid, 3, stride=stride), norm(normal, kit, mid), act(mid)]  # type: ignore[operator]
            parts += [kit.conv(mid, out, 1, bias=False), norm(normal, kit, out)]
        else:
            parts = [norm(normal, kit, c), nn.ReLU(), kit.conv(c, mid, 3, stride=stride)]
            parts += [norm(normal, kit, mid), act(mid), kit.conv(mid, out, 3)]  # type: ignore[operator]
        self.body = nn.Sequential(*parts)
        if self.shortcut == "conv":
            self.down = nn.Sequential(kit.conv(c, out, 1, stride=stride, bias=False), kit.bn(out))
        elif self.shortcut == "pool":
            self.down = nn.Sequential(kit.make("AvgPool", 1, stride), kit.conv(c, out, 1))
        self.last = act(out) if last and kind != "preact" else nn.Identity()  # type: ignore[operator]

    def _skip(self, x: Tensor) -> Tensor:
        if self.shortcut == "identity":
            return x
        if self.shortcut == "pad":  # option A: strided slice, zero channels around
            index = (slice(None), slice(None), *[slice(None, None, self.stride)] * self.kit.ndim)
            before = self.grow // 2
            return F.pad(x[index], (0, 0) * self.kit.ndim + (before, self.grow - before), "constant", 0)
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of branch and shortcut."""
        out, skip = self.body(x), self._skip(x)
        if self.inplace:
            out += skip
        else:
            out = skip + out if self.flip else torch.add(out, skip)
        return self.last(out)


class Dense(nn.Module):
    """A dense block: every layer reads the concatenation of all before, and a transition follows."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        growth: int = 3,
        layers: int = 3,
        bottleneck: bool = False,
        front: bool = False,
        style: str = "list",
        transition: bool = True,
    ) -> None:
        super().__init__()
        self.front, self.style = front, style
        self.layers = nn.ModuleList()
        for _ in range(layers):
            parts: list[nn.Module] = [kit.bn(c), nn.ReLU(inplace=style == "list")]
            if bottleneck:
                parts += [kit.conv(c, 2 * growth, 1, bias=False), kit.bn(2 * growth), nn.ReLU(inplace=True)]
                parts += [kit.conv(2 * growth, growth, 3, bias=False)]
            else:
                parts += [kit.conv(c, growth, 3, bias=False)]
            self.layers.append(nn.Sequential(*parts))
            c += growth
        self.transition = nn.Identity()
        if transition:
            self.transition = nn.Sequential(kit.bn(c), nn.ReLU(), kit.conv(c, c // 2, 1), kit.make("AvgPool", 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Grow the list of features."""
        features = [x]
        for layer in self.layers:
            new = layer(torch.cat(features, 1))
            if self.style == "running":
                features = [torch.cat([new, features[0]] if self.front else [features[0], new], 1)]
            else:
                features.insert(0 if self.front else len(features), new)
        x = torch.cat(features, 1)
        return self.transition(x)


class Inception(nn.Module):
    """Parallel branches of different kernels and a pooled one, concatenated."""

    def __init__(self, kit: Kit, c: int, pool: str = "max", act: str = "relu_", nested: bool = False) -> None:
        super().__init__()
        self.nested = nested

        def unit(a: int, b: int, k: int) -> nn.Sequential:
            return nn.Sequential(kit.conv(a, b, k, bias=False), kit.bn(b), ACTS[act](b))

        self.one = unit(c, 3, 1)
        self.three = nn.Sequential(unit(c, 2, 1), unit(2, 4, 3))
        self.five = nn.Sequential(unit(c, 2, 1), unit(2, 3, 3), unit(3, 3, 3))
        pools: dict[str, Any] = {
            "max": lambda: kit.make("MaxPool", 3, 1, 1),
            "avg": lambda: kit.make("AvgPool", 3, 1, 1),
            "avg_exclude": lambda: kit.make("AvgPool", 3, 1, 1, count_include_pad=False),
        }
        self.pool = pools[pool]()
        self.after = unit(c, 2, 1)
        self.left, self.right = kit.conv(3, 2, 1), kit.conv(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate all branches; ``nested`` splits one branch again as Inception-v3 does."""
        five = self.five(x)
        if self.nested:
            five = torch.cat([self.left(five), self.right(five)], 1)
        return torch.cat([self.one(x), self.three(x), five, self.after(self.pool(x))], 1)


class ShuffleUnit(nn.Module):
    """ShuffleNet v2 unit: half of the channels pass, half are computed, then shuffled."""

    def __init__(
        self, kit: Kit, c: int, split: str = "chunk", style: str = "view", groups: int = 2, wide: bool = False
    ) -> None:
        super().__init__()
        self.split, self.style, self.groups, self.wide = split, style, groups, wide
        half = max(2, (c + 1) // 2)
        half += half % 2
        self.half = half
        self.enter = kit.conv(c, 2 * half, 1)
        source = 2 * half if wide else half
        self.branch = nn.Sequential(
            kit.conv(source, half, 1, bias=False),
            kit.bn(half),
            nn.ReLU(inplace=True),
            kit.conv(half, half, 3, groups=half, bias=False),
            kit.bn(half),
            kit.conv(half, half, 1, bias=False),
            kit.bn(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Split, compute, concatenate, shuffle."""
        x = self.enter(x)
        if self.split == "chunk":
            a, b = x.chunk(2, dim=1)
        elif self.split == "split":
            a, b = torch.split(x, [self.half, self.half], dim=1)
        elif self.split == "slice":
            a, b = x[:, : self.half], x[:, self.half :]
        else:  # every other channel
            a, b = x[:, ::2], x[:, 1::2]
        return shuffle(torch.cat((a, self.branch(x if self.wide else b)), 1), self.groups, self.style)


class SqueezeExcite(nn.Module):
    """A gate from globally pooled features, by linear layers or 1x1 convolutions."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        by: str = "conv",
        gate: str = "sigmoid",
        act: str = "relu",
        residual: bool = False,
        form: str = "mul",
        squeeze: int = 2,
    ) -> None:
        super().__init__()
        self.kit, self.by, self.residual, self.form = kit, by, residual, form
        make: Any = nn.Linear if by == "linear" else (lambda a, b: kit.conv(a, b, 1))
        self.pool = kit.make("AdaptiveAvgPool", 1)
        self.fc1, self.act, self.fc2 = make(c, squeeze), ACTS[act](squeeze), make(squeeze, c)
        self.gate = ACTS[gate](c)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        if self.by == "linear":
            s = self.pool(x).view(x.shape[0], x.shape[1])
            s = self.gate(self.fc2(self.act(self.fc1(s)))).view(x.shape[0], x.shape[1], *[1] * self.kit.ndim)
        else:
            s = x.mean(self.kit.spatial, keepdim=True)
            s = self.gate(self.fc2(self.act(self.fc1(s))))
        if self.form == "expand":
            out = x * s.expand_as(x)
        elif self.form == "blend":  # highway
            out = x * s + (1 - s) * F.relu(x)
        else:
            out = s * x
        return out + x if self.residual else out


class Depthwise(nn.Module):
    """Depthwise then pointwise, with a channel multiplier."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        multiplier: int = 1,
        stride: int = 1,
        act: str = "relu",
        mode: str = "zeros",
        out: int = 6,
        twice: bool = False,
        bias: bool = True,
        normal: str = "bn",
    ) -> None:
        super().__init__()
        wide = c * multiplier
        self.dw = kit.conv(c, wide, 3, stride=stride, groups=c, padding_mode=mode, bias=bias)
        self.bn, self.act = norm(normal, kit, wide), ACTS[act](wide)
        self.again = kit.conv(wide, wide, 3, groups=wide) if twice else nn.Identity()
        self.pw = kit.conv(wide, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Filter each channel, then mix them."""
        return self.pw(self.again(self.act(self.bn(self.dw(x)))))


class Inverted(nn.Module):
    """MobileNet's inverted residual, with or without squeeze-excite."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        stride: int = 1,
        expand: int = 2,
        se: str = "none",
        act: str = "hardswish_",
        grow: int = 0,
    ) -> None:
        super().__init__()
        wide = expand * c
        self.residual = stride == 1 and grow == 0
        self.expand = nn.Sequential(kit.conv(c, wide, 1, bias=False), kit.bn(wide), ACTS[act](wide))
        self.dw = nn.Sequential(
            kit.conv(wide, wide, 3, stride=stride, groups=wide, bias=False), kit.bn(wide), ACTS[act](wide)
        )
        self.se = nn.Identity() if se == "none" else SqueezeExcite(kit, wide, "conv", se)
        self.project = nn.Sequential(kit.conv(wide, c + grow, 1, bias=False), kit.bn(c + grow))

    def forward(self, x: Tensor) -> Tensor:
        """Widen, filter, gate, narrow."""
        out = self.project(self.se(self.dw(self.expand(x))))
        return x + out if self.residual else out


class UNet(nn.Module):
    """One or two levels down and up again with skip connections."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        down: str = "max",
        up: str = "transposed",
        skip: str = "cat",
        deep: bool = False,
        act: str = "relu",
    ) -> None:
        super().__init__()
        self.kit, self.up, self.skip = kit, up, skip
        width = c + 2
        self.inner = UNet(kit, width, down, up, skip, False, act) if deep else nn.Identity()
        self.enter = nn.Sequential(kit.conv(c, c, 3), kit.bn(c), ACTS[act](c))
        pools: dict[str, Any] = {
            "max": lambda: kit.make("MaxPool", 2),
            "avg": lambda: kit.make("AvgPool", 2),
            "conv": lambda: kit.conv(c, c, 3, stride=2),
            "ceil": lambda: kit.make("MaxPool", 2, ceil_mode=True),
        }
        self.down = nn.Sequential(pools[down](), kit.conv(c, width, 3), kit.bn(width), ACTS[act](width))
        if up == "transposed":
            self.rise: nn.Module = kit.make("ConvTranspose", width, c, 2, 2)
        elif up == "transposed3":
            self.rise = kit.make("ConvTranspose", width, c, 3, 2, 1, 1)
        elif up == "transposed_dw":
            lift = kit.conv(width, c, 1)
            self.rise = nn.Sequential(lift, kit.make("ConvTranspose", c, c, 2, 2, groups=c))
        else:
            self.rise = kit.conv(width, c, 1)
        self.leave = kit.conv(2 * c if skip == "cat" else c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Down, up, fit the size, merge."""
        side = self.enter(x)
        low = self.inner(self.down(side))
        if self.up in ("nearest", "bilinear"):
            mode = {"nearest": "nearest", "bilinear": ("linear", "bilinear", "trilinear")[self.kit.ndim - 1]}[self.up]
            low = F.interpolate(self.rise(low), size=side.shape[2:], mode=mode)
        else:
            low = self.rise(low)
            pads = [extra for d in reversed(self.kit.spatial) for extra in (0, side.shape[d] - low.shape[d])]
            low = F.pad(low, pads)
        return self.leave(torch.cat([side, low], 1) if self.skip == "cat" else side + low)

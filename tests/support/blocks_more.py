"""The other blocks of the random networks: tokens and attention, movement of channels, sharing, padding, pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.parts import ACTS, Kit, norm, shuffle


def tokens(x: Tensor) -> Tensor:
    """Image to sequence: (N, C, ...) to (N, L, C)."""
    return x.flatten(2).transpose(1, 2)


def image(t: Tensor, like: Tensor) -> Tensor:
    """Sequence back to the image shape of ``like``."""
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], *like.shape[2:])


class TokenMixer(nn.Module):
    """MLP-Mixer block: tokens are mixed, then channels, with layer norm, layer scale and perhaps a class token."""

    def __init__(
        self,
        kit: Kit,
        c: int,
        act: str = "gelu",
        scale: bool = False,
        cls: str = "none",
        mix: bool = True,
        length: int = 0,
    ) -> None:
        super().__init__()
        self.cls = cls
        length += cls != "none"
        self.token = nn.Parameter(torch.zeros(1, 1, c)) if cls != "none" else None
        self.position = nn.Parameter(torch.randn(1, length, c) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.over_tokens = nn.Sequential(nn.Linear(length, 4), ACTS[act](4), nn.Linear(4, length)) if mix else None
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), ACTS[act](2 * c), nn.Dropout(0.1), nn.Linear(2 * c, c))
        self.gamma: Any = nn.Parameter(torch.full((c,), 1e-6)) if scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Mix and return an image, or an image gated by the class token."""
        t = tokens(x)
        if self.token is not None:
            t = torch.cat([self.token.expand(t.shape[0], -1, -1), t], dim=1)
        t = t + self.position
        if self.over_tokens is not None:
            t = t + self.over_tokens(self.norm1(t).transpose(1, 2)).transpose(1, 2)
        t = t + self.gamma * self.mlp(self.norm2(t))
        if self.cls == "gate":
            return image(t[:, 1:], x) * torch.sigmoid(t[:, 0])[(...,) + (None,) * (x.dim() - 2)]
        if self.cls == "drop":
            t = t[:, 1:]
        return image(t, x)


class ConvNeXt(nn.Module):
    """Depthwise convolution, channels-last layer norm and MLP, layer scale, residual."""

    def __init__(self, kit: Kit, c: int, kernel: int = 3, scale: str = "last", act: str = "gelu") -> None:
        super().__init__()
        self.scale = scale
        self.dw = kit.conv(c, c, kernel, groups=c)
        self.norm = nn.LayerNorm(c)
        self.fc1, self.act, self.fc2 = nn.Linear(c, 3 * c), ACTS[act](3 * c), nn.Linear(3 * c, c)
        shape = {"last": (c,), "first": kit.shape(c), "scalar": (1,)}[scale]
        self.gamma = nn.Parameter(torch.full(shape, 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        y = self.fc2(self.act(self.fc1(self.norm(self.dw(x).movedim(1, -1)))))
        if self.scale == "last":
            y = self.gamma * y
        y = y.movedim(-1, 1)
        return x + (y if self.scale == "last" else y * self.gamma)


class Attention(nn.Module):
    """Self-attention over positions in five spellings."""

    def __init__(self, kit: Kit, c: int, kind: str = "sdpa", prenorm: bool = True, heads: int = 2) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        width = 2 * max(1, c // 2)
        self.enter = nn.Linear(c, width)
        self.norm = nn.LayerNorm(width) if prenorm else nn.Identity()
        if kind == "module":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        elif kind == "separate":
            self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, c)

    def _attend(self, t: Tensor) -> Tensor:
        if self.kind == "module":
            return self.attention(t, t, t, need_weights=False)[0]
        n, length, width = t.shape
        if self.kind == "separate":
            q, k, v = self.q(t), self.k(t), self.v(t)
            return torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width), dim=-1) @ v
        if self.kind == "chunk":
            q, k, v = self.qkv(t).chunk(3, dim=-1)
            return torch.softmax(torch.einsum("nlc,nmc->nlm", q, k), dim=-1) @ v
        shape = (n, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(t).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return y.transpose(1, 2).reshape(n, length, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over positions."""
        t = self.enter(tokens(x))
        return x + image(self.out(t + self._attend(self.norm(t))), x)


class Glu(nn.Module):
    """Gated linear unit by chunk, by ``F.glu``, by slices, with the value or the gate first."""

    def __init__(self, kit: Kit, c: int, kind: str = "chunk", out: int = 4, kernel: int = 1) -> None:
        super().__init__()
        self.kind, self.out = kind, out
        self.conv = kit.conv(c, 2 * out, kernel)
        self.bn = kit.bn(2 * out)

    def forward(self, x: Tensor) -> Tensor:
        """Value times gate."""
        y = self.bn(self.conv(x))
        if self.kind == "glu":
            return F.glu(y, dim=1)
        if self.kind == "chunk":
            a, b = y.chunk(2, dim=1)
        elif self.kind == "slice":
            a, b = y[:, self.out :], y[:, : self.out]
        elif self.kind == "narrow":
            a, b = y.narrow(1, 0, self.out), y.narrow(1, self.out, self.out)
        else:
            a, b = y.unflatten(1, (2, self.out)).unbind(1)
        return a * torch.sigmoid(b)


class Slices(nn.Module):
    """Parts of the channels go separate ways: slices, rolls, flips, indices, and back together."""

    def __init__(self, kit: Kit, c: int, kind: str = "halves", at: int = 2, act: str = "relu") -> None:
        super().__init__()
        self.kind, self.at = kind, min(at, c - 1)
        self.left = kit.conv(self.at, self.at + 1, 3)
        self.right = kit.conv(c - self.at, 3, 1)
        self.act = ACTS[act](c)
        self.register_buffer("order", torch.randperm(c, generator=torch.Generator().manual_seed(c)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Move channels about."""
        if self.kind == "halves":
            return torch.cat([self.left(x[:, : self.at]), self.act(self.right(x[:, self.at :]))], 1)
        if self.kind == "partial":  # PConv: some are filtered, the others pass
            return torch.cat([self.left(x[:, : self.at]), x[:, self.at :]], 1)
        if self.kind == "roll":
            return self.act(x) + torch.roll(x, 1, dims=1)
        if self.kind == "roll_spatial":
            return self.act(x) + torch.roll(x, (1,), dims=(2,))
        if self.kind == "flip":
            return self.act(x) - 0.5 * x.flip(1)
        if self.kind == "index":
            return self.act(x.index_select(1, self.order))  # type: ignore[arg-type]
        if self.kind == "advanced":
            return self.act(x[:, self.order]) + x
        if self.kind == "select":
            return x * torch.tanh(x[:, 0]).unsqueeze(1)
        if self.kind == "write":  # in place through a view
            y = self.act(x).clone()
            y[:, : self.at] = y[:, : self.at] * 2 + 1
            return y
        if self.kind == "write_const":
            y = self.act(x).clone()
            y[:, 0] = 0.5
            return y
        if self.kind == "shift":  # TSM / S2-MLP shift of a part of the channels along space
            y = torch.zeros_like(x)
            y[:, : self.at, 1:] = x[:, : self.at, :-1]
            y[:, self.at :] = x[:, self.at :]
            return y
        if self.kind == "stack":
            return torch.stack([x, self.act(x)], dim=1).sum(1)
        if self.kind == "stack_flat":
            return torch.stack([x, self.act(x)], dim=2).flatten(1, 2)
        if self.kind == "repeat":
            return x.repeat(1, 2, *[1] * (x.dim() - 2)) + torch.cat([self.act(x), x], 1)
        return x.repeat_interleave(2, dim=1)


class Space(nn.Module):
    """Depth to space and back, sub-pixel convolution, patch merging."""

    def __init__(self, kit: Kit, c: int, kind: str = "shuffle", act: str = "relu") -> None:
        super().__init__()
        self.kind, self.kit = kind, kit
        self.up, self.act = kit.conv(c, 3 * 2**kit.ndim, 1), ACTS[act](3)
        self.merge = nn.Linear(c * 2**kit.ndim, 5, bias=False)
        self.norm = nn.LayerNorm(c * 2**kit.ndim)

    def forward(self, x: Tensor) -> Tensor:
        """Only images (two spatial dimensions)."""
        if self.kind == "shuffle":
            return self.act(F.pixel_shuffle(self.up(x), 2))
        if self.kind == "unshuffle":
            return F.pixel_unshuffle(self.act(F.pixel_shuffle(self.up(x), 2)), 2)
        if self.kind == "views":
            n, _, h, w = x.shape
            y = self.up(x).view(n, 3, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, 3, 2 * h, 2 * w)
            return self.act(y)
        h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        t = x[:, :, :h, :w].permute(0, 2, 3, 1)
        t = torch.cat([t[:, 0::2, 0::2], t[:, 1::2, 0::2], t[:, 0::2, 1::2], t[:, 1::2, 1::2]], -1)
        return self.merge(self.norm(t)).permute(0, 3, 1, 2)


class Context(nn.Module):
    """What is pooled over space or over channels comes back into the image."""

    def __init__(self, kit: Kit, c: int, kind: str = "expand", act: str = "sigmoid") -> None:
        super().__init__()
        self.kind, self.kit = kind, kit
        self.conv = kit.conv(2, 1, 3)
        self.fuse = kit.conv(2 * c, c, 1)
        self.gate = kit.conv(c, c, 1)
        self.act = ACTS[act](c)
        self.vector, self.bias = nn.Parameter(torch.ones(kit.shape(c))), nn.Parameter(torch.zeros(kit.shape(c)))
        self.scalar = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.linspace(-1, 1, c).view(kit.shape(c)))

    def forward(self, x: Tensor) -> Tensor:
        """Pool, think, merge."""
        s = self.kit.spatial
        if self.kind == "expand":
            pooled = x.mean(s, keepdim=True).expand_as(x)
            return self.fuse(torch.cat([x, pooled], 1))
        if self.kind == "spatial":  # CBAM
            both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
            return x * torch.sigmoid(self.conv(both))
        if self.kind == "amax":
            return x * self.act(x.amax(s, keepdim=True))
        if self.kind == "logit":
            return x * torch.softmax(self.gate(x), dim=1)
        if self.kind == "softmax_space":
            a = torch.softmax(self.gate(x).flatten(2), dim=-1)
            return x + (x.flatten(2) * a).sum(-1)[(...,) + (None,) * self.kit.ndim]
        if self.kind == "vector":
            return self.act(x * self.vector + self.bias)
        if self.kind == "scalar":
            return self.act(x) * self.scalar + x
        if self.kind == "buffer":
            return self.act((x - self.mean) / 1.5)
        if self.kind == "product":
            return self.gate(x) * self.act(x)
        if self.kind == "normalise":
            return F.normalize(self.gate(x), dim=1) + x
        if self.kind == "cumsum":
            return self.gate(x) + 0.1 * x.cumsum(1)
        if self.kind == "var":
            return x / (x.var(s, keepdim=True) + 1.0).sqrt()
        if self.kind == "lerp":
            return torch.lerp(x, self.gate(x), 0.3)
        if self.kind == "sub_mean":
            return self.act(x - x.mean(1, keepdim=True))
        return torch.addcmul(x, self.gate(x), self.act(x), value=0.5)


class Sharing(nn.Module):
    """The same weight at several places."""

    def __init__(self, kit: Kit, c: int, kind: str = "twice", act: str = "relu", bias: bool = True) -> None:
        super().__init__()
        self.kind, self.kit = kind, kit
        self.conv, self.other = kit.conv(c, c, 3, bias=bias), kit.conv(c, c, 3)
        self.bn1, self.bn2, self.act = kit.bn(c), kit.bn(c), ACTS[act](c)
        self.weight = nn.Parameter(torch.randn(c, c) * c**-0.5)
        self.free_bias = nn.Parameter(torch.zeros(c))
        if kind in ("tied", "tied_all"):
            self.other.weight = self.conv.weight
        if kind == "tied_all":
            self.bn2.weight, self.other.bias = self.bn1.weight, self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Use the shared weight."""
        if self.kind == "twice":
            return self.conv(self.act(self.bn1(self.conv(x))))
        if self.kind == "twice_residual":
            return x + self.bn2(self.conv(self.act(self.bn1(self.conv(x)))))
        if self.kind == "siamese":
            return self.act(self.conv(x)) - self.act(self.conv(x.flip(2)))
        if self.kind in ("tied", "tied_all"):
            return self.bn2(self.other(self.act(self.bn1(self.conv(x)))))
        if self.kind == "functional":
            t = F.linear(x.movedim(1, -1), self.weight, self.free_bias)
            return self.act(t).movedim(-1, 1)
        if self.kind == "transpose":  # encoder and decoder share one matrix
            t = self.act(F.linear(x.movedim(1, -1), self.weight, self.free_bias))
            return F.linear(t, self.weight.t()).movedim(-1, 1)
        if self.kind == "matmul":
            return (x.movedim(1, -1) @ self.weight + self.free_bias).movedim(-1, 1)
        if self.kind == "einsum":
            return torch.einsum("nc...,dc->nd...", x, self.weight)
        if self.kind == "penalty":  # a weight that is also read elsewhere
            return self.act(self.conv(x)) * self.conv.weight.square().mean()
        return self.conv(self.conv(x)) + self.other(self.conv(x))


class Padding(nn.Module):
    """Padding of space and of channels, with zeros, other values, reflection and wrap-around, and pooling borders."""

    def __init__(self, kit: Kit, c: int, kind: str = "value", act: str = "relu", out: int = 5) -> None:
        super().__init__()
        self.kind, self.kit = kind, kit
        self.act = ACTS[act](c)
        width = c + 3 if kind.startswith("channel") else c
        self.conv = kit.conv(width, out, 3, padding=0 if kind in ("value", "reflect", "circular", "zero") else 1)
        pools: dict[str, Any] = {
            "avg_include": lambda: kit.make("AvgPool", 3, 1, 1),
            "avg_exclude": lambda: kit.make("AvgPool", 3, 2, 1, count_include_pad=False),
            "avg_ceil": lambda: kit.make("AvgPool", 2, 2, ceil_mode=True),
            "avg_divisor": lambda: nn.AvgPool2d(2, 1, divisor_override=3),
            "avg_divisor_ceil": lambda: nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
            "max_pad": lambda: kit.make("MaxPool", 3, 2, 1),
            "max_dilated": lambda: kit.make("MaxPool", 2, 1, 0, 2),
            "lp": lambda: kit.make("LPPool", 2, 2, 1),
            "adaptive": lambda: kit.make("AdaptiveAvgPool", 3),
            "adaptive_max": lambda: kit.make("AdaptiveMaxPool", 2),
            "unfold": lambda: nn.Unfold(2, padding=1),
        }
        self.pool = pools[kind]() if kind in pools else nn.Identity()
        self.after = nn.Linear(4 * c, out) if kind == "unfold" else None

    def forward(self, x: Tensor) -> Tensor:
        """Pad or pool, then convolve."""
        x = self.act(x)
        ends = (1, 1) * self.kit.ndim
        if self.after is not None:
            y = self.pool(x).transpose(1, 2)  # (N, L, 4C)
            return self.after(y).transpose(1, 2).reshape(x.shape[0], -1, x.shape[2] + 1, x.shape[3] + 1)
        if self.kind == "value":
            x = F.pad(x, ends, value=0.7)
        elif self.kind == "zero":
            x = F.pad(x, ends)
        elif self.kind in ("reflect", "circular"):
            x = F.pad(x, ends, mode=self.kind)
        elif self.kind == "channel_value":
            x = F.pad(x, (0, 0) * self.kit.ndim + (1, 2), value=-0.4)
        elif self.kind == "channel_crop":
            x = F.pad(F.pad(x, (0, 0) * self.kit.ndim + (-1, 2)), (0, 0) * self.kit.ndim + (2, 0), value=1.0)
        return self.conv(self.pool(x))


class Grouped(nn.Module):
    """Grouped convolutions that are not depthwise, perhaps shuffled, and their transposed kin."""

    def __init__(
        self, kit: Kit, c: int, groups: int = 2, kind: str = "conv", per: int = 2, normal: str = "bn", act: str = "relu"
    ) -> None:
        super().__init__()
        self.kind, self.groups = kind, groups
        wide = groups * per
        self.enter, self.norm = kit.conv(c, wide, 1), norm(normal, kit, wide)
        self.act = ACTS[act](wide)
        self.conv = kit.conv(wide, wide, 3, groups=groups)
        if kind == "transposed":
            self.conv = kit.make("ConvTranspose", wide, wide, 2, 2, groups=groups)
        self.leave = kit.conv(wide, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Into groups, convolve, out again."""
        y = self.act(self.norm(self.enter(x)))
        if self.kind == "shuffled":
            y = shuffle(y, self.groups, "view")
        return self.leave(self.conv(y))

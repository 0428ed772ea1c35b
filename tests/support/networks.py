"""Random networks as data: a ``Spec`` prints as the call that makes it, and ``build(spec)`` makes the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from support.masks import KINDS, Mask
from support.options import BLOCKS
from support.oracle import randomise
from support.parts import Kit

HEADS = (
    "linear",
    "linear",
    "linear",
    "flatten",
    "view",
    "mlp",
    "conv",
    "conv",
    "none",
    "tuple",
    "dict",
    "aux",
    "softmax",
    "max",
)
STEMS = ("conv", "conv_bn", "conv_bn", "raw", "two_add", "two_cat")


@dataclass(frozen=True)
class Spec:
    """A network as data: spatial dimensions, width, size, stem, blocks with their options, head and a seed."""

    ndim: int = 2
    width: int = 6
    size: int = 7
    stem: str = "conv_bn"
    blocks: tuple[tuple[str, dict[str, Any]], ...] = (("Residual", {}),)
    head: str = "linear"
    seed: int = 0


class Stem(nn.Module):
    """Turns the model's inputs into ``width`` channels."""

    def __init__(self, kind: str, kit: Kit, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "embedding":
            self.embedding = nn.Embedding(11, width)
            self.position = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        elif kind == "linear":
            self.linear = nn.Linear(3, width)
        elif kind != "raw":
            self.conv = kit.conv(3, width, 3, bias=kind != "conv_bn")
            self.bn = kit.bn(width) if kind == "conv_bn" else nn.Identity()
            self.second = kit.conv(3, width, 1) if kind.startswith("two") else nn.Identity()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """From inputs to an image."""
        if self.kind == "raw":
            return x
        if self.kind == "embedding":
            return (self.embedding(x) + self.position).transpose(1, 2)
        if self.kind == "linear":
            return self.linear(x).transpose(1, 2)
        y = torch.relu(self.bn(self.conv(x)))
        if other is None:
            return y
        z = self.second(other)
        return y + z if self.kind == "two_add" else torch.cat((y, z), dim=1)


class Head(nn.Module):
    """Turns the last image into the model's output."""

    def __init__(self, kind: str, kit: Kit, shape: torch.Size) -> None:
        super().__init__()
        self.kind, self.kit = kind, kit
        c, size = shape[1], shape[2:].numel()
        if kind in ("flatten", "view"):
            self.fc: nn.Module = nn.Linear(c * size, 4)
        elif kind == "mlp":
            self.fc = nn.Sequential(
                nn.Linear(c * size, 7), nn.ReLU(True), nn.Dropout(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
            )
        elif kind in ("conv", "tuple", "dict", "aux"):
            self.conv = kit.conv(c, 3, 1)
        if kind not in ("conv", "none") and not hasattr(self, "fc"):
            self.fc = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Any:
        """Classify, segment, or both."""
        s = self.kit.spatial
        if self.kind == "none":
            return x
        if self.kind == "conv":
            return self.conv(x)
        if self.kind == "view":
            return self.fc(x.reshape(x.size(0), -1))
        if self.kind in ("flatten", "mlp"):
            return self.fc(torch.flatten(x, 1))
        if self.kind == "max":
            return self.fc(x.amax(s))
        out = self.fc(x.mean(s))
        if self.kind == "softmax":
            return torch.softmax(out, dim=-1)
        if self.kind == "tuple":
            return out, self.conv(x)
        if self.kind == "dict":
            return {"logits": out, "maps": [self.conv(x), x]}
        if self.kind == "aux":
            return torch.log_softmax(out, 1), self.conv(x).sigmoid().mean(s)
        return out


class Net(nn.Module):
    """Stem, blocks in sequence, head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        """Run them."""
        return self.head(self.blocks(self.stem(x) if other is None else self.stem(x, other)))


def _inputs(spec: Spec) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(spec.seed + 1)
    if spec.stem == "embedding":
        return (torch.randint(0, 11, (2, spec.size), generator=generator),)
    shape = (2, spec.size, 3) if spec.stem == "linear" else (2, 3, *[spec.size] * spec.ndim)
    count = 2 if spec.stem.startswith("two") else 1
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))


def build(spec: Spec, skipped: list[str] | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network of ``spec``, float64, eval mode, randomised, and its example inputs (batch 2).

    A block that does not fit the image at hand (too small, wrong number of dimensions) is left out and, where
    ``skipped`` is given, named there with the reason.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(spec.seed)
        kit = Kit(spec.ndim)
        inputs = _inputs(spec)
        stem = Stem(spec.stem, kit, spec.width).double().eval()
        x = stem(*inputs)
        found: list[nn.Module] = []
        for name, options in spec.blocks:
            make, _ = BLOCKS[name]
            extra = {"length": x.shape[2:].numel()} if name == "TokenMixer" else {}
            try:
                block = make(kit, x.shape[1], **options, **extra).double().eval()
                y = block(x.clone())
                if y.dim() != x.dim() or min(y.shape) < 1 or y.shape[1] > 40 or y[0].numel() > 8000:
                    raise ValueError(f"gives {tuple(y.shape)}")
            except (ValueError, RuntimeError, IndexError) as error:
                if skipped is not None:
                    skipped.append(f"{name} {options}: {error}")
                continue
            found.append(block)
            x = y
        model = Net(stem, found, Head(spec.head, kit, x.shape)).double().eval()
    return randomise(model, spec.seed).requires_grad_(True), inputs


def block(name: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A block of that name with random options."""
    options = BLOCKS[name][1]

    @st.composite
    def draw_block(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
        return name, {key: draw(st.sampled_from(values)) for key, values in options.items()}

    return draw_block()


def specs(
    *names: str, ndims: tuple[int, ...] = (2, 2, 2, 1, 3), stems: tuple[str, ...] = STEMS, mixed: bool = True
) -> st.SearchStrategy[Spec]:
    """Networks with one to three blocks, one of them at least of ``names``, the others of these or of any kind."""
    main = st.one_of([block(name) for name in names])
    other = st.one_of([block(name) for name in (sorted(BLOCKS) if mixed else names)])

    @st.composite
    def draw_spec(draw: st.DrawFn) -> Spec:
        chosen = [draw(main)]
        for _ in range(draw(st.integers(0, 2))):
            chosen.insert(draw(st.integers(0, len(chosen))), draw(st.one_of(main, other)))
        ndim = draw(st.sampled_from(ndims))
        return Spec(
            ndim=ndim,
            width=draw(st.sampled_from((4, 5, 6, 8))),
            size=draw(st.integers(5, 6 if ndim == 3 else 9)),
            stem=draw(st.sampled_from(stems)),
            blocks=tuple(chosen),
            head=draw(st.sampled_from(HEADS)),
            seed=draw(st.integers(0, 10_000)),
        )

    return draw_spec()


def masks() -> st.SearchStrategy[Mask]:
    """Any kind of mask at any amount."""
    return st.builds(Mask, st.sampled_from(KINDS), st.sampled_from((0.25, 0.5, 0.75)), st.integers(0, 10_000))

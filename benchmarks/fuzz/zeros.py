"""Random masks as data: input side, output side, both, whole layers, whole heads, constrained, any rows, elements."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .build import Builder
from .graph import Zero

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (
    "input",
    "output",
    "both",
    "both",
    "output_bn",
    "layer",
    "heads",
    "constrained",
    "rows",
    "norms",
    "bias",
    "one",
)


@dataclass(frozen=True)
class Site:
    """A layer that can be masked by channels: its parameters' names, its widths, its groups."""

    name: str
    weight: str
    row: str  # the parameter whose rows decide about output channels: the weight, or its magnitude
    bias: str | None
    inputs: int
    outputs: int
    groups: int = 1
    transposed: bool = False

    def input_zeros(self, channels: Sequence[int]) -> Iterator[Zero]:
        """Ignore these input channels."""
        if self.transposed or self.groups == 1:
            yield Zero(self.weight, ((0 if self.transposed else 1, tuple(channels)),))
            return
        per_in, per_out = self.inputs // self.groups, self.outputs // self.groups
        for group in range(self.groups):
            own = tuple(c % per_in for c in channels if c // per_in == group)
            if own:
                rows = tuple(range(group * per_out, (group + 1) * per_out))
                yield Zero(self.weight, ((0, rows), (1, own)))

    def output_zeros(self, channels: Sequence[int], bias: bool) -> Iterator[Zero]:
        """Put out zero, or the bias, at these output channels."""
        if not self.transposed:
            yield Zero(self.row, ((0 if self.inputs or self.row != self.weight else 1, tuple(channels)),))
        else:
            per_in, per_out = self.inputs // self.groups, self.outputs // self.groups
            for group in range(self.groups):
                own = tuple(c % per_out for c in channels if c // per_out == group)
                if own:
                    yield Zero(self.weight, ((0, tuple(range(group * per_in, (group + 1) * per_in))), (1, own)))
        if bias and self.bias:
            yield Zero(self.bias, ((0, tuple(channels)),))


def sites(root: nn.Module) -> list[Site]:
    """The layers of a network that have channels."""
    names = {name for name, _ in [*root.named_parameters(), *root.named_buffers()]}
    found = []
    for path, module in root.named_modules():
        if not isinstance(module, (*CONVS, *TRANSPOSED, nn.Linear, nn.Embedding)):
            continue
        options = ("weight", "weight_mask", "weight_v", "parametrizations.weight.original1")
        weight = next((f"{path}.{o}" for o in options if f"{path}.{o}" in names), None)
        if weight is None:
            continue
        row = weight.replace("weight_v", "weight_g").replace("original1", "original0")
        bias = f"{path}.bias" if f"{path}.bias" in names else None
        if isinstance(module, nn.Embedding):
            found.append(Site(path, weight, row, None, 0, module.embedding_dim))
        elif isinstance(module, nn.Linear):
            found.append(Site(path, weight, row, bias, module.in_features, module.out_features))
        else:
            turned = isinstance(module, TRANSPOSED)
            sizes = module.in_channels, module.out_channels, module.groups
            found.append(Site(path, weight, row, bias, *sizes, turned))  # type: ignore[arg-type]
    return found


def some(rng: random.Random, count: int, amount: float, leave: int = 1) -> list[int]:
    """At least one, at most ``count - leave`` of ``count`` indices."""
    wanted = min(max(1, round(count * amount)), count - leave)
    return sorted(rng.sample(range(count), wanted)) if wanted > 0 else []


class Masker:
    """Draws zeros for one network."""

    def __init__(self, builder: Builder, rng: random.Random) -> None:
        self.rng, self.heads = rng, builder.heads
        self.root = builder.root
        self.sites = sites(builder.root)
        self.amount = rng.choice((0.25, 0.5, 0.75))
        self.shapes = {
            name: tuple(t.shape)
            for name, t in [*builder.root.named_parameters(), *builder.root.named_buffers()]
            if t.is_floating_point() and t.dim() and "running_var" not in name
        }

    def draw(self) -> tuple[Zero, ...]:
        """One kind of mask, or two kinds one over the other."""
        kinds = [self.rng.choice(KINDS) for _ in range(self.rng.choice((1, 1, 2)))]
        drawn = [zero for kind in kinds for zero in getattr(self, f"_{kind}")()]
        return tuple(zero for zero in dict.fromkeys(drawn) if self._normable(zero, drawn))

    def _normable(self, zero: Zero, drawn: list[Zero]) -> bool:
        """A direction of a weight norm must keep something in every row: a row of zeros has no direction."""
        if not zero.name.endswith(("weight_v", "original1")):
            return True
        first = next(z for z in drawn if z.name == zero.name)
        dims = [dim for dim, _ in zero.block]
        return zero == first and dims == [1] and len(zero.block[0][1]) < self.shapes[zero.name][1]

    def _input(self) -> Iterator[Zero]:
        for site in self.sites:
            chosen = some(self.rng, site.inputs, self.amount)
            if chosen:
                yield from site.input_zeros(chosen)

    def _output(self, norms: bool = False) -> Iterator[Zero]:
        bias = self.rng.random() < 0.6
        for site in self.sites:
            chosen = some(self.rng, site.outputs, self.amount)
            if not chosen or self.rng.random() < 0.15:
                continue
            yield from site.output_zeros(chosen, bias)
            if norms:
                for name, shape in self.shapes.items():
                    if name not in {s.weight for s in self.sites} and shape == (site.outputs,):
                        yield Zero(name, ((0, tuple(chosen)),))

    def _output_bn(self) -> Iterator[Zero]:
        yield from self._output(norms=True)

    def _both(self) -> Iterator[Zero]:
        yield from self._input()
        yield from self._output()

    def _layer(self) -> Iterator[Zero]:
        for site in self.rng.sample(self.sites, min(len(self.sites), self.rng.choice((1, 1, 2)))):
            yield from site.output_zeros(range(site.outputs), self.rng.random() < 0.6)

    def _heads(self) -> Iterator[Zero]:
        if not self.heads:
            yield from self._both()
        for head in self.heads:
            if self.rng.random() < 0.5:
                for name, dim, index in head:
                    if name in self.shapes and self.rng.random() < 0.9:
                        yield Zero(name, ((dim, index),))

    def _constrained(self) -> Iterator[Zero]:
        """The same channels wherever a width occurs, on both sides."""
        chosen: dict[int, list[int]] = {}
        for site in self.sites:
            for width in (site.inputs, site.outputs):
                if width and width not in chosen:
                    chosen[width] = some(self.rng, width, self.amount)
            if site.inputs and chosen[site.inputs]:
                yield from site.input_zeros(chosen[site.inputs])
            if chosen[site.outputs] and self.rng.random() < 0.7:
                yield from site.output_zeros(chosen[site.outputs], True)

    def _rows(self) -> Iterator[Zero]:
        """Slices of any parameter or buffer along any dimension, whoever uses it."""
        for name, shape in self.shapes.items():
            dims = [dim for dim, size in enumerate(shape) if size > 1]
            if dims and self.rng.random() < 0.6:
                dim = self.rng.choice(dims)
                yield Zero(name, ((dim, tuple(some(self.rng, shape[dim], self.amount))),))

    def _norms(self) -> Iterator[Zero]:
        layers = {s.weight for s in self.sites} | {s.bias for s in self.sites}
        for name, shape in self.shapes.items():
            if len(shape) == 1 and shape[0] > 1 and name not in layers and self.rng.random() < 0.8:
                yield Zero(name, ((0, tuple(some(self.rng, shape[0], self.amount, leave=0))),))

    def _bias(self) -> Iterator[Zero]:
        for site in self.sites:
            chosen = some(self.rng, site.outputs, self.amount)
            if chosen and site.bias:
                yield Zero(site.bias, ((0, tuple(chosen)),))
        yield from self._input()

    def _one(self) -> Iterator[Zero]:
        """All channels but one on one side of some layers."""
        for site in self.sites:
            if self.rng.random() < 0.5:
                if site.inputs > 1 and self.rng.random() < 0.5:
                    yield from site.input_zeros(some(self.rng, site.inputs, 1.0))
                elif site.outputs > 1:
                    yield from site.output_zeros(some(self.rng, site.outputs, 1.0), True)


def effective(model: nn.Module, zeros: Sequence[Zero]) -> bool:
    """Whether any floating weight of two or more dimensions holds a zero at all."""
    state = dict(model.named_parameters())
    return any(
        bool((state[z.name] == 0).any()) for z in zeros if z.name in state and isinstance(state[z.name], torch.Tensor)
    )

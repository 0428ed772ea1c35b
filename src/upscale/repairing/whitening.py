"""Coordinates of a layer's weight in which its inputs are white, so that a step of one size suits all of them.

What a layer reads is correlated, and a gradient step is long along what the inputs share and short across it. Behind
a change of coordinates ``u = w R^-1``, where ``R`` is the inverse root of the inputs' Gram matrix, all directions are
alike (Desjardins, Simonyan, Pascanu and Kavukcuoglu 2015, "Natural Neural Networks", arXiv 1507.00210, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry, batch_dim
from .sites import Call, Site
from .tape import State, Tape

__all__ = ["Coordinates", "Plain", "Whitened", "whitened"]

_ROWS = 512  # of each call and batch that a Gram matrix is taken from
_DAMPING = 0.1  # of its mean, added to its diagonal; more where there are few rows
_MOST = 640  # inputs that are whitened together, room for 64 channels in a window of 3 x 3; more are taken in parts


class Coordinates(Protocol):
    """How a tensor is written while it is fitted."""

    def inside(self, tensor: Tensor) -> Tensor:
        """The coordinates of ``tensor``."""

    def outside(self, value: Tensor) -> Tensor:
        """The tensor whose coordinates ``value`` are."""


class Plain:
    """A tensor as it is."""

    def inside(self, tensor: Tensor) -> Tensor:
        return tensor

    def outside(self, value: Tensor) -> Tensor:
        return value


@dataclass(frozen=True, eq=False)
class Whitened:
    """``root``, ``inverse``: (groups, parts, inputs of a part, the same), symmetric, and the inverse of each other, in
    float32 at least; ``shape``: the weight's. Coordinates are of shape (groups, parts, outputs of a group, inputs of a
    part)."""

    geometry: Geometry
    shape: tuple[int, ...]
    root: Tensor
    inverse: Tensor

    def inside(self, tensor: Tensor) -> Tensor:
        return _in_parts(self.geometry.rows_of(tensor), *self.root.shape[1:3]).transpose(1, 2) @ self.inverse

    def outside(self, value: Tensor) -> Tensor:
        rows = (value @ self.root).transpose(1, 2).flatten(2)
        length = math.prod(self.shape) // (rows.shape[0] * rows.shape[1])
        return self.geometry.weight_of(rows[..., :length], self.shape)


@torch.no_grad()
def whitened(
    sites: Sequence[Site], tape: Tape, batches: Iterable[Sequence[Tensor]], generator: torch.Generator
) -> list[Whitened]:
    """The coordinates of each site's weight, by what it reads when ``tape`` runs over ``batches`` (flat tensor inputs
    of the model). Inputs that no weight is left for are as they were."""
    grams = [_Gram(site) for site in sites]
    calls = [(call, gram) for site, gram in zip(sites, grams, strict=True) for call in site.calls]
    calls.sort(key=lambda one: tape.place[one[0].node])
    for leaves in batches:
        state = tape.start(leaves)
        for call, gram in calls:
            tape.advance(state, call.node)
            gram.add(_rows(gram.geometry, call, tape, state, generator))
    return [gram.coordinates() for gram in grams]


def _rows(geometry: Geometry, call: Call, tape: Tape, state: State, generator: torch.Generator) -> Tensor:
    """What a call reads at some places: (groups, rows, inputs of a group x window)."""
    dim = batch_dim(call.node)
    maps = geometry.by_example(tape.value(state, call.node.args[0]), dim)
    out = geometry.by_example(tape.call(call.node, lambda node: _without_data(tape.value(state, node))), dim)
    chosen = _drawn(1, len(out), _ROWS, generator)[0]
    places = _drawn(len(chosen), out[0, 0].numel(), math.ceil(_ROWS / len(chosen)), generator)
    found = geometry.patches(maps[chosen.to(maps.device)], places.to(maps.device), out.shape[2:])
    return found.flatten(0, 1).transpose(0, 1)


def _drawn(count: int, total: int, wanted: int, generator: torch.Generator) -> Tensor:
    """``count`` times ``wanted`` of ``total`` numbers, int64, or all of them where there are no more."""
    if wanted >= total:
        return torch.arange(total).expand(count, total)
    return torch.randint(total, (count, wanted), generator=generator)


def _without_data(value: Any) -> Any:
    """For the size of what is written, nothing has to be computed."""
    return value.to("meta") if isinstance(value, Tensor) else value


class _Gram:
    """The Gram matrix of what a layer reads, without what lies between parts."""

    def __init__(self, site: Site) -> None:
        self._site, self.geometry = site, site.geometry
        rows = self.geometry.rows_of(site.weight.detach())
        parts = math.ceil(rows.shape[2] / _MOST)
        self._parts, self._size, self._count = parts, math.ceil(rows.shape[2] / parts), 0
        self._kept = _in_parts((rows != 0).any(1, keepdim=True), parts, self._size).squeeze(1)
        self._sum = rows.new_zeros(len(rows), parts, self._size, self._size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """More rows: (groups, rows, inputs of a group x window)."""
        cut = _in_parts(rows, self._parts, self._size).transpose(1, 2).double()
        self._sum += cut.mT @ cut
        self._count += rows.shape[1]

    def coordinates(self) -> Whitened:
        """Where a part has more inputs than there were rows, most of its directions are only noise, so the fewer the
        rows the more is added to the diagonal. Inputs that are NaN or infinite somewhere are left alone."""
        kept = self._kept & self._sum.diagonal(dim1=2, dim2=3).isfinite()
        gram = torch.where(kept.unsqueeze(3) & kept.unsqueeze(2), self._sum, 0)
        diagonal = gram.diagonal(dim1=2, dim2=3)
        inputs = kept.sum(2, keepdim=True)
        mean = diagonal.sum(2, keepdim=True) / inputs.clamp_min(1)
        mean = torch.where(mean > 0, mean, 1)
        damping = (inputs / max(1, self._count)).clamp_min(_DAMPING)
        diagonal.add_(torch.where(kept, damping, 1) * mean)  # a view of it
        values, vectors = torch.linalg.eigh(gram / mean.unsqueeze(3))
        scale = values.clamp_min(_DAMPING / 2).rsqrt().unsqueeze(2)  # at least _DAMPING but for rounding
        root, inverse = (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT
        weight = self._site.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return Whitened(self.geometry, tuple(weight.shape), root.to(dtype), inverse.to(dtype))


def _in_parts(rows: Tensor, parts: int, size: int) -> Tensor:
    """(groups, anything, inputs) as (groups, anything, parts, inputs of a part), zeros at the end."""
    return F.pad(rows, (0, parts * size - rows.shape[2])).unflatten(2, (parts, size))

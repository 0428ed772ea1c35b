"""Rows of a layer's regression: what it reads in the repaired network, what it should write, at some places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import NonFiniteError
from .geometry import gathered
from .moments import Moments
from .norms import affine_of
from .sites import Call, Site
from .tape import Frontier, State, Tape

__all__ = ["HELD_OUT", "Sums", "gather", "is_held_out"]

#: Every eighth example is held out: none of it is used in a regression, and what is kept is judged by it.
HELD_OUT = 8
_ROWS_AN_UNKNOWN = 8
_LEAST_ROWS = 20_000
_CHUNK = 1 << 23  # entries of the rows that are in memory at once
_LEAST_SCALE = 1e-6  # of the largest: a channel that a batch norm all but removes tells nothing about its input


def is_held_out(numbers: Tensor) -> Tensor:
    """Which examples, by their number over all batches, are held out."""
    return numbers % HELD_OUT == 1


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the examples that are used, and of those that are held out."""

    used: Moments
    held: Moments


def gather(site: Site, frontier: Frontier, sizes: Sequence[int], seed: int) -> Sums:
    """Run both networks to the layer, for all batches, and sum up its regression.

    Places are drawn for each example by a generator of ``seed``, so that how examples are put into batches changes
    nothing. Raises ``NonFiniteError`` where a value is NaN or infinite.
    """
    gatherer = _Gatherer(site, frontier.tapes, sizes, seed)
    first = site.calls[0]
    frontier.visit((first.node, first.origin), gatherer.add)
    return gatherer.sums


class _Gatherer:
    def __init__(self, site: Site, tapes: Sequence[Tape], sizes: Sequence[int], seed: int) -> None:
        self.sums = Sums(Moments(), Moments())
        self._site, (self._tape, self._original) = site, tapes
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        # One generator a call of the layer: with one for all, the draws would depend on the batches.
        self._generators = [np.random.default_rng((seed, number)) for number in range(len(site.calls))]
        rows = max(_LEAST_ROWS, _ROWS_AN_UNKNOWN * site.unknowns)
        self._rows_an_example = math.ceil(rows / self._starts[-1])

    def add(self, number: int, states: tuple[State, ...]) -> None:
        """One batch: every call of the layer."""
        examples = torch.arange(self._starts[number], self._starts[number + 1])
        for call, generator in zip(self._site.calls, self._generators, strict=True):
            self._tape.advance(states[0], call.node)
            self._original.advance(states[1], call.origin)
            self._add_call(call, states, examples, generator)

    def _add_call(
        self, call: Call, states: tuple[State, ...], examples: Tensor, generator: np.random.Generator
    ) -> None:
        site, geometry, dim = self._site, self._site.geometry, _batch_dim(call.node)
        maps = geometry.by_example(self._tape.value(states[0], call.node.args[0]), dim)
        written = self._original.call(call.origin, lambda node: self._original.value(states[1], node))
        out = geometry.by_example(written, dim)
        owners, wanted = _owners(examples, len(out), self._rows_an_example)
        places = _drawn(generator, len(out), out[0, 0].numel(), wanted).to(out.device)
        held = is_held_out(owners).to(out.device)
        step = max(1, _CHUNK // (places.shape[1] * maps.shape[1] * math.prod(geometry.window)))
        others = self._others(call, states, dim)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            here = places[part]
            rows = geometry.patches(maps[part], here, out.shape[2:])
            target = self._target(call, gathered(out[part].flatten(2), here), [o[part] for o in others], here)
            target = target.unflatten(2, (geometry.groups, -1))
            _check(site.name, rows, target)
            for sums, chosen in ((self.sums.used, ~held[part]), (self.sums.held, held[part])):
                sums.add(rows[chosen].flatten(0, 1), target[chosen].flatten(0, 1))

    def _others(self, call: Call, states: tuple[State, ...], dim: int) -> list[Tensor]:
        """What is added to the result in either network, (examples, channels, ...)."""
        if call.other is None:
            return []
        pairs = zip((self._tape, self._original), states, call.other, strict=True)
        return [self._site.geometry.by_example(tape.value(state, node), dim) for tape, state, node in pairs]

    def _target(self, call: Call, written: Tensor, others: Sequence[Tensor], places: Tensor) -> Tensor:
        """What the layer should write, (examples, places, channels): after the batch norm and the sum behind it, what
        the original has there."""
        target = written.double()
        ours = theirs = None
        if call.norm is not None:
            ours = affine_of(call.norm[0], self._tape.program.tensors)
            theirs = affine_of(call.norm[1], self._original.program.tensors)
        if not others and (ours is None or theirs is None or ours.same_as(theirs)):
            return target
        if theirs is not None:
            target = target * theirs.scale + theirs.offset
        if others:
            here, there = (gathered(other.flatten(2), places).double() for other in others)
            target = target + (there - here)
        if ours is None:
            return target
        usable = ours.scale.abs() > _LEAST_SCALE * ours.scale.abs().max()
        back = (target - ours.offset) / torch.where(usable, ours.scale, 1.0)
        return torch.where(usable, back, written.double())


def _batch_dim(node: fx.Node) -> int:
    """The dimension of what a call writes that the batch size is in; the first where capture fixed it."""
    sizes = node.meta["val"].shape
    return next((dim for dim, size in enumerate(sizes) if not isinstance(size, int)), 0)


def _owners(examples: Tensor, count: int, rows_an_example: int) -> tuple[Tensor, int]:
    """For each of ``count`` maps the example it belongs to, and how many places of it are wanted.

    A layer may see several maps of one example (windows, frames), one after the other.
    """
    if count % len(examples) == 0:
        several = count // len(examples)
        return examples.repeat_interleave(several), math.ceil(rows_an_example / several)
    return torch.arange(count), rows_an_example


def _drawn(generator: np.random.Generator, count: int, total: int, wanted: int) -> Tensor:
    """Places, int64 (count, at most wanted): all where there are no more."""
    if wanted >= total:
        return torch.arange(total).expand(count, total)
    return torch.from_numpy((generator.random((count, wanted)) * total).astype(np.int64))


def _check(name: str, rows: Tensor, target: Tensor) -> None:
    for tensor, what in ((rows, "reads"), (target, "should write")):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name}: what it {what} is NaN or infinite somewhere")

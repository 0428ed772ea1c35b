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
from .norms import Affine, affine_of
from .sites import Call, Site
from .tape import Frontier, State, Tape

__all__ = ["HELD_OUT", "Solution", "Sums", "gather", "is_held_out"]

#: Every eighth example is held out: none of it is used in a regression, and what is kept is judged by it.
HELD_OUT = 8
_ROWS_AN_UNKNOWN = 8
_LEAST_ROWS = 20_000
_CHUNK = 1 << 23  # entries of the rows that are in memory at once


def is_held_out(numbers: Tensor) -> Tensor:
    """Which examples, by their number over all batches, are held out."""
    return numbers % HELD_OUT == 1


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the examples that are used, and of those that are held out.

    ``errors``: for each solution that was tried, the mean square on held-out examples of what it gets wrong behind the
    activation, (groups, M), in units of what the layer itself writes.
    """

    used: Moments
    held: Moments
    errors: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Solution:
    """``weight``: (groups, M, K); ``shift``: the constant added to each output, (groups, M). float64."""

    weight: Tensor
    shift: Tensor


def gather(site: Site, frontier: Frontier, sizes: Sequence[int], seed: int, tried: Sequence[Solution] = ()) -> Sums:
    """Run both networks to the layer, for all batches, and sum up its regression.

    Places are drawn for each example by a generator of ``seed``, so that how examples are put into batches changes
    nothing, and neither does calling this again. If an activation cuts off what the layer writes and there are
    solutions ``tried``, the targets are those for a step from the last of them: see :meth:`_Ends.step`.
    Raises ``NonFiniteError`` where a value is NaN or infinite.
    """
    gatherer = _Gatherer(site, frontier.tapes, sizes, seed, tried)
    first = site.calls[0]
    frontier.visit((first.node, first.origin), gatherer.add)
    return gatherer.sums()


class _Gatherer:
    def __init__(
        self, site: Site, tapes: Sequence[Tape], sizes: Sequence[int], seed: int, tried: Sequence[Solution]
    ) -> None:
        self._used, self._held, self._wrong = Moments(), Moments(), [torch.zeros(()) for _ in tried]
        self._site, (self._tape, self._original), self._tried = site, tapes, tried
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        # One generator a call of the layer: with one for all, the draws would depend on the batches.
        self._generators = [np.random.default_rng((seed, number)) for number in range(len(site.calls))]
        rows = max(_LEAST_ROWS, _ROWS_AN_UNKNOWN * site.unknowns)
        self._rows_an_example = math.ceil(rows / self._starts[-1])

    def sums(self) -> Sums:
        return Sums(self._used, self._held, tuple(wrong / max(1, self._held.count) for wrong in self._wrong))

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
        ends = self._ends(call)
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            here = places[part]
            rows = geometry.patches(maps[part], here, out.shape[2:])
            beside = [gathered(other[part].flatten(2), here).double() for other in others]
            target = ends.target(gathered(out[part].flatten(2), here).double(), beside)
            _check(site.name, rows, target)
            added = beside[0] if beside else torch.zeros(())
            for moments, chosen in ((self._used, ~held[part]), (self._held, held[part])):
                offset = added[chosen].flatten(0, 1) if beside else added
                self._add_rows(moments, ends, rows[chosen].flatten(0, 1), target[chosen].flatten(0, 1), offset)

    def _add_rows(self, moments: Moments, ends: _Ends, rows: Tensor, target: Tensor, added: Tensor) -> None:
        """``rows``: (rows, groups, K); ``target``, ``added``: (rows, outputs)."""
        groups = self._site.geometry.groups
        if ends.clamp is not None and len(rows):
            for number, solution in enumerate(self._tried):
                found = torch.einsum("rgk,gmk->rgm", rows.double(), solution.weight).add_(solution.shift).flatten(1)
                if moments is self._held:
                    wrong = ends.error(found, target, added).square().sum(0).view(groups, -1)
                    self._wrong[number] = self._wrong[number] + wrong
            if self._tried:
                target = ends.step(found, target, added)
        moments.add(rows, target.unflatten(1, (groups, -1)))

    def _ends(self, call: Call) -> _Ends:
        if call.norm is None:
            return _Ends(None, None, call.clamp)
        ours = affine_of(call.norm[0], self._tape.program.tensors)
        theirs = affine_of(call.norm[1], self._original.program.tensors)
        return _Ends(ours, theirs, call.clamp)

    def _others(self, call: Call, states: tuple[State, ...], dim: int) -> list[Tensor]:
        """What is added to the result in either network, (examples, channels, ...)."""
        if call.other is None:
            return []
        pairs = zip((self._tape, self._original), states, call.other, strict=True)
        return [self._site.geometry.by_example(tape.value(state, node), dim) for tape, state, node in pairs]


@dataclass(frozen=True, eq=False)
class _Ends:
    """What follows a layer: a batch norm in either network, and an activation."""

    ours: Affine | None
    theirs: Affine | None
    clamp: tuple[float, float] | None

    def target(self, written: Tensor, beside: Sequence[Tensor]) -> Tensor:
        """What the layer should write so that the original's values come out behind the batch norm and the sum.

        ``written``: by the original's layer, (examples, places, channels); ``beside``: what is added in the masked
        network, and in the original.
        """
        ours, theirs, target = self.ours, self.theirs, written
        if not beside and (ours is None or theirs is None or ours.same_as(theirs)):
            return target
        if theirs is not None:
            target = target * theirs.scale + theirs.offset
        if beside:
            target = target + (beside[1] - beside[0])
        return target if ours is None else torch.where(ours.usable, (target - ours.offset) / ours.divisor, written)

    def step(self, found: Tensor, target: Tensor, added: Tensor) -> Tensor:
        """The targets for the next solution, given what the last one writes.

        Where the activation cuts the target off, whatever it cuts off as well is as good. With these targets a least
        squares step cannot make the error behind the activation larger: (p - step(q))^2 bounds it for every p, and at
        p = q is no more than (q - target)^2. Zhang, Zou, He and Sun 2016, "Accelerating Very Deep Convolutional
        Networks for Classification and Detection", arXiv 1505.06798, section 3.2, alternate in the same way.
        """
        assert self.clamp is not None
        low, high = self.clamp
        values, wanted = self._arriving(found, added), self._arriving(target, added)
        best = torch.where(wanted <= low, values.clamp(max=low), wanted)
        best = torch.where(wanted >= high, values.clamp(min=high), best) - added
        if self.ours is not None:
            best = torch.where(self.ours.usable, (best - self.ours.offset) / self.ours.divisor, target)
        return best

    def error(self, found: Tensor, target: Tensor, added: Tensor) -> Tensor:
        """The difference behind the activation, in units of what the layer itself writes."""
        assert self.clamp is not None
        wrong = self._arriving(found, added).clamp(*self.clamp) - self._arriving(target, added).clamp(*self.clamp)
        return wrong if self.ours is None else wrong / self.ours.divisor

    def _arriving(self, written: Tensor, added: Tensor) -> Tensor:
        """What arrives at the activation."""
        return added + (written if self.ours is None else written * self.ours.scale + self.ours.offset)


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

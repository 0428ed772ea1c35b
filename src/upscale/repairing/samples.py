"""Rows of a layer's regression: what it reads in the repaired network, what it should write, at some places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from .geometry import batch_dim, gathered
from .moments import Moments
from .norms import Affine, affine_of
from .sites import Call, Site
from .tape import Frontier, State

__all__ = ["ALL", "HELD_OUT", "Samples", "Solution", "Sums", "is_held_out"]

#: All entries of a row.
ALL = slice(None)
#: Every eighth example is held out: none of it is used in a regression, and what is kept is judged by it.
HELD_OUT = 8
# Rows of a regression: as many for each unknown as are plenty, between a least and a number above which they are dear,
# and never fewer for each unknown than what makes a regression.
_PLENTY, _LEAST_ROWS, _MANY_ROWS, _ROWS_AN_UNKNOWN = 64, 4_000, 20_000, 8
_CHUNK = 1 << 23  # entries of the rows that are summed up at once
_KEPT_ROWS = 1 << 30  # bytes of rows that are kept for the steps behind an activation


def is_held_out(numbers: Tensor) -> Tensor:
    """Which examples, by their number over all batches, are held out."""
    return numbers % HELD_OUT == 1


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the examples that are used, and of those that are held out: the same object where there are none."""

    used: Moments
    held: Moments


@dataclass(frozen=True, eq=False)
class Solution:
    """``weight``: (groups, M, K); ``shift``: the constant added to each output, (groups, M). float64."""

    weight: Tensor
    shift: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """What the layer writes, (groups, rows, M)."""
        return rows @ self.weight.mT + self.shift.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some rows: ``rows`` (groups, rows, K); ``target`` and ``added``, what the sum adds, (rows, groups x M)."""

    rows: Tensor
    target: Tensor
    added: Tensor
    ends: _Ends
    is_held: bool

    @property
    def bytes_held(self) -> int:
        return self.rows.nbytes + self.target.nbytes + self.added.nbytes


class Samples:
    """The rows of a layer's regression. Places are drawn for each example by a generator of the seed, so that how
    examples are put into batches changes nothing, and neither does going over them again."""

    def __init__(
        self, site: Site, frontier: Frontier, sizes: Sequence[int], seed: int, columns: Tensor | slice = ALL
    ) -> None:
        """``columns``: which entries of a row are used."""
        self._site, self._frontier, self._seed, self._columns = site, frontier, seed, columns
        self._tape, self._original = frontier.tapes
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        plenty = min(max(_LEAST_ROWS, _PLENTY * site.unknowns), max(_LEAST_ROWS, _MANY_ROWS))
        self._rows_an_example = math.ceil(max(plenty, _ROWS_AN_UNKNOWN * site.unknowns) / self._starts[-1])
        self._kept: list[_Chunk] | None = [] if site.calls[0].clamp is not None else None
        self._is_read = False
        self.sums = Sums(Moments(), Moments())
        self._go_over(lambda chunk: self._sums_of(self.sums, chunk).add(chunk.rows, self._grouped(chunk.target)))
        self._is_read = True
        if not self.sums.held.count:  # it reads the same whatever the example: all rows say whether it is right
            self.sums = Sums(self.sums.used, self.sums.used)

    def step(self, last: Solution) -> Sums:
        """The sums for a step from ``last`` behind the activation: see :meth:`_Ends.step`."""
        used = self.sums.used.without_targets()
        sums = Sums(used, used if self._holds_nothing_out else self.sums.held.without_targets())

        def add(chunk: _Chunk) -> None:
            rows = chunk.rows.double()
            target = chunk.ends.step(_flat(last.of(rows)), chunk.target, chunk.added)
            self._sums_of(sums, chunk).add_targets(rows, self._grouped(target))

        self._go_over(add)
        return sums

    def errors(self, tried: Sequence[Solution]) -> list[Tensor]:
        """For each of ``tried`` the mean square on held-out rows of what it gets wrong behind the activation,
        (groups, M), in units of what the layer itself writes."""
        wrong = [torch.zeros(()) for _ in tried]

        def add(chunk: _Chunk) -> None:
            if chunk.is_held or self._holds_nothing_out:
                rows = chunk.rows.double()
                for number, solution in enumerate(tried):
                    found = chunk.ends.error(_flat(solution.of(rows)), chunk.target, chunk.added)
                    wrong[number] = wrong[number] + self._grouped(found.square()).sum(1)

        self._go_over(add)
        return [entry / max(1, self.sums.held.count) for entry in wrong]

    @property
    def _holds_nothing_out(self) -> bool:
        return self.sums.held is self.sums.used

    def _sums_of(self, sums: Sums, chunk: _Chunk) -> Moments:
        return sums.held if chunk.is_held else sums.used

    def _grouped(self, written: Tensor) -> Tensor:
        """(rows, groups x M) as (groups, rows, M)."""
        return written.unflatten(1, (self._site.geometry.groups, -1)).transpose(0, 1)

    def _go_over(self, use: Callable[[_Chunk], None]) -> None:
        """All rows, a chunk at a time: those kept, or, where they are too many, both networks run to the layer."""
        if self._kept is not None and self._is_read:
            for chunk in self._kept:
                use(chunk)
            return
        # One generator a call of the layer: with one for all, the draws would depend on the batches.
        generators = [np.random.default_rng((self._seed, number)) for number in range(len(self._site.calls))]
        first = self._site.calls[0]
        held = 0

        def visit(number: int, states: tuple[State, ...]) -> None:
            nonlocal held
            for chunk in self._chunks(number, states, generators):
                use(chunk)
                held += chunk.bytes_held
                if self._kept is not None and held <= _KEPT_ROWS:
                    self._kept.append(chunk)
                else:
                    self._kept = None

        self._frontier.visit((first.node, first.origin), visit)

    def _chunks(
        self, number: int, states: tuple[State, ...], generators: Sequence[np.random.Generator]
    ) -> Iterator[_Chunk]:
        """Of one batch, every call of the layer. Raises ``NonFiniteError`` where a value is NaN or infinite."""
        examples = torch.arange(self._starts[number], self._starts[number + 1])
        for call, generator in zip(self._site.calls, generators, strict=True):
            self._tape.advance(states[0], call.node)
            self._original.advance(states[1], call.origin)
            yield from self._chunks_of(call, states, examples, generator)

    def _chunks_of(
        self, call: Call, states: tuple[State, ...], examples: Tensor, generator: np.random.Generator
    ) -> Iterator[_Chunk]:
        site, geometry, dim = self._site, self._site.geometry, batch_dim(call.node)
        maps = geometry.by_example(self._tape.value(states[0], call.node.args[0]), dim)
        written = self._original.call(call.origin, lambda node: self._original.value(states[1], node))
        out = geometry.by_example(written, dim)
        owners, wanted = _owners(examples, len(out), self._rows_an_example)
        places = _drawn(generator, len(out), out[0, 0].numel(), wanted).to(out.device)
        held = is_held_out(owners).to(out.device)
        others = self._others(call, states, dim)
        ends = self._ends(call)
        step = max(1, _CHUNK // (places.shape[1] * maps.shape[1] * math.prod(geometry.window)))
        for is_held in (False, True):
            for part in torch.nonzero(held == is_held).flatten().split(step):
                if not len(part):
                    continue
                here = places[part]
                rows = geometry.patches(maps[part], here, out.shape[2:]).flatten(0, 1)[..., self._columns]
                beside = [gathered(other[part].flatten(2), here).double().flatten(0, 1) for other in others]
                target = ends.target(gathered(out[part].flatten(2), here).double().flatten(0, 1), beside)
                _check(site.name, rows, target)
                added = beside[0] if beside else torch.zeros((), device=out.device)
                yield _Chunk(rows.transpose(0, 1).contiguous(), target, added, ends, is_held)

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


def _flat(written: Tensor) -> Tensor:
    """(groups, rows, M) as (rows, groups x M)."""
    return written.transpose(0, 1).flatten(1)


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

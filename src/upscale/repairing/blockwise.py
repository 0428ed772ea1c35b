"""Blocks fitted by gradient descent, from where the regressions have brought them, all of them at once.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", arXiv 2102.05426,
fit a block of a quantised network to the original block's output on unlabelled inputs. Here what is fitted are the
weights that a mask has left, and the errors of all blocks and of the outputs are one sum, so that a block also makes
up for those before it (Romero et al. 2015, "FitNets", arXiv 1412.6550, train on such hints).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..aliases import argument
from ..importance.progress import progress_bar
from ..program import Program, module_path
from .examples import Examples
from .geometry import is_contraction
from .outputs import Outputs, examples_of
from .pair import Inputs, Pair
from .segments import find_segments
from .sites import Site, is_frozen, writer
from .tape import Tape
from .views import View, are_images, are_large, shown, views_of
from .whitening import Coordinates, Plain, whitened

__all__ = ["BLOCK_STEPS", "BlockFit", "fit_blocks"]

BLOCK_STEPS = 1000
_EXAMPLES, _LARGE_EXAMPLES = 32, 16  # of a step; of large images
_RATE, _SHORTER = 0.03, 2.0  # the first rate, and what it is divided by where it is too high
_WARMUP = 20  # steps until a rate is reached
_CHECKS, _EARLY = 8, 4  # parts of the steps, and of the first part, after which the error is looked at
_TOO_HIGH = 1.25  # a rate is too high if the error is so many times the least so far
_LEAST_SCALE = 1e-3  # of a tensor whose values are all but zero
_SEEN = 32  # as many steps' examples, or all steps', say in which coordinates a weight is fitted
_LIFT = 2.0**10  # what gradients are multiplied by where float16 would lose them; to Adam it is all one
BlockFit = tuple[str, float, float]


def fit_blocks(
    pair: Pair,
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Inputs,
    outputs: Outputs,
    steps: int,
    seed: int,
    progress: bool,
) -> tuple[BlockFit, ...]:
    """Fit all blocks of ``model``; (where it ends, its error before, after) of each, on held-out examples.

    Errors are relative to the target's variance. Nothing changes unless the outputs are closer to the original's on
    held-out examples afterwards.
    """
    free = _parameters(pair, model)
    ends = _ends(pair.masked)
    if not free or not ends:
        return ()
    fit = _Fit(pair, inputs, free, ends)
    before, start = fit.errors(), outputs.error()
    fit.whiten(sites, min(steps, _SEEN), seed)
    after = fit.descend(steps, seed, progress, before)
    if after is not before:
        present = [entry.tensor.detach().clone() for entry in free]
        _write(free, fit.fitted())
        if not outputs.error() < start:
            after = before
            _write(free, present)
    names = [module_path(node) or str(node) for node in ends]
    return tuple(zip(names, before.ends, after.ends, strict=True))


def _write(free: Sequence[_Free], values: Sequence[Tensor]) -> None:
    for entry, value in zip(free, values, strict=True):
        entry.write(value)


def _ends(program: Program) -> list[fx.Node]:
    """Where the segments end, and the outputs."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    found = [segment.end for segment in find_segments(program)] + output.all_input_nodes
    return [node for node in dict.fromkeys(found) if node.op == "call_function" and _is_real(node.meta.get("val"))]


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True, eq=False)
class _Free:
    """A tensor that is fitted: its name in the program, itself, where it may change, and how it is written."""

    name: str
    tensor: Tensor
    kept: Tensor
    write: Callable[[Tensor], None]

    def precise(self) -> Tensor:
        """A copy in which small steps count, also of half precision."""
        return _precise(self.tensor.detach().clone())

    def masked(self, value: Tensor) -> Tensor:
        """What ``value`` is as this tensor: zero where it may not change."""
        return (value * self.kept).to(self.tensor.dtype)


def _parameters(pair: Pair, model: nn.Module) -> list[_Free]:
    """Weights, biases, scales and shifts of layers and batch norms."""
    found: dict[str, _Free] = {}
    for node in pair.masked.graph.nodes:
        for slot in _slots(node):
            name = str(slot.target)
            if slot.op != "get_attr" or name in found:
                continue
            tensor, write = pair.masked.tensors[name], writer(model, pair.masked, name)
            if write is not None and tensor.is_floating_point():
                found[name] = _Free(name, tensor, tensor.detach() != 0, write)
    return list(found.values())


def _slots(node: fx.Node) -> Iterator[fx.Node]:
    if is_contraction(node) or (node.target is torch.ops.aten.batch_norm.default and is_frozen(node)):
        for name in ("weight", "bias", "other"):
            value = argument(node, name)
            if isinstance(value, fx.Node):
                yield value


class _Fitted(Tape):
    """The program with other tensors in place of some of its own."""

    def __init__(self, program: Program, device: torch.device) -> None:
        super().__init__(program, device)
        self.replaced: dict[str, Tensor] = {}

    def value(self, state: Any, node: Any) -> Any:
        """The replacement, if there is one."""
        if isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target) in self.replaced:
            return self.replaced[str(node.target)]
        return super().value(state, node)


@dataclass(frozen=True)
class _Errors:
    """On held-out examples: of each end, relative to its target's variance, and the sum of the outputs' squares."""

    ends: list[float]
    outputs: float

    @property
    def mean(self) -> float:
        return fmean(self.ends)


class _Fit:
    def __init__(self, pair: Pair, inputs: Inputs, free: Sequence[_Free], ends: Sequence[fx.Node]) -> None:
        self._free, self._ends, self._targets = free, ends, [pair.origin[node] for node in ends]
        self._ours, self._theirs = _Fitted(pair.masked, inputs.device), Tape(pair.original, inputs.device)
        self._examples = Examples(pair.masked, inputs)
        self._coordinates: list[Coordinates] = [Plain()] * len(free)
        self._values = [entry.precise().requires_grad_() for entry in free]
        self._lifted = _LIFT if any(entry.tensor.dtype == torch.float16 for entry in free) else 1.0
        first = inputs.leaves[0]
        self._count = _LARGE_EXAMPLES if are_images(first) and are_large(first[0]) else _EXAMPLES
        self._view = self._cheapest(views_of(first[0])) if are_images(first) else None

    def fitted(self) -> list[Tensor]:
        """The tensors as they are now; what was zero is zero."""
        return [value.detach() for value in self._replaced().values()]

    def _replaced(self) -> dict[str, Tensor]:
        each = zip(self._free, self._coordinates, self._values, strict=True)
        return {entry.name: entry.masked(way.outside(value)) for entry, way, value in each}

    def whiten(self, sites: Sequence[Site], draws: int, seed: int) -> None:
        """Take the weights of ``sites`` in coordinates in which what they read is white, in so many steps' examples
        (of whole batches also those that are held out)."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (self._examples.draw(self._count, generator)[0] for _ in range(draws))
        seen = (self._shown(leaves, generator) for leaves in drawn)
        ways = whitened(sites, self._ours, seen, generator)
        found = {id(site.weight): way for site, way in zip(sites, ways, strict=True)}
        self._coordinates = [found.get(id(entry.tensor), Plain()) for entry in self._free]
        each = zip(self._coordinates, self._free, strict=True)
        self._values = [way.inside(entry.precise()).requires_grad_() for way, entry in each]

    def descend(self, steps: int, seed: int, progress: bool, before: _Errors) -> _Errors:
        """Adam on the mean of the ends' relative square errors, its rate falling along a cosine. What had the least
        mean on held-out examples, where it was looked at, is what is left in the end, if the outputs are no worse than
        they were; it is gone back to, at a lower rate, where that mean has grown to ``_TOO_HIGH`` times as much.
        ``before``: the errors; returns those that are left."""
        best, least = [value.detach().clone() for value in self._values], before
        rate, since, optimiser = _RATE, 0, self._optimiser()
        generator = torch.Generator().manual_seed(seed)
        checks = _checks(steps)
        with progress_bar("blocks", steps, shown=progress) as advance:
            for step in range(steps):
                since += 1
                share = rate * (1 + math.cos(math.pi * step / steps)) / 2 * min(1.0, since / _WARMUP)
                for group in optimiser.param_groups:
                    group["lr"] = share * group["scale"]
                self._step(optimiser, generator)
                advance()
                if step + 1 not in checks:
                    continue
                found = self.errors()
                if found.mean <= least.mean and found.outputs <= before.outputs:
                    best, least = [value.detach().clone() for value in self._values], found
                elif not found.mean <= _TOO_HIGH * least.mean:
                    self._set(best)
                    rate, since, optimiser = rate / _SHORTER, 0, self._optimiser()
        self._set(best)
        return least

    def _optimiser(self) -> torch.optim.Adam:
        """A step of Adam is of one size whatever the gradient: here it is a share of the root mean square of a tensor's
        coordinates."""
        return torch.optim.Adam(
            {"params": [value], "scale": max(_root_mean_square(value[value != 0]), _LEAST_SCALE)}
            for value in self._values
        )

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for mine, value in zip(self._values, values, strict=True):
                mine.copy_(value)

    @torch.enable_grad()
    def _step(self, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> None:
        leaves, used = self._examples.draw(self._count, generator)
        self._ours.replaced = self._replaced()
        ends = self._compared(self._shown(leaves, generator), used)
        optimiser.zero_grad()
        loss = torch.stack([(got - wanted).square().mean() / _variance(wanted) for got, wanted in ends]).mean()
        (loss * self._lifted).backward()
        optimiser.step()

    def _shown(self, leaves: Sequence[Tensor], generator: torch.Generator) -> Sequence[Tensor]:
        return leaves if self._view is None else [shown(leaves[0], self._view, generator)]

    def _cheapest(self, views: Sequence[View]) -> View:
        return next(filter(self._suits, views[:-1]), views[-1])

    @torch.no_grad()
    def _suits(self, view: View) -> bool:
        """Whether the networks accept ``view``, and what they give for it differs in height and width at most."""
        generator = torch.Generator().manual_seed(0)
        (images,), _ = self._examples.draw(self._count, generator)
        leaves = [shown(images, view, generator)]
        try:
            found = _values(self._theirs, leaves, self._targets) + _values(self._ours, leaves, self._ends)
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        return all(_differ_in_size_only(v, node) for v, node in zip(found, [*self._ends, *self._ends], strict=True))

    @torch.no_grad()
    def errors(self) -> _Errors:
        self._ours.replaced = self._replaced()
        relative, squares = torch.zeros(2, len(self._ends), dtype=torch.float64), 0.0
        for leaves, held in self._examples.held(_EXAMPLES):
            for number, (got, wanted) in enumerate(self._compared(leaves, held)):
                wrong = float((got - wanted).square().mean())
                relative[:, number] += len(leaves[0]) * torch.tensor([wrong, float(_variance(wanted))])
                squares += wrong * wanted.numel() * _is_output(self._ends[number])
        return _Errors((relative[0] / relative[1]).tolist(), squares)

    def _compared(self, leaves: Sequence[Tensor], chosen: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """What each end is and should be, of the examples ``chosen``, in float32 at least."""
        with torch.no_grad():
            wanted = _values(self._theirs, leaves, self._targets)
        got = _values(self._ours, leaves, self._ends)
        if chosen is not None:
            got, wanted = ([examples_of(value, chosen) for value in values] for values in (got, wanted))
        return [(_precise(g), _precise(w)) for g, w in zip(got, wanted, strict=True)]


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _variance(values: Tensor) -> Tensor:
    return values.var(correction=0).clamp_min(torch.finfo(values.dtype).tiny)


def _values(tape: Tape, leaves: Sequence[Tensor], ends: Sequence[fx.Node]) -> list[Tensor]:
    state = tape.start(leaves)
    tape.advance(state, tape.nodes[-1], keep=ends)
    return [state.values[node] for node in ends]


def _checks(steps: int) -> set[int]:
    """After how many steps the error is looked at: more often at first, when a rate shows that it is too high."""
    first = steps // _CHECKS
    return {steps * k // _CHECKS for k in range(1, _CHECKS + 1)} | {first * k // _EARLY for k in range(1, _EARLY)}


def _differ_in_size_only(value: Tensor, node: fx.Node) -> bool:
    """Whether ``value`` is like what capture saw, but for the height and width of an image, and the batch."""
    seen = node.meta["val"]
    sizes = slice(1, 2) if seen.dim() == 4 else slice(1, None)
    return value.dim() == seen.dim() and value.shape[sizes] == seen.shape[sizes]


def _root_mean_square(values: Tensor) -> float:
    return float(values.detach().square().mean().sqrt()) if values.numel() else 0.0

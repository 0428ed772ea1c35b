"""One layer's regression: sample what it reads and what it should write, solve, keep what is better.

He, Zhang and Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168: inputs are
those of the repaired network, targets the original's (equation 1, asymmetric form of section 3.2); where the result
is added to a shortcut, the shortcut's error is part of the target (section 3.1, "residual").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .moments import Moments
from .norms import affine_of
from .report import LayerRepair
from .samples import ALL, Samples, Solution, Sums
from .sites import Site
from .solve import changes
from .tape import Frontier, Tape

__all__ = ["RIDGES", "repair_layer"]

#: What ``ridge="auto"`` chooses from.
RIDGES = tuple(10.0**power for power in range(-6, 2))
_STEPS = 2  # behind an activation; the gain of a third is a tenth of the first's
_EXACT = 1e-12  # relative error that is rounding only


def repair_layer(
    site: Site, frontier: Frontier, sizes: Sequence[int], ridges: Sequence[float], seed: int
) -> LayerRepair:
    """Solve for the weights (and shift) of one layer and write them; the frontier moves to its first call.

    ``sizes``: examples of each batch. Raises ``NonFiniteError`` where the layer reads or should write NaN.
    """
    whole = site.geometry.rows_of(site.weight.detach()).double()
    columns = _used(whole)
    samples = Samples(site, frontier, sizes, seed, columns)
    sums = samples.sums
    rows = whole[..., columns]
    kept = rows != 0
    alive = kept.any(2)
    importance = _importance(site, frontier.tapes[0], alive)
    present = Solution(rows, torch.zeros_like(alive, dtype=torch.float64) + _present_bias(site))
    start = _Fit(site, present, kept, alive, importance, tuple(ridges))
    scale = float((_variance(sums.held) * importance).sum()) or 1.0
    tried, ridge = [present], None
    if start.judged(sums, present) > _EXACT * scale:
        first, ridge = start.best(sums, present)
        tried = [present] if ridge is None else [present, first]
    if site.calls[0].clamp is None or ridge is None:
        errors = [start.judged(sums, solution) for solution in tried]
    else:
        step = replace(start, ridges=(ridge,))
        for _ in range(_STEPS):
            tried.append(step.best(samples.step(tried[-1]), tried[-1])[0])
        errors = [float((error * importance).sum()) for error in samples.errors(tried)]
    best = min(range(len(tried)), key=errors.__getitem__)
    if best:
        solved = torch.zeros_like(whole)
        solved[..., columns] = tried[best].weight
        _write(site, solved, tried[best].shift - present.shift)
    relative = errors[0] / scale, errors[best] / scale
    unknowns = int(kept.sum(2).max()) + (site.shift is not None)
    return LayerRepair(site.name, *relative, ridge if best else None, sums.used.count, unknowns)


@dataclass(frozen=True, eq=False)
class _Fit:
    """What is the same for all regressions of a layer: all solutions start from ``present``.

    ``kept``: bool (groups, M, K); ``alive``: outputs that keep anything, (groups, M); ``importance``: how much the
    error of each counts.
    """

    site: Site
    present: Solution
    kept: Tensor
    alive: Tensor
    importance: Tensor
    ridges: tuple[float, ...]

    def best(self, sums: Sums, last: Solution) -> tuple[Solution, float | None]:
        """The solution of least error on the held-out rows, and its ridge; ``last`` and None where that is best."""
        rows = self.present.weight
        problem = sums.used.regression(rows, self.site.shift is not None)
        best, chosen, at = self.judged(sums, last), last, None
        for ridge, change in zip(self.ridges, changes(problem, self.kept, self.ridges), strict=True):
            weight = rows + change
            shift = self.present.shift
            if self.site.shift is not None:
                shift = torch.where(self.alive, sums.used.shift(weight), shift)
            solution = Solution(weight, shift)
            error = self.judged(sums, solution)
            if error < best:
                best, chosen, at = error, solution, ridge
        return chosen, at

    def judged(self, sums: Sums, solution: Solution) -> float:
        """Mean square error on the held-out rows, summed over the outputs."""
        return float((sums.held.error(solution.weight, solution.shift) * self.importance).sum())


def _used(rows: Tensor) -> Tensor | slice:
    """The columns that any output keeps: nothing has to be known of the others. All if there are none."""
    used = (rows != 0).any(0).any(0)
    return ALL if bool(used.all()) or not bool(used.any()) else torch.nonzero(used).flatten()


def _present_bias(site: Site) -> Tensor | float:
    """The constants that the layer adds now, (groups, M): its bias, whether or not it can be written."""
    return 0.0 if site.bias is None else site.bias.detach().double().view(site.geometry.groups, -1)


def _write(site: Site, rows: Tensor, shift: Tensor) -> None:
    """New weights; what is zero stays zero in the weight's own type too."""
    weight = site.geometry.weight_of(rows, site.weight.shape).to(site.weight.dtype)
    site.write(weight)
    if site.shift is not None:
        moved = site.shift.tensor.double() + site.shift.sign * shift.flatten()
        site.shift.write(moved.to(site.shift.tensor.dtype))


def _variance(moments: Moments) -> Tensor:
    return (moments.yy / moments.count - (moments.y / moments.count).square()).clamp_min(0)


def _importance(site: Site, tape: Tape, alive: Tensor) -> Tensor:
    """How much an output's error counts, (groups, M): by the batch norm's factor; not at all if it is masked."""
    norm = site.calls[0].norm
    if norm is None:
        return alive.double()
    return affine_of(norm[0], tape.program.tensors).scale.square().view_as(alive) * alive

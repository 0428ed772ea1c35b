"""One layer's regression: sample what it reads and what it should write, solve, keep what is better.

He, Zhang and Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168: inputs are
those of the repaired network, targets the original's (equation 1, asymmetric form of section 3.2); where the result
is added to a shortcut, the shortcut's error is part of the target (section 3.1, "residual").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moments
from .norms import affine_of
from .report import LayerRepair
from .samples import gather
from .sites import Site
from .solve import changes
from .tape import Frontier, Tape

__all__ = ["RIDGES", "repair_layer"]

#: What ``ridge="auto"`` chooses from.
RIDGES = tuple(10.0**power for power in range(-6, 2))


def repair_layer(
    site: Site, frontier: Frontier, sizes: Sequence[int], ridges: Sequence[float], seed: int
) -> LayerRepair:
    """Solve for the weights (and shift) of one layer and write them; the frontier moves to its first call.

    ``sizes``: examples of each batch. Raises ``NonFiniteError`` where the layer reads or should write NaN.
    """
    sums = gather(site, frontier, sizes, seed)
    rows = site.geometry.rows_of(site.weight.detach()).double()
    kept = rows != 0
    alive = kept.any(2)
    importance = _importance(site, frontier.tapes[0], alive)
    spread = float((_variance(sums.held) * importance).sum())

    def judged(weight: Tensor, shift: Tensor) -> float:
        return float((sums.held.error(weight, shift) * importance).sum())

    none = torch.zeros_like(alive, dtype=torch.float64)
    present = none + _present_bias(site)
    before = best = judged(rows, present)
    chosen: tuple[float, Tensor, Tensor] | None = None
    if before > 0:
        problem = sums.used.regression(rows, site.shift is not None)
        for ridge, change in zip(ridges, changes(problem, kept, ridges), strict=True):
            weight = rows + change
            shift = torch.where(alive, sums.used.shift(weight), present) if site.shift else present
            error = judged(weight, shift)
            if error < best:
                best, chosen = error, (ridge, weight, shift)
    if chosen is not None:
        _write(site, chosen[1], chosen[2] - present)
    scale = spread if spread > 0 else 1.0
    return LayerRepair(
        site.name, before / scale, best / scale, chosen and chosen[0], sums.used.count, int(kept.sum(2).max())
    )


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

"""Scores of a layer's weight alone, and chance to compare them with."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from ..channels import channel_count, norm_of_rows
from ..errors import InputError
from .subject import ByWeight, Subject

__all__ = ["FPGM", "L1", "L2", "LAMP", "Random"]

_BLOCK = 1 << 24  # entries of the matrix of distances that are held at a time
_CHEAP = 1 << 30  # multiply-adds that take a hundredth of a second in double precision on one core


class L1(ByWeight):
    """Sum of the magnitudes of a channel's weights.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3.1 (there of filters, that is
    on the output side).
    """

    def of(self, rows: Tensor) -> Tensor:
        """``rows``: (channels, ...). Returns (channels,)."""
        return norm_of_rows(rows, 1)


class L2(ByWeight):
    """Euclidean norm of a channel's weights, which Li et al. 2017 (arXiv 1608.08710) compare with L1."""

    def of(self, rows: Tensor) -> Tensor:
        """``rows``: (channels, ...). Returns (channels,)."""
        return norm_of_rows(rows, 2)


class LAMP(ByWeight):
    """Layer-adaptive magnitude: what a channel has of the energy that is left when all smaller ones are gone.

    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611, section 2, scores
    single weights: a weight's square, divided by the sum of the squares of all weights of the layer that are at least
    as large. Here a channel takes the place of a weight, and the sum of its weights' squares that of the square:
    ``s[c] / sum(s[d] for d with s[d] >= s[c])``. Channels of equal size have equal scores, the largest one has 1 (if
    it is alone), a zero channel has 0. Within a layer the order is that of L2; layers compare differently, and with
    ``is_global`` the scores are ranked together as they are.
    """

    compares_layers = True

    def of(self, rows: Tensor) -> Tensor:
        """``rows``: (channels, ...). Returns (channels,), float64, in [0, 1]."""
        energy = norm_of_rows(rows, 2).cpu().double().square()
        ascending = energy.sort().values
        at_least = ascending.flip(0).cumsum(0).flip(0)  # the sum from each place of that order on
        left = at_least[torch.searchsorted(ascending, energy)]  # the first of equals: all of them are in its sum
        return torch.where(energy > 0, energy / left, 0.0)


class FPGM(ByWeight):
    """Distance to the geometric median: channels that others can stand in for have low scores.

    He et al. 2019, "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration", arXiv 1811.00250,
    section 3: the sum of a filter's Euclidean distances to all filters of the layer. A filter is here the slice of
    the weight that belongs to one channel of the side in question; on the input side of a grouped convolution, the
    slice within the channel's own group, compared with those of all groups.

    Distances come from matrix products of the centred slices, in blocks of bounded memory: (channels squared x entries
    of a channel) multiply-adds, half of them saved by symmetry. They are exact up to rounding, which is that of double
    precision in layers where this takes no time to speak of, and else that of the weights. All sums are of doubles.
    """

    def of(self, rows: Tensor) -> Tensor:
        """``rows``: (channels, ...). Returns (channels,), float64 where the device has it."""
        points = rows.flatten(1)
        points = points.to(_precision(points))
        # Distances do not change, but squares no longer hide small differences between filters far from zero.
        points = points - points.mean(dim=0)
        squares = points.square().sum(dim=1)
        total = torch.zeros(len(points), dtype=_widest(points), device=points.device)
        step = max(1, _BLOCK // max(1, len(points)))
        for start in range(0, len(points), step):
            end = min(start + step, len(points))
            products = points[start:end] @ points[start:].T
            distances = products.mul_(-2).add_(squares[start:end, None]).add_(squares[start:]).clamp_(min=0).sqrt_()
            distances.diagonal().zero_()  # of a filter to itself, which rounding leaves above zero
            total[start:end] += distances.sum(dim=1, dtype=total.dtype)
            total[end:] += distances[:, end - start :].sum(dim=0, dtype=total.dtype)
        return total


def _precision(points: Tensor) -> torch.dtype:
    """What distances are computed in: near twins among distant filters need all the digits that can be had."""
    cheap = len(points) ** 2 * points.shape[1] <= _CHEAP
    return _widest(points) if cheap else torch.promote_types(points.dtype, torch.float32)


def _widest(points: Tensor) -> torch.dtype:
    return torch.float32 if points.device.type == "mps" else torch.float64


class Random:
    """Uniform numbers: what a score must beat. The same for the same seed, layer path and number of channels."""

    def __init__(self, seed: int = 0) -> None:
        """Raises ``InputError`` if ``seed`` is not an integer from 0 to 2**63 - 1."""
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError(f"seed must be an integer from 0 to 2**63 - 1, not {seed!r}")
        self._seed = seed

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`."""
        return {name: self._of(name, channel_count(layer, subject.side)) for name, layer in subject.layers.items()}

    def _of(self, name: str, channels: int) -> Tensor:
        # A generator for each layer: a score does not depend on which other layers are masked.
        generator = torch.Generator().manual_seed(self._seed ^ zlib.crc32(name.encode()))
        return torch.rand(channels, generator=generator, dtype=torch.float64)

"""Input channels taken out of a linear map one by one, the others being fitted again each time.

Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal Brain Surgeon"; for blocks of weights
Frantar and Alistarh 2022, "Optimal Brain Compression", arXiv 2208.11580, equation 5; for the channels of a layer
Kurtic, Frantar and Alistarh 2023, "ZipLM", arXiv 2302.04089, section 3.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Path", "eliminate"]

# What is added to the Gram matrix's diagonal, of its mean. With little, the other channels make up for all that the
# examples say they can; with much for less, so that channels that are idle on these examples, or that others stand in
# for on these alone, do not look free: what they do elsewhere shows in their weights. Much is right, but for channels
# that cost next to nothing with little: copies and sums of others. (MobileNetV2, a quarter masked on 500 images, tested
# on 500 of other classes: top-1 67.6 with 0.01 everywhere, 72.2 with 0.5, 74.0 with 1, 73.8 with 2, 71.6 with 8.)
_LITTLE, _MUCH = 0.01, 1.0
_REDUNDANT = 0.05  # of what a channel costs with much damping: what it may cost with little
_SPARSE = 0.25  # share of the channels in memory that are gone when they are dropped from it


@dataclass(frozen=True, eq=False)
class Path:
    """``order``: channels, the first to go first, int64 (channels,); ``costs``: what each removal adds to the error,
    float64 (channels,), in that order; ``weights``: (groups, M, K) after so many removals, zero for what is gone."""

    order: Tensor
    costs: Tensor
    weights: dict[int, Tensor]


@torch.no_grad()
def eliminate(gram: Tensor, weight: Tensor, window: int, factors: Tensor, counts: Collection[int] = ()) -> Path:
    """Remove all channels, each time the one that adds least to the error of the outputs.

    ``gram``: (groups, K, K), float64, K = channels of a group x window; ``weight``: (groups, M, K); ``factors``: how
    much the square of each output's error counts, (groups, M). ``counts``: after how many removals to keep the weights.
    """
    channels = gram.shape[1] // window
    groups = [_Group(*parts, window) for parts in zip(gram, weight, factors, strict=True)]
    left = torch.stack([group.costs() for group in groups])  # (groups, channels)
    order, costs, kept = [], [], {}
    for count in range(1, left.numel() + 1):
        number, channel = divmod(int(left.argmin()), channels)
        costs.append(left[number, channel].clamp_min(0))
        order.append(number * channels + channel)
        groups[number].remove(channel)
        left[number] = groups[number].costs()
        if count in counts:
            kept[count] = torch.stack([group.whole() for group in groups])
    return Path(torch.tensor(order), torch.stack(costs).cpu(), kept)


class _Group:
    """One group's weight and inverse Gram matrices, with little damping and with much, for the channels ``self._here``;
    ``self._gone``: those removed."""

    def __init__(self, gram: Tensor, weight: Tensor, factors: Tensor, window: int) -> None:
        size = len(gram)
        mean = gram.diagonal().mean()
        self._scale = torch.where(mean > torch.finfo(gram.dtype).tiny, mean, 1.0)  # 0: it reads a constant
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
        self._inverse = torch.linalg.inv(
            torch.stack([gram / self._scale + damping * identity for damping in (_LITTLE, _MUCH)])
        )
        self._weight, self._root, self._window = weight.clone(), factors.sqrt().unsqueeze(1), window
        self._channels = size // window
        self._here = torch.arange(self._channels, device=gram.device)
        self._place = {channel: channel for channel in range(self._channels)}  # on the host: nothing waits for a GPU
        self._gone = torch.zeros_like(self._here, dtype=torch.bool)
        self._redundant = self._gone  # those that cost next to nothing with little damping

    def costs(self) -> Tensor:
        """What the removal of each channel would add to the error, (channels,); infinite for those that are gone."""
        found = torch.full((self._channels,), torch.inf, dtype=self._weight.dtype, device=self._weight.device)
        if len(self._here):
            columns = (self._weight * self._root).view(len(self._root), -1, self._window)
            if self._window == 1:
                both = columns.square().sum((0, 2)) / self._inverse.diagonal(dim1=1, dim2=2)
            else:
                squares = torch.einsum("mcv,mcw->cvw", columns, columns)
                both = torch.linalg.solve(self._blocks(), squares).diagonal(dim1=2, dim2=3).sum(2)
            self._redundant = both[0] < _REDUNDANT * both[1]
            here = torch.where(self._redundant, both[0], both[1])
            found[self._here] = (self._scale * here).masked_fill(self._gone, torch.inf)
        return found

    def _blocks(self) -> Tensor:
        """Of the inverse matrices, the block of each channel: (2, channels, window, window); the identity for those
        gone."""
        places = torch.arange(len(self._weight[0]), device=self._gone.device).view(-1, self._window)
        blocks = self._inverse[:, places.unsqueeze(2), places.unsqueeze(1)]
        identity = torch.eye(self._window, dtype=blocks.dtype, device=blocks.device)
        return torch.where(self._gone[:, None, None], identity, blocks)

    def remove(self, channel: int) -> None:
        """Take one channel out and fit the others to what it wrote."""
        at = self._place.pop(channel)
        span = slice(at * self._window, (at + 1) * self._window)
        change = torch.linalg.solve(self._inverse[:, span, span], self._inverse[:, span])  # (2, window, K)
        fitted = torch.where(self._redundant[at], change[0], change[1])
        self._weight.addmm_(self._weight[:, span].clone(), fitted, alpha=-1)
        self._inverse.baddbmm_(self._inverse[:, :, span].clone(), change, alpha=-1)
        self._weight[:, span] = 0
        self._inverse[:, span], self._inverse[:, :, span] = 0, 0
        self._gone[at] = True
        if len(self._place) < (1 - _SPARSE) * len(self._gone):
            self._drop()

    def _drop(self) -> None:
        """Forget the channels that are gone: they would be computed with all the same."""
        kept = ~self._gone
        wide = kept.repeat_interleave(self._window)
        self._weight, self._inverse = self._weight[:, wide], self._inverse[:, wide][:, :, wide]
        self._here, self._gone, self._redundant = self._here[kept], self._gone[kept], self._redundant[kept]
        self._place = {channel: place for place, channel in enumerate(sorted(self._place))}

    def whole(self) -> Tensor:
        """The weight with all its columns, (M, K)."""
        found = self._weight.new_zeros(len(self._weight), self._channels, self._window)
        found[:, self._here] = self._weight.view(len(self._weight), -1, self._window)
        return found.flatten(1)

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

_SPARSE = 0.25  # share of the channels in memory that are gone when they are dropped from it


@dataclass(frozen=True, eq=False)
class Path:
    """``order``: channels, the first to go first, int64 (channels,); ``costs``: what each removal adds to the error,
    float64 (channels,), in that order; ``weights``: (groups, M, K) after so many removals, zero for what is gone."""

    order: Tensor
    costs: Tensor
    weights: dict[int, Tensor]


@torch.no_grad()
def eliminate(
    gram: Tensor, weight: Tensor, window: int, factors: Tensor, damping: float, counts: Collection[int] = ()
) -> Path:
    """Remove all channels, each time the one that adds least to the error of the outputs.

    ``gram``: (groups, K, K), float64, K = channels of a group x window; ``weight``: (groups, M, K); ``factors``: how
    much the square of each output's error counts, (groups, M). ``damping``: what is added to the Gram matrix's
    diagonal, of its mean. ``counts``: after how many removals to keep the weights.
    """
    channels = gram.shape[1] // window
    groups = [_Group(*parts, window, damping) for parts in zip(gram, weight, factors, strict=True)]
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
    """One group's weight and inverse Gram matrix, for the channels ``self._here``; ``self._gone``: those removed."""

    def __init__(self, gram: Tensor, weight: Tensor, factors: Tensor, window: int, damping: float) -> None:
        size = len(gram)
        mean = gram.diagonal().mean()
        self._scale = torch.where(mean > torch.finfo(gram.dtype).tiny, mean, 1.0)  # 0: it reads a constant
        damped = gram / self._scale + damping * torch.eye(size, dtype=gram.dtype, device=gram.device)
        self._inverse = torch.linalg.inv(damped)
        self._weight, self._root, self._window = weight.clone(), factors.sqrt().unsqueeze(1), window
        self._channels = size // window
        self._here = torch.arange(self._channels, device=gram.device)
        self._place = {channel: channel for channel in range(self._channels)}  # on the host: nothing waits for a GPU
        self._gone = torch.zeros_like(self._here, dtype=torch.bool)

    def costs(self) -> Tensor:
        """What the removal of each channel would add to the error, (channels,); infinite for those that are gone."""
        found = torch.full((self._channels,), torch.inf, dtype=self._weight.dtype, device=self._weight.device)
        if len(self._here):
            columns = (self._weight * self._root).view(len(self._root), -1, self._window)
            if self._window == 1:
                here = columns.square().sum((0, 2)) / self._inverse.diagonal()
            else:
                squares = torch.einsum("mcv,mcw->cvw", columns, columns)
                here = torch.linalg.solve(self._blocks(), squares).diagonal(dim1=1, dim2=2).sum(1)
            found[self._here] = (self._scale * here).masked_fill(self._gone, torch.inf)
        return found

    def _blocks(self) -> Tensor:
        """Of the inverse matrix, the block of each channel: (channels, window, window); the identity for those gone."""
        places = torch.arange(len(self._weight[0]), device=self._gone.device).view(-1, self._window)
        blocks = self._inverse[places.unsqueeze(2), places.unsqueeze(1)]
        identity = torch.eye(self._window, dtype=blocks.dtype, device=blocks.device)
        return torch.where(self._gone[:, None, None], identity, blocks)

    def remove(self, channel: int) -> None:
        """Take one channel out and fit the others to what it wrote."""
        at = self._place.pop(channel)
        span = slice(at * self._window, (at + 1) * self._window)
        if self._window == 1:
            change = self._inverse[span] / self._inverse[at, at]
        else:
            change = torch.linalg.solve(self._inverse[span, span], self._inverse[span])  # (window, K)
        self._weight.addmm_(self._weight[:, span].clone(), change, alpha=-1)
        self._inverse.addmm_(self._inverse[:, span].clone(), change, alpha=-1)
        self._weight[:, span] = 0
        self._inverse[span], self._inverse[:, span] = 0, 0
        self._gone[at] = True
        if len(self._place) < (1 - _SPARSE) * len(self._gone):
            self._drop()

    def _drop(self) -> None:
        """Forget the channels that are gone: they would be computed with all the same."""
        kept = ~self._gone
        wide = kept.repeat_interleave(self._window)
        self._weight, self._inverse = self._weight[:, wide], self._inverse[wide][:, wide]
        self._here, self._gone = self._here[kept], self._gone[kept]
        self._place = {channel: place for place, channel in enumerate(sorted(self._place))}

    def whole(self) -> Tensor:
        """The weight with all its columns, (M, K)."""
        found = self._weight.new_zeros(len(self._weight), self._channels, self._window)
        found[:, self._here] = self._weight.view(len(self._weight), -1, self._window)
        return found.flatten(1)

"""The rank of feature maps as the importance of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .batches import FromBatches, feed
from .subject import Subject
from .watch import Watch, as_maps, check_reached

__all__ = ["HRank"]

_BLOCK = 1 << 22  # entries of the maps that are decomposed at a time


class HRank(FromBatches):
    """Average rank of a channel's feature maps: of low rank, they hold little information.

    Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map", arXiv 2002.10179, section 3: the rank
    of the (height, width) matrix that a filter makes of an image, averaged over images. The feature map is the one
    that the channel *is*. On the input side it is what the layer reads. On the output side it is what the layer
    writes, after the batch norm and the activation where these follow with nothing else reading it before; the paper
    too takes the map after them.

    The rank is that of ``torch.linalg.matrix_rank`` with its default tolerance. Of volumes every slice counts as a map
    of its own. What has no second dimension (sequences, vectors) has rank 1 or 0: the score is then the share of
    examples for which the channel is not zero throughout. Singular values are dear: a few hundred images of 32 x 32
    pixels, or a few of 224 x 224, give much the same order as more.

    Parameters
    ----------
    batches:
        What the model is called with; see :func:`upscale.importance.batches.feed`. Labels are ignored.
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`."""
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def note(name: str, value: Tensor) -> None:
            maps = as_maps(name, subject.layers[name], subject.side, value)
            if maps is not None:
                ranks = ranks_of(maps)
                totals[name] = totals.get(name, 0) + ranks.sum(dim=0).cpu().double()
                counts[name] = counts.get(name, 0) + len(ranks)

        watch = Watch(subject.model, subject.layers, subject.side, note)
        feed(subject.model, self._batches, "ranks of feature maps", watch=watch)
        check_reached(subject.layers, totals)
        return {name: total / counts[name] for name, total in totals.items()}


def ranks_of(maps: Tensor) -> Tensor:
    """The rank of each map of (examples, channels, ...), averaged over slices: (examples, channels), float32."""
    if maps.ndim < 4 or 1 in maps.shape[-2:]:
        slices = maps.reshape(*maps.shape[:2], *maps.shape[2:-2], -1)  # (examples, channels, slices..., entries)
        return slices.ne(0).any(dim=-1).float().reshape(*maps.shape[:2], -1).mean(dim=2)
    matrices = maps.flatten(0, -3)
    if matrices.dtype in (torch.float16, torch.bfloat16):
        matrices = matrices.float()
    step = max(1, _BLOCK // matrices[0].numel())
    ranks = torch.cat([torch.linalg.matrix_rank(part) for part in matrices.split(step)])
    return ranks.float().view(*maps.shape[:2], -1).mean(dim=2)

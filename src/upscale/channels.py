"""The geometry of a layer's weight: which of its entries belong to one input or output channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "LAYERS",
    "Side",
    "channel_count",
    "channel_dim",
    "channel_rows",
    "entries_of",
    "is_layer",
    "norm_of_rows",
    "norm_per_channel",
    "per_channel",
]

Side = Literal["input", "output"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)  # the layers that masks are made for


def is_layer(module: nn.Module) -> bool:
    """Whether masks are made for ``module``: one of :data:`LAYERS`, or a linear layer stored as (in, out)."""
    return isinstance(module, LAYERS) or _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    """A linear layer with a weight of shape (in, out), as GPT-2's are: told by its counts ``nx`` and ``nf``."""
    weight = module._parameters.get("weight")
    counts = (getattr(module, "nx", None), getattr(module, "nf", None))
    return weight is not None and weight.ndim == 2 and tuple(weight.shape) == counts


def channel_count(layer: nn.Module, side: Side) -> int:
    """Number of channels that ``layer`` reads (``"input"``) or writes (``"output"``)."""
    if _is_transposed_linear(layer):
        return int(layer.nx if side == "input" else layer.nf)  # type: ignore[arg-type]
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "input" else layer.out_features
    return int(layer.in_channels if side == "input" else layer.out_channels)  # type: ignore[arg-type]


def entries_of(layer: nn.Module, side: Side, channels: Tensor) -> Tensor:
    """Boolean tensor, broadcastable to the weight's shape: True at every entry that belongs to one of
    ``channels``.

    ``channels``: bool, one per channel of that side. Exact for any number of groups: an input channel of a
    grouped convolution belongs to the rows of its own group only.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dim, groups = channel_dim(layer, side)
    if groups == 1:
        shape = [1] * weight.ndim
        shape[dim] = -1
        return channels.view(shape)
    # Dimension 0 is ordered by group: spread each group's channels over its own block of it.
    spread = channels.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return spread.reshape(*spread.shape, *([1] * (weight.ndim - 2)))


def per_channel(layer: nn.Module, side: Side, scores: Tensor) -> Tensor:
    """Sum element scores (in the weight's shape) over each channel of ``side``: one number a channel."""
    dim, groups = channel_dim(layer, side)
    flat = scores.flatten(2).sum(dim=2) if scores.ndim > 2 else scores
    if groups == 1:
        return flat.sum(dim=1 - dim)
    return flat.reshape(groups, flat.shape[0] // groups, flat.shape[1]).sum(dim=1).flatten()


def norm_per_channel(layer: nn.Module, side: Side, order: int) -> Tensor:
    """L1 or L2 norm of the weight's entries in each channel of ``side``; see :func:`norm_of_rows`."""
    return norm_of_rows(channel_rows(layer, side).detach(), order)


def norm_of_rows(rows: Tensor, order: int) -> Tensor:
    """L1 or L2 norm of each row (channels, ...), without a tensor of the rows' size.

    Of half-precision weights in float32: sums of squares need the range.
    """
    dtype = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(rows, order, dim=list(range(1, rows.ndim)), dtype=dtype)


def channel_rows(layer: nn.Module, side: Side) -> Tensor:
    """The weight as (channels, ...): a row holds the entries of one channel of ``side``.

    A view, but for the folded side of a grouped convolution.
    """
    dim, groups = channel_dim(layer, side)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if groups == 1:
        return weight.movedim(dim, 0)
    blocks = weight.unflatten(0, (groups, -1))  # (groups, rows of a group, columns, window)
    return blocks.movedim(2, 1).flatten(0, 1)


def channel_dim(layer: nn.Module, side: Side) -> tuple[int, int]:
    """The weight dimension that counts the channels of ``side``, and into how many groups that count is
    folded.

    Folded counts are always in dimension 1.
    """
    if isinstance(layer, nn.Linear):
        return (1 if side == "input" else 0), 1
    if _is_transposed_linear(layer):
        return (0 if side == "input" else 1), 1
    groups = int(layer.groups)  # type: ignore[arg-type]
    # A convolution's weight is (out, in / groups, ...), a transposed one's (in, out / groups, ...).
    folded_side = "output" if isinstance(layer, _TRANSPOSED) else "input"
    return (1, groups) if side == folded_side else (0, 1)

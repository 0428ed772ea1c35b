"""Large tensors without large temporaries: a weight can be most of a model, and a copy of it most of the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

__all__ = ["all_finite", "cut", "in_format_of"]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    tensor = tensor.detach()
    if not tensor.numel():
        return True
    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        # isfinite would make an absolute value and three masks of the tensor's size; both extremes pass a NaN on.
        return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
    return bool(torch.isfinite(tensor).all())


def cut(tensor: torch.Tensor, chosen: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """A new tensor with the chosen positions of each dimension (at most two of them), in that order, in the memory
    format of the old one: a convolution would otherwise convert its weight at every call."""
    return in_format_of(tensor, _cut(tensor, chosen))


def in_format_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` channels-last where ``old`` is, else as it stands."""
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        last = old.dim() == new.dim() == rank and old.is_contiguous(memory_format=memory_format)
        if last and not old.is_contiguous():
            return new.contiguous(memory_format=memory_format)
    return new


def _cut(tensor: torch.Tensor, chosen: Mapping[int, Sequence[int]]) -> torch.Tensor:
    cuts = {dim: items for dim, items in chosen.items() if tuple(items) != tuple(range(tensor.shape[dim]))}
    index = {dim: torch.tensor(list(items), dtype=torch.int64, device=tensor.device) for dim, items in cuts.items()}
    if not index:
        return tensor.clone()
    if len(index) == 1:
        ((dim, only),) = index.items()
        return tensor.index_select(dim, only)
    # both at once: one after the other would need a tensor of a size in between as well
    (low, rows), (high, columns) = sorted(index.items())
    moved = tensor.movedim((low, high), (0, 1))[rows[:, None], columns]
    return moved.movedim((0, 1), (low, high)).contiguous()

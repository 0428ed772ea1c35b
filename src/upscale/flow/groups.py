"""Grouped convolutions: every group that stays must keep equally many channels, so some stay that nobody needs."""

from __future__ import annotations

import numpy as np
import torch


def rectangle(needed: np.ndarray, groups: np.ndarray, prefer: np.ndarray | None = None) -> np.ndarray:
    """The smallest superset of ``needed`` (bool: groups, channels of one) with equally many in all of ``groups``.

    Filled up with ``prefer`` first (channels that are there anyway), then from the first channel on; at least one
    channel a group.
    """
    result = needed & groups[:, None]
    if not groups.any():
        return result
    width = max(1, int(result.sum(1).max()))
    rank = np.arange(needed.shape[1])[None, :] + needed.shape[1] * (1 if prefer is None else ~prefer)
    order = np.argsort(np.where(result, -1, rank), axis=1, kind="stable")[:, :width]
    np.put_along_axis(result, order, True, axis=1)
    return result & groups[:, None]


def grouped_rows(kept: np.ndarray, groups: int) -> np.ndarray:
    """Output channels to keep (bool, flat) so that all groups that stay are of one size."""
    table = kept.reshape(groups, -1)
    return rectangle(table, np.any(table, axis=1)).reshape(-1)


def grouped_inputs(needed: np.ndarray, rows: np.ndarray, groups: int, prefer: np.ndarray | None = None) -> np.ndarray:
    """Input channels to read (bool, flat), given those needed and the output channels that are kept."""
    there = None if prefer is None else prefer.reshape(groups, -1)
    return rectangle(needed.reshape(groups, -1), np.any(rows.reshape(groups, -1), axis=1), there).reshape(-1)


def as_rows(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A grouped transposed convolution's weight (in, out / groups, ...) as that of a convolution:
    (out, in / groups, ...)."""
    parted = weight.unflatten(0, (groups, weight.shape[0] // groups))
    return parted.transpose(1, 2).flatten(0, 1)


def as_transposed(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Inverse of :func:`as_rows`."""
    return as_rows(rows, groups)  # the same exchange of two dimensions inside every group

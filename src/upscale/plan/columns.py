"""The ordering problem in small: channels that nobody tells apart are one element, equal wishes one reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .consecutive import Tree, bits, chain, free


@dataclass(frozen=True)
class Columns:
    """Elements, numbered by the original order.

    Putting channels that the same readers want, and that the same tensors hold, side by side never adds a run to any
    reader. In a frozen block only neighbours are put together.

    ``channels[e]``: the channels of element e. ``block[e]``: its block. ``wanted``, ``present``: bool, readers x
    elements. ``tree``: the orders that keep blocks together and frozen blocks in order.
    """

    channels: tuple[np.ndarray, ...]
    block: np.ndarray
    frozen: tuple[bool, ...]
    block_order_free: bool
    wanted: np.ndarray
    present: np.ndarray
    tree: Tree

    def expand(self, order: Sequence[int] | np.ndarray) -> np.ndarray:
        """The channels in this order of the elements."""
        return np.concatenate([self.channels[int(e)] for e in order])


def further_runs(columns: Columns) -> np.ndarray:
    """How many runs beyond the first the blocks force on each reader, whatever the order.

    A block that a reader wants in part has an end of one of its runs inside, a frozen one all that it has as it is.
    """
    frozen = np.array(columns.frozen)
    forced = []
    for wanted, present in zip(columns.wanted, columns.present, strict=True):
        block, flags = columns.block[present], wanted[present]
        inside = (flags[1:] != flags[:-1]) & (block[1:] == block[:-1])
        ends = np.bincount(block[1:][inside], minlength=len(frozen))
        forced.append(int(np.where(frozen, ends, np.minimum(ends, 1)).sum() + 1) // 2 - 1)
    return np.maximum(forced, 0)


def group_columns(
    blocks: Sequence[np.ndarray],
    frozen: Sequence[bool],
    block_order_free: bool,
    wanted: np.ndarray,
    present: np.ndarray,
) -> Columns:
    """Group channels. ``wanted``, ``present``: bool, readers x channels. ``frozen``: one flag per block."""
    kinds = _kinds(np.concatenate([wanted, present]))
    channels: list[np.ndarray] = []
    block: list[int] = []
    trees: list[Tree] = []
    loose = 0
    for number, (held, fixed) in enumerate(zip(blocks, frozen, strict=True)):
        parts = _neighbours(held, kinds[held]) if fixed else _alike(held, kinds[held])
        mine = range(len(channels), len(channels) + len(parts))
        channels.extend(parts)
        block.extend([number] * len(parts))
        if len(parts) == 1 or (not fixed and len(blocks) == 1):
            loose |= bits(mine)
        elif parts:
            trees.append(chain([free(1 << e) for e in mine], 1) if fixed else free(bits(mine)))
        if loose and not block_order_free and len(blocks) > 1:
            trees.append(free(loose))
            loose = 0
    tree = free(loose, trees) if block_order_free or len(trees) < 2 else chain(trees, 1)
    first = np.array([c[0] for c in channels])
    return Columns(
        tuple(channels), np.array(block), tuple(frozen), block_order_free, wanted[:, first], present[:, first], tree
    )


def _kinds(flags: np.ndarray) -> np.ndarray:
    """A number per column, the same for equal columns."""
    packed = np.ascontiguousarray(np.packbits(flags, axis=0).T)
    return np.unique(packed.view(f"V{packed.shape[1]}").reshape(-1), return_inverse=True)[1].reshape(-1)


def _alike(held: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
    """Channels of one kind together, kinds by their first channel."""
    _, first, inverse, counts = np.unique(kinds, return_index=True, return_inverse=True, return_counts=True)
    by_kind = np.split(held[np.argsort(inverse.reshape(-1), kind="stable")], np.cumsum(counts)[:-1])
    return [by_kind[k] for k in np.argsort(first)] if len(held) else []


def _neighbours(held: np.ndarray, kinds: np.ndarray) -> list[np.ndarray]:
    return np.split(held, np.flatnonzero(np.diff(kinds)) + 1) if len(held) else []

"""What the plan records of each space: who makes its channels, who reads which of them, and their order.

Plain data for reports. Lowering does not look at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .search import runs

__all__ = ["Port", "Space", "SpaceReader", "flags"]


@dataclass(frozen=True)
class Port:
    """A call that makes channels of a space. ``step``: its place in the captured graph."""

    call: str
    layer: str
    step: int


@dataclass(frozen=True)
class SpaceReader:
    """One call's read of one tensor of a space.

    ``wanted``: the channels it needs; ``present``: those that the tensor holds (None: all that the space keeps); both
    as the space numbers them, ascending. ``key``: the read in ``Plan.reads``, as (reader, operand); it may be that of
    an elementwise chain which reads on behalf of ``call``. ``step``: the call's place in the captured graph.
    """

    call: str
    layer: str
    step: int
    tensor: str
    key: tuple[str, str]
    wanted: tuple[int, ...]
    present: tuple[int, ...] | None = None

    def slices(self, order: Sequence[int] | np.ndarray) -> int:
        """How many runs of neighbouring channels this read has, where the tensor's channels stand in ``order``."""
        wanted = flags(order, self.wanted)[flags(order, self.present)]
        return int(runs(wanted)) if len(wanted) else 0


def flags(order: Sequence[int] | np.ndarray, chosen: Sequence[int] | None) -> np.ndarray:
    """Per place of ``order``, whether its channel is one of ``chosen`` (None: of all); no channel is negative, but
    for places that hold none."""
    channels = np.asarray(order, dtype=np.int64)
    if chosen is None:
        return channels >= 0
    table = np.zeros(max(int(channels.max(initial=-1)), max(chosen, default=-1)) + 2, dtype=bool)
    table[list(chosen)] = True
    return table[channels]  # the last entry, that of -1, is never set


@dataclass(frozen=True)
class Space:
    """Channels that are ordered together.

    Channels are numbered from 0 to ``channels - 1`` in their original order. ``order``: those that stay, as they stand
    after planning. A number may stand for a block of channels that stay or go together (an attention head).
    """

    name: str
    channels: int
    order: tuple[int, ...]
    producers: tuple[Port, ...]
    readers: tuple[SpaceReader, ...]

    @property
    def original(self) -> tuple[int, ...]:
        """The channels that stay, in their original order."""
        return tuple(sorted(self.order))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Space:
        """Inverse of ``dataclasses.asdict``, also after a round trip through JSON."""
        producers = tuple(Port(**p) for p in data["producers"])
        readers = tuple(_reader(r) for r in data["readers"])
        return Space(data["name"], data["channels"], tuple(data["order"]), producers, readers)


def _reader(v: dict[str, Any]) -> SpaceReader:
    present = None if v["present"] is None else tuple(v["present"])
    return SpaceReader(
        v["call"], v["layer"], v["step"], v["tensor"], (v["key"][0], v["key"][1]), tuple(v["wanted"]), present
    )

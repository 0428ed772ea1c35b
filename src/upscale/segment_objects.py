"""Segments as objects: the channels that layers share, for people who choose masks themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .channels import Side, channel_count
from .errors import InputError
from .flow import Flow
from .segments import groups_of, segments

__all__ = ["Member", "Segment", "find_segments", "segments_of"]

Group = list[tuple[str, str, Tensor]]  # (layer, side, index)


@dataclass(frozen=True, eq=False)
class Member:
    """One side of one layer on a segment.

    ``index``: for each of the segment's channels, its places among the layer's own (int64 of shape (channels,), or
    (channels, k) where a channel fills up to k places, as behind a flatten); -1 for none. ``size``: how many channels
    the layer has on this side.
    """

    name: str
    side: Side
    module: nn.Module = field(repr=False)
    index: Tensor = field(repr=False)
    size: int

    def places(self, channels: Any) -> Tensor:
        """The layer's own channels that some of the segment's are (int64, ascending).

        ``channels``: numbers of the segment's channels, as a tensor or a list. Raises ``InputError`` for others.
        """
        wanted = torch.as_tensor(channels).cpu()
        if wanted.numel() and (wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.is_complex()):
            raise InputError(f"channels of a segment are whole numbers, not {wanted.dtype}")
        wanted = wanted.long().flatten()
        outside = wanted[(wanted < 0) | (wanted >= len(self.index))]
        if len(outside):
            raise InputError(f"the segment has channels 0 to {len(self.index) - 1}, not {int(outside[0])}")
        found = self.index[wanted].flatten()
        return found[found >= 0].unique()

    def summed(self, values: Tensor) -> Tensor:
        """For each of the segment's channels, the sum of ``values`` (one for each channel of the layer, of shape
        (size,)) over its places: 0 where there is none. Raises ``InputError`` for another shape."""
        if not isinstance(values, Tensor) or values.shape != (self.size,):
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"{self.name} has {self.size} {self.side} channels: one value for each, not {given}")
        places = self.index.reshape(len(self.index), -1).to(values.device)
        return (values[places.clamp(min=0)] * (places >= 0)).sum(dim=1)

    def mask(self, channels: Any) -> Tensor:
        """A bool mask of the layer that drops these channels of the segment: False there, True elsewhere."""
        kept = torch.ones(self.size, dtype=torch.bool)
        kept[self.places(channels)] = False
        return kept


@dataclass(frozen=True, eq=False)
class Segment:
    """Channels that all of ``layers`` must agree on for them to go without any copy (Wan et al. 2023, section 3).

    ``channels``: how many. A layer is there once for its inputs and once for its outputs where both are on the segment.
    """

    channels: int
    layers: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """The layers that write the channels."""
        return tuple(member for member in self.layers if member.side == "output")

    @property
    def readers(self) -> tuple[Member, ...]:
        """The layers that read them."""
        return tuple(member for member in self.layers if member.side == "input")

    def __str__(self) -> str:
        written, read = (
            ", ".join(member.name for member in some) or "nobody" for some in (self.producers, self.readers)
        )
        return f"{self.channels} channels written by {written}, read by {read}"


def find_segments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], layers: Mapping[str, nn.Module]
) -> list[Segment]:
    """The segments of a model, in order of execution; of ``layers`` only, which are what masks are made for."""
    return _as_segments(segments(model, args, dict(kwargs)), layers)


def segments_of(flow: Flow, layers: Mapping[str, nn.Module]) -> list[Segment]:
    """The same of a graph that was analysed without masks."""
    return _as_segments(groups_of(flow), layers)


def _as_segments(groups: Sequence[Group], layers: Mapping[str, nn.Module]) -> list[Segment]:
    found = []
    for group in groups:
        members = _members(group, layers)
        if members:
            found.append(Segment(len(group[0][2]), members))
    return found


def _members(group: Group, layers: Mapping[str, nn.Module]) -> tuple[Member, ...]:
    members = []
    for name, side, index in group:
        if name in layers:
            size = channel_count(layers[name], cast(Side, side))
            places = index.flatten() if index.shape[-1] == 1 else index
            members.append(Member(name, cast(Side, side), layers[name], places, size))
    return tuple(members)

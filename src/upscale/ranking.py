"""Which channels matter least: scores summed over what is masked together, and the choice of the lowest ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Group", "group_scores", "normalised", "pick", "quantiles", "removal_order"]

_TIE = 1e-9  # less than two quantiles differ by


@dataclass
class Group:
    """Channels that are masked together, and where each of them is found.

    ``members``: for each layer, an int64 index tensor of shape (size,) or (size, k): the places of each of
    the group's channels in that layer, -1 for none.
    """

    members: dict[str, Tensor]
    size: int


def group_scores(group: Group, scores: Mapping[str, Tensor]) -> Tensor:
    """Score of each of the group's channels: the sum over all places where it is found."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, index in group.members.items():
        places = index.reshape(group.size, -1)
        total += (scores[name][places.clamp(min=0)] * (places >= 0)).sum(dim=1)
    return total


def normalised(score: Tensor) -> Tensor:
    """One group's scores divided by their root mean square, so that layers of different scale compare."""
    scale = score.square().mean().sqrt()
    return score / scale if scale > 0 else score


def quantiles(group: Group, score: Tensor) -> Tensor:
    """For each channel, the share of its kind that is gone once it and all lower ones are (float64, in (0, 1]).

    Channels of a kind are those that the same layers have: where a narrow tensor is padded and added to a wider one, or
    several are concatenated, a group has channels that some of its layers lack. Ranked by quantile, every layer loses
    about the same share. Equal quantiles go by score; a score of minus infinity is the lowest of all.
    """
    present = torch.stack([_places(index) > 0 for index in group.members.values()], dim=1)
    kinds = torch.unique(present, dim=0, return_inverse=True)[1]
    order = torch.sort(score, stable=True).indices
    found = torch.empty(group.size, dtype=torch.float64)
    found[order] = _TIE * torch.arange(1, group.size + 1, dtype=torch.float64) / group.size
    for kind in range(int(kinds.max()) + 1):
        members = order[kinds[order] == kind]
        found[members] += torch.arange(1, len(members) + 1, dtype=torch.float64) / len(members)
    found[score == float("-inf")] = float("-inf")
    return found


def pick(ranked: list[tuple[Group, Tensor]], share: float) -> list[list[int]]:
    """The lowest ``floor(share * channels)`` channels of these groups together, one list of channels a group.

    A channel that is the last one of some layer is passed over, and the next one taken instead.
    """
    wanted = math.floor(share * sum(group.size for group, _ in ranked) + 1e-9)  # 0.29 * 100 is 28.999...
    picked: list[list[int]] = [[] for _ in ranked]
    for g, channel in itertools.islice(removal_order(ranked), wanted):
        picked[g].append(channel)
    return picked


def removal_order(ranked: Sequence[tuple[Group, Tensor]]) -> Iterator[tuple[int, int]]:
    """All channels that may go, lowest score first, as (group, channel); the last one of a layer is passed over.

    Every subset of what this yields leaves each layer a channel.
    """
    owners = [(g, c) for g, (group, _) in enumerate(ranked) for c in range(group.size)]
    order = torch.sort(torch.cat([score for _, score in ranked]), stable=True).indices.tolist() if ranked else []
    left = [{name: _places(index).tolist() for name, index in group.members.items()} for group, _ in ranked]
    remaining = [{name: sum(n > 0 for n in count) for name, count in counts.items()} for counts in left]
    for position in order:
        g, channel = owners[position]
        touched = [name for name, count in left[g].items() if count[channel] > 0]
        if any(remaining[g][name] <= 1 for name in touched):
            continue
        for name in touched:
            remaining[g][name] -= 1
        yield g, channel


def _places(index: Tensor) -> Tensor:
    """In how many places of a layer each of the group's channels is found."""
    return (index.reshape(len(index), -1) >= 0).sum(dim=1)

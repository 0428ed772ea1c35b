"""Which channels matter least: scores summed over what is masked together, and the choice of the lowest ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Group", "group_scores", "pick", "pick_globally"]


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


def pick_globally(groups: list[Group], scores: list[Tensor], share: float) -> list[list[int]]:
    """Rank the channels of all groups together, each group's scores divided by their root mean square."""
    normalised = []
    for score in scores:
        scale = score.square().mean().sqrt()
        normalised.append(score / scale if scale > 0 else score)
    return pick(list(zip(groups, normalised, strict=True)), share)


def pick(ranked: list[tuple[Group, Tensor]], share: float) -> list[list[int]]:
    """The lowest ``floor(share * channels)`` channels of these groups together, one list of channels a group.

    A channel that is the last one of some layer is passed over, and the next one taken instead.
    """
    owners = [(g, c) for g, (group, _) in enumerate(ranked) for c in range(group.size)]
    order = torch.sort(torch.cat([score for _, score in ranked]), stable=True).indices.tolist()
    wanted = math.floor(share * len(owners) + 1e-9)  # 0.29 * 100 is 28.999...
    left = [{name: _places(index) for name, index in group.members.items()} for group, _ in ranked]
    remaining = [{name: int((count > 0).sum()) for name, count in counts.items()} for counts in left]
    picked: list[list[int]] = [[] for _ in ranked]
    taken = 0
    for position in order:
        if taken == wanted:
            break
        g, channel = owners[position]
        touched = [name for name, count in left[g].items() if count[channel] > 0]
        if any(remaining[g][name] <= 1 for name in touched):
            continue
        for name in touched:
            remaining[g][name] -= 1
        picked[g].append(channel)
        taken += 1
    return picked


def _places(index: Tensor) -> Tensor:
    """In how many places of a layer each of the group's channels is found."""
    return (index.reshape(len(index), -1) >= 0).sum(dim=1)

"""Masks by importance whose reads are all contiguous: from a model's graph to the channels that each layer masks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .capture import capture
from .contiguous import Arrangement, Piece, Reader, Space, agreed, arrange, free, narrowed
from .flow import analyse_flow
from .ranking import Group
from .readers import ReaderView, Reading, SpaceView, find_spaces
from .retained import Retained, SpaceRetained

__all__ = ["ContiguousMasks", "LaidOut", "choose", "groups_of", "read_spaces"]


@dataclass(frozen=True, eq=False)
class LaidOut:
    """One space as it was asked and answered: what the masks' contiguity can be checked with."""

    view: SpaceView
    space: Space
    arrangement: Arrangement


@dataclass(frozen=True, eq=False)
class ContiguousMasks:
    """``picked``: for each group (see :func:`groups_of`) its masked channels; ``retained``: what the masks leave."""

    picked: list[list[int]]
    retained: Retained
    laid_out: tuple[LaidOut, ...]


def read_spaces(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layers: Container[str],
    skipped: Mapping[str, str],
) -> Reading:
    """Capture ``model`` and find the spaces of its layers' inputs; ``skipped``: layers that get no mask, and why.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model.
    """
    return find_spaces(analyse_flow(capture(model, args, kwargs), partial=False), layers, skipped)


def groups_of(reading: Reading) -> list[Group]:
    """A group for every reader: its channels piece by piece, and the inputs of the layer that each of them is."""
    return [Group({r.layer: _places(r)}, len(_places(r))) for space in reading.spaces for r in space.readers]


def choose(
    reading: Reading, scores: Sequence[Tensor], masked: Sequence[int], earlier: Sequence[LaidOut] = ()
) -> ContiguousMasks:
    """The masks. ``scores``: float64, one a channel of each group; ``masked``: how many channels each group loses.

    ``earlier``: the answer of a step before, in which no group lost more; what it masks stays masked.
    """
    picked: list[list[int]] = []
    rows: list[SpaceRetained] = []
    laid_out: list[LaidOut] = []
    given = iter(zip(scores, masked, strict=True))
    console = Console(stderr=True)
    for view in track(
        reading.spaces, "choosing masks", console=console, transient=True, disable=not console.is_terminal
    ):
        mine = [next(given) for _ in view.readers]
        space = _space(view, mine)
        arrangement = narrowed(space, earlier[len(laid_out)].arrangement) if earlier else arrange(space)
        laid_out.append(LaidOut(view, space, arrangement))
        rows.append(_row(view, space, arrangement))
        picked += [_masked(view, arrangement, space, number) for number in range(len(view.readers))]
    return ContiguousMasks(picked, Retained(tuple(rows)), tuple(laid_out))


def _places(reader: ReaderView) -> Tensor:
    width = max(piece.places.shape[1] for piece in reader.pieces)
    padded = [np.pad(p.places, ((0, 0), (0, width - p.places.shape[1])), constant_values=-1) for p in reader.pieces]
    return torch.from_numpy(np.concatenate(padded))


def _space(view: SpaceView, given: Sequence[tuple[Tensor, int]]) -> Space:
    """The optimiser's problem: scores and numbers of channels kept."""
    readers = []
    for reader, (score, masked) in zip(view.readers, given, strict=True):
        sizes = [len(piece.channels) for piece in reader.pieces]
        pieces = []
        for piece, part in zip(reader.pieces, np.split(score.numpy(), np.cumsum(sizes)[:-1]), strict=True):
            scores = np.zeros(view.chains[piece.chain].size)
            sees = np.zeros(len(scores), dtype=bool)
            scores[piece.channels], sees[piece.channels] = part, True
            pieces.append(Piece(piece.chain, scores, sees))
        readers.append(Reader(tuple(pieces), sum(sizes) - masked))
    return Space(view.chains, tuple(readers))


def _masked(view: SpaceView, arrangement: Arrangement, space: Space, number: int) -> list[int]:
    """The channels of a reader's group that are in none of its intervals."""
    masked, offset = [], 0
    for piece, kept in zip(view.readers[number].pieces, arrangement.kept(space, number), strict=True):
        gone = np.flatnonzero(~np.isin(piece.channels, kept))
        masked += (offset + gone).tolist()
        offset += len(piece.channels)
    return masked


def _row(view: SpaceView, space: Space, arrangement: Arrangement) -> SpaceRetained:
    return SpaceRetained(
        tuple(reader.layer for reader in view.readers),
        tuple((reader.keep, reader.sees) for reader in space.readers),
        sum(float(piece.scores.sum()) for reader in space.readers for piece in reader.pieces),
        float(agreed(space).retained.sum()),
        float(arrangement.retained.sum()),
        float(free(space).sum()),
    )

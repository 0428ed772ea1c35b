"""What is scored, and what every importance answers: one score a channel, for each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..channels import Side, channel_rows
from ..ranking import Group
from .progress import progress_bar

__all__ = ["ByWeight", "Importance", "Subject", "without_score"]


@dataclass(frozen=True)
class Subject:
    """A model and the layers of it whose channels get a score.

    Parameters
    ----------
    model:
        The model, to be left as it is.
    side:
        ``"input"``: the channels that a layer reads; ``"output"``: those that it writes.
    layers:
        Convolutions, transposed convolutions and linear layers by path.
    norms:
        For each of these layers the batch norms that read its result with nothing in between.
    example:
        What the model can be called with, (positional, by keyword); None where that is not known.
    tied:
        The groups of channels of several layers that are masked together (constrained masks); none where every layer
        is masked on its own.
    """

    model: nn.Module
    side: Side
    layers: Mapping[str, nn.Module]
    norms: Mapping[str, tuple[nn.Module, ...]]
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    tied: tuple[Group, ...] = ()


@runtime_checkable
class Importance(Protocol):
    """Anything that scores channels. Write a class with this method for a score that needs more than a weight."""

    def scores(self, subject: Subject) -> Mapping[str, Tensor]:
        """For each of ``subject.layers`` a tensor (channels of ``subject.side``,): the lower, the sooner masked."""
        ...


class ByWeight(ABC):
    """A score that sees one layer's weight at a time."""

    @abstractmethod
    def of(self, rows: Tensor) -> Tensor:
        """The scores (channels,) of ``rows`` (channels, ...), which hold the weight's entries channel by channel."""

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`."""
        found = {}
        with progress_bar("scores of weights", len(subject.layers)) as advance:
            for name, layer in subject.layers.items():
                found[name] = self.of(channel_rows(layer, subject.side).detach())
                advance()
        return found


def without_score(names: Iterable[str]) -> str:
    """The argument that leaves these layers alone, to be copied from a message: all of them, however many."""
    return f"ignore={list(names)!r}"

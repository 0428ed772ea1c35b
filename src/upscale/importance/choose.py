"""From what a user calls a heuristic to checked scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import Side, channel_count, per_channel
from ..errors import InputError, NonFiniteError, UpscaleError
from ..large import all_finite
from .norms import BatchNormScale
from .subject import Importance, Subject
from .torch_pruning import FromTorchPruning, is_from_torch_pruning
from .weights import FPGM, L1, L2, LAMP, Random

__all__ = ["NAMES", "Heuristic", "channel_scores", "find_importance"]

Heuristic = str | Importance | type[Importance] | Callable[[Tensor], Tensor]

#: Importances that go by a name, in lower case.
NAMES: Mapping[str, Callable[[], Importance]] = {
    "l1": L1,
    "l2": L2,
    "lamp": LAMP,
    "fpgm": FPGM,
    "bn_scale": BatchNormScale,
    "random": Random,
}
_WITH_DATA = {
    "obs": "upscale.OBS(batches), or calibration=batches to upscale.mask,",
    "hrank": "upscale.HRank(batches)",
    "taylor": "upscale.Taylor(batches, loss)",
    "activationmagnitude": "upscale.ActivationMagnitude(batches)",
}
_COMPLEX = "the scores are complex numbers, which have no order"


class _Called:
    """A user's function of a weight."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self._function = function

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        return {name: self._of(name, layer, subject.side) for name, layer in subject.layers.items()}

    def _of(self, name: str, layer: nn.Module, side: Side) -> Tensor:
        weight, channels = layer.weight, channel_count(layer, side)
        assert isinstance(weight, Tensor)
        try:
            scores = self._function(weight.detach().clone())  # a copy: it may be written to
        except UpscaleError:
            raise
        except Exception as error:
            raise InputError(
                f"{name}: the heuristic failed on a weight of shape {tuple(weight.shape)}: {error!r}"
            ) from error
        if isinstance(scores, Tensor) and scores.is_complex():
            raise InputError(f"{name}: {_COMPLEX}")
        if isinstance(scores, Tensor) and scores.shape == weight.shape:
            return per_channel(layer, side, scores.detach().double())
        if isinstance(scores, Tensor) and scores.shape == (channels,):
            return scores
        wanted = f"a tensor of shape {tuple(weight.shape)} or ({channels},)"
        raise InputError(f"{name}: a heuristic returns {wanted}, not {_told(scores)}")


def channel_scores(heuristic: Heuristic, subject: Subject) -> dict[str, Tensor]:
    """Scores of all of the subject's layers: float64, on the CPU, one a channel.

    Raises ``InputError`` for an unknown heuristic and for scores that are missing or of the wrong shape;
    ``NonFiniteError`` where a weight or a score is NaN or infinite; and what the importance itself raises.
    """
    importance = find_importance(heuristic)
    for name, layer in subject.layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if not all_finite(weight):
            raise NonFiniteError(f"{name}.weight holds NaN or infinite values: its channels cannot be ranked")
    scores = importance.scores(subject)
    if not isinstance(scores, Mapping):
        raise InputError(f"{_name(importance)}.scores must return a dict of tensors by layer, not {_told(scores)}")
    return {name: _checked(name, layer, subject.side, scores.get(name)) for name, layer in subject.layers.items()}


def find_importance(heuristic: Heuristic) -> Importance:
    """The importance that a name, a class, an object or a function of a weight stands for.

    Raises ``InputError`` for anything else, and for a class that needs arguments.
    """
    if isinstance(heuristic, str):
        return _named(heuristic)
    from_torch_pruning = is_from_torch_pruning(heuristic)
    if isinstance(heuristic, type) and (from_torch_pruning or hasattr(heuristic, "scores")):
        heuristic = _made(heuristic)
    if from_torch_pruning:
        return FromTorchPruning(heuristic)
    if isinstance(heuristic, Importance):
        return heuristic
    if callable(heuristic):
        return _Called(heuristic)
    raise InputError(f"{_wanted()}, not {heuristic!r}")


def _made(kind: type) -> Any:
    try:
        return kind()
    except TypeError as error:
        raise InputError(f"heuristic {kind.__name__} needs arguments: give an object of it") from error


def _named(name: str) -> Importance:
    key = name.lower()
    if key in NAMES:
        return NAMES[key]()
    if key in _WITH_DATA:
        raise InputError(f"heuristic {name!r} needs data: give {_WITH_DATA[key]} instead of its name")
    raise InputError(f"{_wanted()}, not {name!r}")


def _wanted() -> str:
    names = ", ".join(map(repr, NAMES))
    return (
        f"heuristic must be one of {names}, an object of upscale.importance, an importance of Torch-Pruning, or a "
        "function of a weight"
    )


def _checked(name: str, layer: nn.Module, side: Side, scores: Any) -> Tensor:
    channels = channel_count(layer, side)
    if not isinstance(scores, Tensor) or scores.shape != (channels,):
        raise InputError(f"{name}: the scores must be a tensor of shape ({channels},), not {_told(scores)}")
    if scores.is_complex():
        raise InputError(f"{name}: {_COMPLEX}")
    scores = scores.detach().cpu().double()
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError(f"{name}: the heuristic gave NaN or infinite scores")
    return scores


def _told(value: Any) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _name(importance: Importance) -> str:
    return type(importance).__name__

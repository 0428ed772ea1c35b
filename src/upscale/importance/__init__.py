"""How important a channel is: the scores that :meth:`upscale.MaskingManager.importance` ranks channels by.

Every importance is a small class whose docstring cites its source. Scores of a weight alone (:class:`ByWeight`) are
computed from a tensor (channels, ...): ``LAMP().of(rows)``. See docs/importance.md for a table.
"""

from __future__ import annotations

from .activation import ActivationMagnitude
from .choose import NAMES, Heuristic, channel_scores, find_importance
from .hrank import HRank
from .norms import BatchNormScale
from .subject import ByWeight, Importance, Subject
from .taylor import Taylor
from .weights import FPGM, L1, L2, LAMP, Random

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "NAMES",
    "ActivationMagnitude",
    "BatchNormScale",
    "ByWeight",
    "HRank",
    "Heuristic",
    "Importance",
    "Random",
    "Subject",
    "Taylor",
    "channel_scores",
    "find_importance",
]

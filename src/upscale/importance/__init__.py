"""How important a channel is: the scores that :meth:`upscale.MaskingManager.importance` ranks channels by.

Every importance is a small class whose docstring cites its source. Scores of a weight alone (:class:`ByWeight`) are
computed from a tensor (channels, ...): ``LAMP().of(rows)``. See docs/importance.md for a table.
"""

from __future__ import annotations

from .choose import NAMES, Heuristic, channel_scores, find_importance
from .norms import BatchNormScale
from .subject import ByWeight, Importance, Subject
from .weights import FPGM, L1, L2, LAMP, Random

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "NAMES",
    "BatchNormScale",
    "ByWeight",
    "Heuristic",
    "Importance",
    "Random",
    "Subject",
    "channel_scores",
    "find_importance",
]

"""Import torchvision where its compiled operators do not load: with a CPU build of torch of another make, say.

Two operators of its detectors must be known by name when it is imported. No model of the zoo calls them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_KEPT: list[torch.library.Library] = []  # the definitions live as long as these objects


def import_torchvision() -> Any:
    """``torchvision``, its missing operators declared first where it needs that."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    return importlib.import_module("torchvision")

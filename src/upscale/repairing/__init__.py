"""Repair: give the accuracy that masking took away back, in closed form, without labels. See :func:`repair`."""

from __future__ import annotations

from .obs import OBS
from .report import LayerRepair, RepairReport, RepairWarning
from .run import repair, with_blocks

__all__ = ["OBS", "LayerRepair", "RepairReport", "RepairWarning", "repair", "with_blocks"]

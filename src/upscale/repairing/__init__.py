"""Repair: give the accuracy that masking took away back, in closed form, without labels. See :func:`repair`."""

from __future__ import annotations

from .report import LayerRepair, RepairReport, RepairWarning
from .run import repair

__all__ = ["LayerRepair", "RepairReport", "RepairWarning", "repair"]

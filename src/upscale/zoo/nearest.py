"""Names that were perhaps meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"did you mean resnet18, resnet34?"``, or "" where nothing known is near."""
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""

"""Values of options that several commands have."""

from __future__ import annotations

from enum import Enum


class Side(str, Enum):
    input = "input"
    output = "output"


class Reads(str, Enum):
    auto = "auto"
    gather = "gather"
    baseline = "baseline"

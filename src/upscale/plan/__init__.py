"""Planning: kept channels, their order, and how every operator reads them."""

from .build import make_plan
from .cost import Rates, Setting, rates_for
from .model import MODES, Choice, Contraction, Layout, Mode, Piece, Plan, Read
from .target import Target

__all__ = [
    "MODES",
    "Choice",
    "Contraction",
    "Layout",
    "Mode",
    "Piece",
    "Plan",
    "Rates",
    "Read",
    "Setting",
    "Target",
    "make_plan",
    "rates_for",
]

"""Planning: kept channels, their order, and how every operator reads them."""

from .build import make_plan
from .cost import Setting
from .model import MODES, Choice, Contraction, Layout, Mode, Piece, Plan, Read
from .rates import Rates, guessed_rates, on_backend
from .shared import Port, Space, SpaceReader
from .target import Target

__all__ = [
    "MODES",
    "Choice",
    "Contraction",
    "Layout",
    "Mode",
    "Piece",
    "Plan",
    "Port",
    "Rates",
    "Read",
    "Setting",
    "Space",
    "SpaceReader",
    "Target",
    "guessed_rates",
    "make_plan",
    "on_backend",
]

"""Planning: kept channels, their order, and how every operator reads them."""

from .build import make_plan
from .model import MODES, Choice, Contraction, Layout, Mode, Piece, Plan, Read

__all__ = ["MODES", "Choice", "Contraction", "Layout", "Mode", "Piece", "Plan", "Read", "make_plan"]

"""Planning: kept channels, their order, and how every operator reads them."""

from .build import make_plan
from .model import MODES, Contraction, Layout, Mode, Piece, Plan, Read

__all__ = ["MODES", "Contraction", "Layout", "Mode", "Piece", "Plan", "Read", "make_plan"]

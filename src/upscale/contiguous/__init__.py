"""Masks whose reads are all contiguous: an order of channels, and an interval of it for every reader, chosen together.

Constrained masks are the special case in which all intervals coincide, unconstrained ones have no order at all.
Numpy only: no network is needed to use or to test what is here.
"""

from .model import Arrangement, Chain, Piece, Reader, Space
from .space import agreed, arrange, free, narrowed

__all__ = ["Arrangement", "Chain", "Piece", "Reader", "Space", "agreed", "arrange", "free", "narrowed"]

"""How much a search may still do, in steps and not in seconds, so that results repeat."""

from __future__ import annotations


class Budget:
    """Work left, in cells of tables that are looked at."""

    def __init__(self, cells: int) -> None:
        self.left = cells

    def spend(self, cells: int) -> bool:
        """Take ``cells`` off; False once nothing is left."""
        self.left -= cells
        return self.left > 0

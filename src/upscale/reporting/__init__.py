"""Reports for machines, notebooks and browsers. Comes last: nothing that plans or emits looks in here."""

from .data import as_data
from .notebook import as_cell
from .page import render_page, write_page

__all__ = ["as_cell", "as_data", "render_page", "write_page"]

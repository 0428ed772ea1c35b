"""The bar of commands that measure for hours."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

__all__ = ["long_bar"]


def long_bar(console: Console, width: int) -> Progress:
    """What is measured now, in ``width`` characters, how much is done, and how long the rest will take."""
    columns = (
        SpinnerColumn(),
        TextColumn(f"{{task.description:{width}.{width}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, speed_estimate_period=3600)

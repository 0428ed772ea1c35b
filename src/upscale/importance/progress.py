"""A bar for work that takes long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]

_PATIENCE = 2.0  # seconds until it appears


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` steps (None: unknown how many).

    It moves a bar on stderr that appears after two seconds and goes away at the end; none where stderr is no terminal,
    or where it is not ``shown``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(title, total=total)
    timer = threading.Timer(_PATIENCE, progress.start)
    timer.daemon = True
    if shown and console.is_terminal:  # nothing but escape codes and empty lines would reach a file
        timer.start()
    try:
        yield lambda: progress.advance(task)
    finally:
        timer.cancel()
        if timer.ident is not None:  # it was started
            timer.join()
        if progress.live.is_started:
            progress.stop()

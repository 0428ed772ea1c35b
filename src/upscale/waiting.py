"""A line on the terminal for work of unknown length, shown only where it takes longer than people like to wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Waiting"]

_PATIENCE = 2.0  # seconds


class Waiting:
    """Shows ``title`` and the last step after two seconds, on a terminal only; gone when the work is done."""

    def __init__(self, title: str, console: Console) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._title, self._task, self._shown = title, self._progress.add_task(title, total=None), False

    def __enter__(self) -> Waiting:
        self._since = time.monotonic()
        return self

    def step(self, what: str) -> None:
        """One more step is done."""
        self._progress.update(self._task, advance=1, description=f"{self._title}: {what}")
        if not self._shown and time.monotonic() - self._since > _PATIENCE:
            self._progress.start()
            self._shown = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The line is gone for as long as something else shows a bar."""
        if self._shown:
            self._progress.stop()
        try:
            yield
        finally:
            if self._shown:
                self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._progress.stop()

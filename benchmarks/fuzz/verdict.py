"""What can come of an example, and the circumstances under which it is judged: a time limit, silence."""

from __future__ import annotations

import contextlib
import io
import signal
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import upscale

GOOD = (
    "invalid",
    "not finite",
    "smaller",
    "same size",
    "nothing to prune",
    "constant output",
    "torch cannot export",
    "depends on values",
    "batch fixed by torch",
    "unstable",
)
#: Failures, most serious first.
BAD = (
    "wrong, verified",
    "wrong",
    "model changed",
    "hang",
    "false alarm",
    "exception",
    "refused",
    "more parameters",
    "not ordinary",
    "fuzzer error",
)


@dataclass(frozen=True)
class Verdict:
    """What came of one example. ``mark`` tells failures apart: the same fault gives the same mark."""

    outcome: str
    mark: str = ""
    detail: str = ""
    notes: tuple[str, ...] = ()

    @property
    def vague(self) -> bool:
        """Whether the mark does not say where the fault is: wrong numbers, an exported model that does not run."""
        return self.outcome.startswith("wrong") or self.mark.startswith("emitted")

    @property
    def failed(self) -> bool:
        """Whether this must not happen."""
        return self.outcome in BAD

    def like(self, other: Verdict) -> bool:
        """The same kind of failure at the same place."""
        return (self.outcome, self.mark) == (other.outcome, other.mark)


class Hang(BaseException):
    """The time limit, raised through any ``except Exception``."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise in this thread after so many seconds."""

    def ring(_signal: int, _frame: types.FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor what torch prints of graphs that it cannot capture."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def mark_of(error: BaseException) -> str:
    """The kind of an exception and the innermost line of this library that it passed through."""
    return f"{type(error).__name__} at {place_of(error)}"


def place_of(error: BaseException) -> str:
    own = str(Path(upscale.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(own)]
    if not frames:
        frames = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].name})" if frames else "?"

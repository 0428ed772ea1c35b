"""Values of options that may hold several, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TypeVar

from .errors import UsageError

__all__ = ["count", "listed", "one_of", "share", "shares"]

T = TypeVar("T")


def listed(option: str, texts: Sequence[str], convert: Callable[[str], T]) -> list[T]:
    """The values of an option that may be given again, or hold several with commas between."""
    values = []
    for word in filter(None, (word.strip() for text in texts for word in text.split(","))):
        try:
            values.append(convert(word))
        except ValueError as error:
            raise UsageError(f"{option}: {error}") from error
    if not values:
        raise UsageError(f"{option} needs a value")
    return list(dict.fromkeys(values))


def share(text: str) -> float:
    """A number more than 0 and less than 1."""
    value = _number(text, float)
    if not 0 < value < 1:
        raise ValueError(f"{text} must be more than 0 and less than 1")
    return value


def shares(text: str) -> tuple[float, ...]:
    """One share, or several as first:last:step, the last one included."""
    if ":" not in text:
        return (share(text),)
    parts = text.split(":")
    if len(parts) != 3:
        raise ValueError(f"{text!r} must be a number, or first:last:step such as .05:.5:.05")
    try:
        first, last, step = map(Decimal, parts)  # 0.1 + 0.2 is 0.3
    except InvalidOperation as error:
        raise ValueError(f"{text!r} must be a number, or first:last:step such as .05:.5:.05") from error
    if not step.is_finite() or step <= 0 or last < first:
        raise ValueError(f"{text!r}: the step must be more than 0, and the last number no less than the first")
    return tuple(share(str(first + k * step)) for k in range(int((last - first) / step) + 1))


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = _number(text, int)
    if value < 1:
        raise ValueError(f"{text} must be at least 1")
    return value


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Checks that a text is one of ``names``."""

    def check(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is none of {', '.join(names)}")
        return text

    return check


def _number(text: str, kind: Callable[[str], T]) -> T:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no number, or no whole one") from error

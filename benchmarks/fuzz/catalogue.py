"""The table of operators that the fuzzer composes; the ``ops_*`` modules fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .build import Frame, T

Function = Callable[[Frame], "str | list[str]"]


@dataclass(frozen=True)
class Operator:
    """``function`` writes the code of one step; ``weight`` says how often it is drawn."""

    name: str
    family: str
    function: Function
    weight: float


CATALOGUE: dict[str, Operator] = {}


def op(family: str, weight: float = 1.0) -> Callable[[Function], Function]:
    """Enter a function into the catalogue under its own name."""

    def enter(function: Function) -> Function:
        name = function.__name__.removesuffix("_")
        assert name not in CATALOGUE, name
        CATALOGUE[name] = Operator(name, family, function, weight)
        return function

    return enter


def image(t: T) -> bool:
    """(B, C, spatial...) with one to three spatial dimensions."""
    return 3 <= t.rank <= 5


def plane(t: T) -> bool:
    """(B, C, H, W)."""
    return t.rank == 4


def sequence(t: T) -> bool:
    """(B, N, C)."""
    return t.rank == 3


def small(t: T) -> bool:
    """Few enough elements to be multiplied."""
    return t.size <= 600


def divisors(n: int) -> list[int]:
    """1, ..., n."""
    return [d for d in range(1, n + 1) if n % d == 0]


def ones(count: int, before: int | str) -> str:
    """``(1, 5, 1, 1)``: a shape that broadcasts over ``count`` trailing dimensions."""
    return ", ".join(["1", str(before), *["1"] * count])

"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """Three digits and a unit: 11,689,512 is "11.7 M"."""
    for size, unit in _UNITS:
        if value >= size * 0.9995:
            return f"{_digits(value / size)} {unit}"
    return _digits(value)


def microseconds(nanoseconds: float) -> str:
    """ "21.1 µs"; nothing is "0"."""
    return f"{nanoseconds / 1000:,.1f} µs" if nanoseconds else "0"


def percent(part: float, whole: float) -> str:
    """ "60.4 %", or a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def change(pair: Mapping[str, int] | tuple[int, int]) -> str:
    """ "64 → 48", or the number where nothing changed."""
    old, new = (pair["before"], pair["after"]) if isinstance(pair, Mapping) else pair
    return f"{old:,}" if old == new else f"{old:,} → {new:,}"


def _digits(value: float) -> str:
    if value == int(value) and value < 1000:
        return f"{int(value)}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"

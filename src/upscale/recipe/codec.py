"""Frozen dataclasses to plain JSON and back, led by their type hints; what comes back is checked field by field.

Long lists of channels make up nearly all of a plan, and most occur many times: each distinct one is written once, into
a pool, as stretches of neighbours (``"0:64 70 72:80"``, ends excluded).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from upscale.errors import FileError

__all__ = ["Pool", "decode", "encode"]

_LONGEST = 1 << 24  # channels in one list
_MOST = 1 << 27  # channels in all lists together
_LARGEST = 1 << 63
_STRETCH = re.compile(r"\d{1,18}(:\d{1,18})?")
_ODD_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Pool:
    """Distinct lists of channels by number."""

    def __init__(self, texts: Any = ()) -> None:
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise FileError("its lists of channels are no list of texts")
        self.texts: list[str] = list(texts)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._lists: dict[int, tuple[int, ...]] = {}
        self._left = _MOST

    def put(self, items: tuple[int, ...]) -> int:
        """The number of a list."""
        if items not in self._numbers:
            self._numbers[items] = len(self.texts)
            self.texts.append(_as_text(items))
        return self._numbers[items]

    def get(self, number: Any, where: str) -> tuple[int, ...]:
        """The list of a number.

        Raises:
            FileError: there is none of that number, or it is no list of channels.
        """
        if type(number) is not int or not 0 <= number < len(self.texts):
            raise FileError(f"{where} names list {_shown(number)} of {len(self.texts)}")
        if number not in self._lists:
            self._lists[number] = self._parsed(self.texts[number], where)
        return self._lists[number]

    def _parsed(self, text: str, where: str) -> tuple[int, ...]:
        items: list[int] = []
        for part in text.split(" ") if text else ():
            if not _STRETCH.fullmatch(part):
                raise FileError(f"{where} holds {_shown(part)} in a list of channels")
            first, _, end = part.partition(":")
            stretch = range(int(first), int(end) if end else int(first) + 1)
            if not len(stretch) or len(items) + len(stretch) > _LONGEST:
                raise FileError(f"{where} holds the stretch {part} in a list of channels")
            items.extend(stretch)
        self._left -= len(items)
        if self._left < 0:
            raise FileError("its lists of channels are longer than those of any network")
        return tuple(items)


def _as_text(items: tuple[int, ...]) -> str:
    parts, start = [], 0
    for at in range(1, len(items) + 1):
        if at == len(items) or items[at] != items[at - 1] + 1:
            first, end = items[start], items[at - 1] + 1
            parts.append(str(first) if end == first + 1 else f"{first}:{end}")
            start = at
    return " ".join(parts)


def encode(value: Any, pool: Pool) -> Any:
    """``value`` (dataclasses, tuples, dicts, numbers, texts) as JSON-ready data; lists of integers go into ``pool``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        usual = {f.name: f.default for f in dataclasses.fields(value)}
        given = {name: (kind, getattr(value, name)) for name, kind in _hints(type(value)).items()}
        # what a field has by default is left out: a plan is mostly that
        return {name: _encode_as(kind, v, pool) for name, (kind, v) in given.items() if not _is_usual(v, usual[name])}
    return _encode_as(type(value), value, pool)


def _is_usual(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default and repr(value) == repr(default)  # -0.0 is not 0.0


def _encode_as(kind: Any, value: Any, pool: Pool) -> Any:
    if kind == tuple[int, ...]:
        return pool.put(value)
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value):
        return encode(value, pool)
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if typing.get_origin(kind) in (types.UnionType, typing.Union) and len(options) == 1:
        return _encode_as(options[0], value, pool)
    if isinstance(value, Mapping):
        inner = typing.get_args(kind)[1] if typing.get_args(kind) else Any
        return {str(key): _encode_as(inner, item, pool) for key, item in value.items()}
    kinds = _kinds(kind, len(value))
    return [_encode_as(inner, item, pool) for inner, item in zip(kinds, value, strict=True)]


def decode(kind: Any, data: Any, pool: Pool, where: str) -> Any:
    """Inverse of :func:`encode` for a value of type ``kind``; ``where`` names it in messages.

    Raises:
        FileError: ``data`` is of another type, a field is missing or unknown, a number is no number of a network.
    """
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, data, pool, where)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if data is None and type(None) in options:
            return None
        return decode(next(option for option in options if option is not type(None)), data, pool, where)
    if kind == tuple[int, ...]:
        return pool.get(data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise FileError(f"{where} is {_shown(data)}, not a list")
        kinds = _kinds(kind, len(data))
        if len(kinds) != len(data):
            raise FileError(f"{where} has {len(data)} entries, not {len(kinds)}")
        return tuple(
            decode(inner, item, pool, f"{where}[{i}]") for i, (inner, item) in enumerate(zip(kinds, data, strict=True))
        )
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            raise FileError(f"{where} is {_shown(data)}, not an object")
        inner = typing.get_args(kind)[1]
        return {key: decode(inner, item, pool, f"{where}.{key}") for key, item in data.items()}
    return _decode_simple(kind, data, where)


def _decode_object(kind: Any, data: Any, pool: Pool, where: str) -> Any:
    if not isinstance(data, dict):
        raise FileError(f"{where} is {_shown(data)}, not an object")
    hints = _hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise FileError(f"{where} has an unknown entry {_shown(unknown[0])}")
    needed = [f.name for f in dataclasses.fields(kind) if _is_needed(f)]
    if missing := [name for name in needed if name not in data]:
        raise FileError(f"{where} has no entry {missing[0]!r}")
    return kind(**{name: decode(hints[name], item, pool, f"{where}.{name}") for name, item in data.items()})


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decode_simple(kind: Any, data: Any, where: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        if data not in typing.get_args(kind):
            raise FileError(f"{where} is {_shown(data)}, none of {', '.join(map(repr, typing.get_args(kind)))}")
        return data
    if kind is float and isinstance(data, str) and data in _ODD_FLOATS:
        return _ODD_FLOATS[data]
    accepted = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[kind]
    if type(data) not in accepted or (type(data) is int and abs(data) >= _LARGEST):
        raise FileError(f"{where} is {_shown(data)}, not {_NAMES[kind]}")
    return float(data) if kind is float else data


_NAMES = {float: "a number", int: "an integer", str: "a text", bool: "true or false"}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; fields marked ``compare=False`` belong to the run, not to the value."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.compare}


def _kinds(kind: Any, count: int) -> list[Any]:
    """Types of the entries of a tuple type, for a tuple of ``count`` entries."""
    inner = typing.get_args(kind)
    if not inner:
        return [Any] * count
    return [inner[0]] * count if len(inner) == 2 and inner[1] is Ellipsis else list(inner)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

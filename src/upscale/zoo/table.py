"""A CSV whose lines are instances of a dataclass of strings, integers and floats; replaced as a whole, atomically."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from ..files import replacing

T = TypeVar("T")


class BadTableError(Exception):
    """A file that is no table of the kind wanted."""


def columns_of(kind: type) -> tuple[str, ...]:
    """The columns of a table of ``kind``: its fields, in order."""
    return tuple(field.name for field in fields(kind))


def read_table(path: Path, kind: type[T], what: str) -> list[T]:
    """The rows of a CSV; none if there is no such file. Raises ``BadTableError``, naming ``what`` it should be.

    A table from before the last columns were added is read too, where these have a default.
    """
    if not path.exists():
        return []
    known = fields(kind)  # type: ignore[arg-type]
    kinds = {field.name: str(field.type) for field in known}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            present = tuple(reader.fieldnames or ())
            if present != tuple(kinds)[: len(present)] or not all(map(_has_default, known[len(present) :])):
                raise BadTableError(f"{path} is not {what} of this version (its columns differ)")
            return [kind(**{name: _parsed(kinds[name], text) for name, text in line.items()}) for line in reader]
        except (ValueError, TypeError, KeyError, UnicodeDecodeError, csv.Error) as error:
            raise BadTableError(f"{path} is not {what}: {error}") from error


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _parsed(kind: str, text: str) -> Any:
    if kind.startswith("str"):
        return text
    if text == "":
        return None
    return int(text) if kind.startswith("int") else float(text)


def write_table(path: Path, kind: type[T], rows: Iterable[T]) -> None:
    """Replace the CSV as a whole, atomically: at no time is half a table on the disk."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(kind))
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in rows)  # type: ignore[call-overload]

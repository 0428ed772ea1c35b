"""A suite of one's own: a CSV or TOML file that names models, builders and inputs."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .inputs import GRAMMAR, InputsError, parse_inputs
from .subject import Subject
from .suites import SuiteError

FORMAT = f"""\
A suite file is a CSV with the columns name, builder and inputs, or a TOML with these keys in one [[model]] for each
model:

  name,builder,inputs
  small,mynets:small_net,2x3x32x32
  tagger,mynets:Tagger,tokens=int1000:2x16 mask=ones:2x16

The builder is package.module:function (or a class), called without arguments, and returns an nn.Module; modules
beside the file and in the current folder are found. {GRAMMAR}"""

_COLUMNS = ("name", "builder", "inputs")


@dataclass(frozen=True)
class _Entry:
    name: str
    builder: str
    inputs: str


class FileSuite:
    """The models of a file; the suite is called like the file, its ending included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self._entries = {entry.name: entry for entry in _read(path)}

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def others(self) -> Sequence[str]:
        return []

    def build(self, name: str, seed: int) -> Subject:
        entry = self._entries[name]
        builder = find_builder(entry.builder, self.path.resolve().parent)
        torch.manual_seed(seed)
        model = builder()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{entry.builder} returned {type(model).__name__}, not an nn.Module")
        return Subject(model, parse_inputs(entry.inputs, seed))


def _read(path: Path) -> list[_Entry]:
    """The entries of the file, checked as far as that goes without building anything."""
    try:
        lines = _from_toml(path) if path.suffix.lower() == ".toml" else _from_csv(path)
    except (OSError, ValueError, csv.Error) as error:  # a TOML error is a ValueError
        raise SuiteError(f"cannot read the suite {path}: {error}") from error
    entries = [_entry(path, number, line) for number, line in enumerate(lines, start=1)]
    if not entries:
        raise SuiteError(f"the suite {path} has no models; it needs the columns {', '.join(_COLUMNS)}")
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SuiteError(f"the suite {path} has {', '.join(twice)} more than once")
    return entries


def _entry(path: Path, number: int, line: Mapping[str, Any]) -> _Entry:
    values = {str(key).strip(): value.strip() for key, value in line.items() if key and isinstance(value, str)}
    missing = [column for column in _COLUMNS if not values.get(column)]
    if missing:
        raise SuiteError(f"{path}, model {number}: {', '.join(missing)} is missing; a model has {', '.join(_COLUMNS)}")
    if ":" not in values["builder"]:
        raise SuiteError(f"{path}, model {number}: write the builder as package.module:function")
    try:
        parse_inputs(values["inputs"])
    except InputsError as error:
        raise SuiteError(f"{path}, model {number}: {error}") from error
    return _Entry(*(values[column] for column in _COLUMNS))


def _from_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _from_toml(path: Path) -> list[dict[str, Any]]:
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise SuiteError("a suite in TOML needs Python 3.11 or newer; write it as CSV") from error
    models = tomllib.loads(path.read_text(encoding="utf-8")).get("model", [])
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise SuiteError(f"the suite {path} needs one [[model]] for each model")
    return models


def find_builder(builder: str, folder: Path) -> Any:
    """What ``package.module:name`` names; modules of ``folder`` and of the current one are found."""
    module, _, attribute = builder.partition(":")
    for place in (str(Path.cwd()), str(folder)):
        if place not in sys.path:
            sys.path.insert(0, place)
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found

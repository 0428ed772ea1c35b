"""A suite is a list of names and, for each, a way to build the model and an example call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .subject import Subject

#: Built-in suites: the module that has the class ``Suite``, and the package that it needs.
BUILT_IN = {
    "torchvision": ("upscale.zoo.suite_torchvision", "torchvision"),
    "timm": ("upscale.zoo.suite_timm", "timm"),
    "transformers": ("upscale.zoo.suite_transformers", "transformers"),
}


class Suite(Protocol):
    """What the table needs of a suite."""

    name: str

    def names(self) -> Sequence[str]:
        """The models, in the order in which they are tried."""

    def others(self) -> Sequence[str]:
        """Further models, tried only if they are named."""

    def build(self, name: str, seed: int) -> Subject:
        """The model ``name`` with random weights from ``seed``, and its example. May raise anything."""


class SuiteError(Exception):
    """A suite that does not exist, lacks its package, or cannot be read."""


def load_suite(which: str) -> Suite:
    """A built-in suite by name, or the suite in a file. Raises ``SuiteError``."""
    if which in BUILT_IN:
        module, package = BUILT_IN[which]
        if importlib.util.find_spec(package) is None:
            raise SuiteError(f"the suite {which!r} needs {package}: pip install 'upscale-pruning[zoo]'")
        return importlib.import_module(module).Suite()
    if not Path(which).is_file():
        raise SuiteError(f"no suite {which!r}: choose {', '.join(BUILT_IN)}, or give a CSV or TOML file")
    from .suite_file import FileSuite

    return FileSuite(Path(which))

"""The trained networks of the accuracy tables, with what their weights' README says of them.

The weights are not part of the repository. They are looked for in ``../shared/weights`` beside it, or in ``weights``
under the folder that the environment variable ``UPSCALE_SHARED`` names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from upscale.reproduce.models import KNOWN, Recipe, load_model

from . import ROOT

__all__ = ["NETS", "Net", "load", "shared", "why_missing"]


@dataclass(frozen=True)
class Net:
    """A trained network. ``dense_top1``: percent, on its whole test set, as the README of ``../shared/data`` says."""

    recipe: Recipe
    dense_top1: float

    @property
    def title(self) -> str:
        return self.recipe.title

    @property
    def size(self) -> int:
        return self.recipe.view.size

    @property
    def dataset(self) -> str:
        """The data's file without its ending."""
        return Path(self.recipe.data).stem


_DENSE_TOP1 = {
    "resnet20": 87.95,
    "resnet56": 89.06,
    "densenet40": 81.13,
    "mobilenet_v2": 84.2,
    "mobilenetv1_100": 89.0,
    "squeezenet1_0": 61.6,
}

NETS: dict[str, Net] = {name: Net(KNOWN[name], top1) for name, top1 in _DENSE_TOP1.items()}


def shared() -> Path:
    """The folder with the weights and data sets, whether or not it is there."""
    return Path(os.environ.get("UPSCALE_SHARED") or ROOT.parent / "shared")


def why_missing(name: str) -> str | None:
    """None where everything that ``NETS[name]`` needs is there, else what is not."""
    recipe = NETS[name].recipe
    for path in (_weights(name), shared() / "data" / recipe.data):
        if not path.is_file():
            return f"{path} is not there (set UPSCALE_SHARED to the folder with weights/ and data/)"
    return None


def load(name: str) -> nn.Module:
    """``NETS[name]`` with its trained weights, in eval mode; ``ModelError`` where they are missing."""
    return load_model(name, NETS[name].recipe, _weights(name))


def _weights(name: str) -> Path:
    return shared() / "weights" / f"{NETS[name].recipe.weights}.safetensors"

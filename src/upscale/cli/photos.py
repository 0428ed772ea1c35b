"""Images for a model that is named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from ..reproduce.images import DataError, Images, View, load_dataset
from ..reproduce.models import KNOWN
from ..zoo.subject import Subject
from .errors import UsageError

__all__ = ["DEFAULT_MEAN", "DEFAULT_STD", "Mean", "Std", "colours", "images_for"]

DEFAULT_MEAN, DEFAULT_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"

Mean = Annotated[str, typer.Option(metavar="R,G,B", help="Mean colour, 0 to 1.", rich_help_panel="Images")]
Std = Annotated[str, typer.Option(metavar="R,G,B", help="Its deviation.", rich_help_panel="Images")]


def colours(option: str, text: str) -> tuple[float, float, float]:
    """Three numbers from 0 to 1; those of a deviation are more than 0. Raises ``UsageError`` for anything else."""
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 1 for value in values) or (option == "--std" and 0 in values):
        raise UsageError(f"{option}: {text!r} must be three numbers between 0 and 1, such as {DEFAULT_MEAN}")
    return values[0], values[1], values[2]


def images_for(
    name: str, subject: Subject, data: Path, held_out: int, seed: int, look: tuple[str, str]
) -> tuple[Images, Images]:
    """Images to evaluate on, and ``held_out`` others to calibrate with (0: evaluate on all).

    They are of the size that the model is called with, and normalised as a network of the table wants them, or by
    ``look`` (mean and deviation as they were typed).

    Raises:
        DataError: there are none, or the model takes no images.
    """
    image = subject.args[0] if len(subject.args) == 1 else None
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3]:
        raise DataError(f"{name} is not called with one square image of three colours: --data cannot be used")
    recipe = KNOWN.get(name)
    view = recipe.view if recipe else View(colours("--mean", look[0]), colours("--std", look[1]), image.shape[-1])
    dataset = load_dataset(data, recipe.data if recipe else "", view)
    return dataset.split(len(dataset.test) if held_out else None, held_out, seed)

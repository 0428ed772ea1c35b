"""``upscale inspect``: which layers of a model share channels, and what would not be touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import upscale

from ..errors import UpscaleError
from .errors import UsageError
from .specs import FORMS, find_subject

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False)]
InputsOption = Annotated[
    str | None, typer.Option("--inputs", metavar="SHAPE ...", help="The call, as in `upscale zoo`: 1x3x224x224.")
]
Weights = Annotated[Path | None, typer.Option(help="A file of tensors (.safetensors, .pt).", dir_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

HELP = f"""\
Which layers of a model share channels? Spaces with the layers that write and read them, and barriers.

Examples:
  upscale inspect resnet18
  upscale inspect timm:convnext_atto --inputs 1x3x64x64 --json
  upscale inspect mynets:Tagger --inputs "tokens=int1000:2x16 mask=ones:2x16"

{FORMS}

Nothing is downloaded, and nothing is written. A barrier is an operator of which nothing is known: its input keeps all
channels. docs/rules.md says how to lift one.

Exit status: 0, or 2 where there is no such model, or it cannot be captured."""


def inspect(model: Model, inputs: InputsOption = None, weights: Weights = None, as_json: Json = False) -> None:
    """The command; ``HELP`` is what it says of itself."""
    subject = find_subject(model, inputs, weights)
    try:
        found = upscale.inspect(subject.model, subject.args, subject.kwargs)
    except UpscaleError as error:
        raise UsageError(str(error)) from error
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console = Console()
    print(found.render(console.width if console.is_terminal else None))

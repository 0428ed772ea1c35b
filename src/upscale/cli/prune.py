"""``upscale prune``: mask a model, export it, and write what is wanted of it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

import upscale

from .. import measure
from ..errors import UpscaleError
from ..importance.choose import NAMES
from ..repairing import RepairReport, RepairWarning, with_blocks
from ..reproduce.evaluation import FROM_IMAGES, accuracy, batches_of, check_outputs
from ..reproduce.images import DataError, Images
from ..waiting import Waiting
from ..zoo.subject import Subject
from .choices import Reads, Side
from .errors import UsageError
from .photos import DEFAULT_MEAN, DEFAULT_STD, Mean, Std, images_for
from .specs import FORMS, find_subject
from .values import listed

_WHAT, _HOW, _OUT, _DATA = "What goes", "How the result reads", "What is written", "Images"


class Method(str, Enum):
    unconstrained = "unconstrained"
    constrained = "constrained"
    contiguous = "contiguous"


class Format(str, Enum):
    contiguous = "contiguous"
    channels_last = "channels_last"


class Backend(str, Enum):
    eager = "eager"
    compile = "compile"
    onnxruntime = "onnxruntime"


_PLAIN = tuple(NAMES)  # scores of weights alone

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False)]
InputsOption = Annotated[
    str | None, typer.Option("--inputs", metavar="SHAPE ...", help="The call, as in `upscale zoo`: 1x3x224x224.")
]
Weights = Annotated[Path | None, typer.Option(help="A file of tensors (.safetensors, .pt).", dir_okay=False)]
Amount = Annotated[float | None, typer.Option(help="Share of each layer's channels.", rich_help_panel=_WHAT)]
Flops = Annotated[float | None, typer.Option(help="Or the share of FLOPs that is left.", rich_help_panel=_WHAT)]
Params = Annotated[float | None, typer.Option(help="Or of parameters.", rich_help_panel=_WHAT)]
Latency = Annotated[float | None, typer.Option(help="Or of latency, measured here.", rich_help_panel=_WHAT)]
Importance = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(_PLAIN)}; with --data {', '.join(FROM_IMAGES)}. By itself obs with --repair, else l2.",
        rich_help_panel=_WHAT,
    ),
]
SideOption = Annotated[Side, typer.Option(help="Channels that a layer reads, or writes.", rich_help_panel=_WHAT)]
MethodOption = Annotated[
    Method, typer.Option(help="Each layer its own channels, tied layers the same.", rich_help_panel=_WHAT)
]
Global = Annotated[
    bool | None,
    typer.Option(
        "--global/--even",
        help="Rank all layers together, or take the same share of each. By itself even, but for obs with a budget.",
        rich_help_panel=_WHAT,
    ),
]
Ignore = Annotated[
    list[str], typer.Option("--ignore", metavar="NAME,...", help="Layers left alone.", rich_help_panel=_WHAT)
]
Masked = Annotated[
    bool, typer.Option("--masked", help="Weights have their zeros already: only export.", rich_help_panel=_WHAT)
]
ReadsOption = Annotated[Reads, typer.Option(help="How layers get their channels.", rich_help_panel=_HOW)]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Batch size planned for. [default: of --inputs; else 1]", rich_help_panel=_HOW)
]
FormatOption = Annotated[Format | None, typer.Option("--memory-format", help="The same.", rich_help_panel=_HOW)]
BackendOption = Annotated[Backend, typer.Option("--backend", help="The same.", rich_help_panel=_HOW)]
RoundTo = Annotated[int, typer.Option(min=1, help="Channel counts are multiples of it.", rich_help_panel=_HOW)]
Out = Annotated[
    Path | None, typer.Option(help="The model: .safetensors (weights and plan) or .pt2.", rich_help_panel=_OUT)
]
Onnx = Annotated[Path | None, typer.Option(help="The model as ONNX.", rich_help_panel=_OUT)]
ReportOption = Annotated[Path | None, typer.Option("--report", help="A page to look at (.html).", rich_help_panel=_OUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.", rich_help_panel=_OUT)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUT)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing.", rich_help_panel=_OUT)]
Data = Annotated[Path | None, typer.Option(help="A .npz file or a folder of images by class.", rich_help_panel=_DATA)]
Eval = Annotated[bool, typer.Option("--eval", help="Top-1 before and after, on --data.", rich_help_panel=_DATA)]
Repair = Annotated[
    bool,
    typer.Option("--repair", help="Fit what is left to what the model computes on --data.", rich_help_panel=_DATA),
]
Blocks = Annotated[
    int,
    typer.Option(
        min=0, metavar="STEPS", help="After --repair fit whole blocks, in so many steps.", rich_help_panel=_DATA
    ),
]
Calibration = Annotated[
    int, typer.Option(min=1, help="Images that scores and the repair look at; not evaluated on.", rich_help_panel=_DATA)
]
Seed = Annotated[int, typer.Option(help="Of random weights, and of the choice of images.")]

HELP = f"""\
Make a model smaller: zero its least important channels, remove them, and prove that nothing else changed.

Examples:
  upscale prune resnet18 --amount 0.25 --out small.safetensors
  upscale prune torchvision:resnet50 --weights resnet50.pth --flops 0.5 --out small.pt2 --onnx small.onnx
  upscale prune mynets:small --inputs 1x3x32x32 --weights small.pt --params 0.4 --data photos/ --repair --eval

{FORMS}

The result is compared with the masked model on random inputs before anything is written. A .safetensors file is loaded
with upscale.load("small.safetensors", model), where model is the original architecture, and can be trained; a .pt2 file
needs no architecture and is for inference. Files are written whole or not at all.

Exit status: 0, 2 for a mistake in the command or a model that cannot be pruned, 130 if interrupted."""


@dataclass
class _Result:
    """What is told at the end."""

    pruned: Any
    repair: RepairReport | None = None
    top1: tuple[float, float] | None = None
    written: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        found = {"report": self.pruned.report.to_dict(), "written": [str(path) for path in self.written]}
        if self.repair is not None:
            found["repair"] = self.repair.to_dict()
        if self.top1 is not None:
            found["top1"] = {"before": self.top1[0], "after": self.top1[1]}
        return found


def prune(
    model: Model,
    inputs: InputsOption = None,
    weights: Weights = None,
    amount: Amount = None,
    flops: Flops = None,
    params: Params = None,
    latency: Latency = None,
    importance: Importance = None,
    side: SideOption = Side.input,
    method: MethodOption = Method.unconstrained,
    is_global: Global = None,
    ignore: Ignore = [],  # noqa: B006 - typer copies it
    masked: Masked = False,
    reads: ReadsOption = Reads.auto,
    batch: Batch = None,
    memory_format: FormatOption = None,
    backend: BackendOption = Backend.eager,
    round_to: RoundTo = 1,
    out: Out = None,
    onnx: Onnx = None,
    report: ReportOption = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    data: Data = None,
    repair: Repair = False,
    blocks: Blocks = 0,
    evaluate: Eval = False,
    calibration: Calibration = 256,
    mean: Mean = DEFAULT_MEAN,
    std: Std = DEFAULT_STD,
    seed: Seed = 0,
) -> None:
    """The command; ``HELP`` is what it says of itself."""
    asked = {"amount": amount, "flops": flops, "params": params, "latency": latency}
    budgets = {name: value for name, value in asked.items() if value is not None}
    _check_choice(budgets, masked)
    _check_files({"--out": out, "--onnx": onnx, "--report": report}, force)
    importance = importance or ("obs" if repair and side is Side.input else "l2")
    _check_images(importance, data, evaluate, repair, masked)
    _check_blocks(blocks, repair)
    target = upscale.Target(
        batch=batch if inputs or batch else 1,  # the examples of libraries are of two
        memory_format=None if memory_format is None else memory_format.value,
        backend=backend.value,
        round_to=round_to,
    )
    how: dict[str, Any] = {"side": side.value, "method": method.value, "is_global": is_global, **budgets}
    how["ignore"] = listed("--ignore", ignore, str) if ignore else ()
    needs = calibration if repair or importance in FROM_IMAGES else 0
    with Waiting("pruning", Console(stderr=True, quiet=quiet)) as waiting:
        waiting.step("building")
        subject = find_subject(model, inputs, weights, seed)
        try:
            images = images_for(model, subject, data, needs, seed, (mean, std)) if data else None
            if evaluate and images:
                check_outputs(subject.model, images[0])
            waiting.step("masking")
            how["importance"] = (
                FROM_IMAGES[importance](images[1]) if images and importance in FROM_IMAGES else importance
            )
            zeroed = subject.model if masked else upscale.mask(subject.model, subject.args, subject.kwargs, **how)
            repaired = None
            if repair and images:
                waiting.step("repairing")
                with waiting.paused():
                    zeroed = _repaired(zeroed, subject.model, images[1], blocks, seed, quiet)
                repaired = zeroed.repair_report
            waiting.step("exporting")
            pruned = upscale.export(zeroed, subject.args, subject.kwargs, reads=reads.value, target=target)
            result = _Result(pruned, repaired)
            if evaluate and images:
                waiting.step("evaluating")
                result.top1 = (accuracy(subject.model, images[0]), accuracy(pruned, images[0]))
            waiting.step("writing")
            _write(result, subject, {_save: out, _to_onnx: onnx, _to_page: report})
        except (UpscaleError, DataError, OSError) as error:
            raise UsageError(str(error)) from error
    _tell(result, as_json, quiet)


def _check_choice(budgets: dict[str, float], masked: bool) -> None:
    names = " and ".join(f"--{name}" for name in budgets)
    if masked and budgets:
        raise UsageError(f"--masked takes the zeros that are there: leave out {names}")
    if not masked and len(budgets) != 1:
        raise UsageError(f"give one of --amount, --flops, --params, --latency, not {names or 'none'}; or --masked")


_ENDINGS = {"--out": (".safetensors", ".pt2"), "--onnx": (".onnx",), "--report": (".html",)}


def _check_files(files: dict[str, Path | None], force: bool) -> None:
    """Before any work is done: what will be written can be."""
    for option, path in files.items():
        if path is None:
            continue
        if path.suffix not in _ENDINGS[option]:
            raise UsageError(f"{option}: {path} must end in {' or '.join(_ENDINGS[option])}")
        if path.exists() and not force:
            raise UsageError(f"{option}: {path} is there already; replace it with --force")
        if not path.parent.is_dir():
            raise UsageError(f"{option}: there is no folder {path.parent}")


def _check_images(importance: str, data: Path | None, evaluate: bool, repair: bool, masked: bool) -> None:
    if importance not in (*_PLAIN, *FROM_IMAGES):
        raise UsageError(f"--importance: {importance!r} is none of {', '.join((*_PLAIN, *FROM_IMAGES))}")
    if repair and masked:
        raise UsageError("--repair needs the weights before masking, and --masked has none: leave one of them out")
    asking = {"--eval": evaluate, "--repair": repair, f"--importance {importance}": importance in FROM_IMAGES}
    option = next((option for option, asked in asking.items() if asked), None)
    if data is None and option is not None:
        raise UsageError(f"{option} needs images: say where with --data")


def _check_blocks(blocks: int, repair: bool) -> None:
    if blocks and not repair:
        raise UsageError(f"--blocks {blocks} goes on from what --repair finds: give that too")


def _repaired(masked: nn.Module, original: nn.Module, images: Images, blocks: int, seed: int, quiet: bool) -> Any:
    """``upscale.repair``; what it warns of is a line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RepairWarning)
        how = {"progress": not quiet, "seed": seed, **with_blocks(blocks)}
        repaired = upscale.repair(masked, original, batches_of(images), **how)
    for warning in caught:
        if not quiet:
            print(f"upscale: {warning.message}", file=sys.stderr)
    return repaired


def _save(result: _Result, subject: Subject, path: Path) -> None:
    upscale.save(result.pruned, path)


def _to_onnx(result: _Result, subject: Subject, path: Path) -> None:
    upscale.to_onnx(result.pruned, path)


def _to_page(result: _Result, subject: Subject, path: Path) -> None:
    models: dict[str, nn.Module] = {"original": subject.model, "pruned": result.pruned}
    result.pruned.report.to_html(path, latency=measure.latency(models, subject.args, runs=10) if subject.args else None)


_Writer = Callable[[_Result, Subject, Path], None]


def _write(result: _Result, subject: Subject, files: dict[_Writer, Path | None]) -> None:
    for write, path in files.items():
        if path is not None:
            write(result, subject, path)
            result.written.append(path)


def _tell(result: _Result, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    elif not quiet:
        console = Console()
        print(result.pruned.report.render(console.width if console.is_terminal else None))
        if result.repair is not None:
            print(f"repair      {result.repair.summary()}")
        if result.top1 is not None:
            print(f"top-1       {result.top1[0]:.1f} -> {result.top1[1]:.1f} percent")
        for path in result.written:
            print(f"written     {path} ({path.stat().st_size / 1e6:,.1f} MB)")

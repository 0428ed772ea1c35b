"""``upscale reproduce``: how accurate is a pruned network, masked in which way?"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..reproduce.executors import EXECUTORS
from ..reproduce.images import DataError
from ..reproduce.models import KNOWN, ModelError, find_recipe, find_weights, shared
from ..reproduce.rows import EVEN, IMPORTANCES, METHODS, RANKINGS, RIDGE, Row, Source, read_rows
from ..reproduce.run import combinations, left, plan_jobs, sweep
from ..reproduce.show import gains_table, line, table
from ..reproduce.worker import Job, check
from ..zoo.table import BadTableError
from .bars import long_bar
from .errors import UsageError
from .photos import DEFAULT_MEAN, DEFAULT_STD, Mean, Std, colours
from .values import listed, one_of, shares

DEFAULT_MODELS = (
    "resnet20",
    "resnet56",
    "densenet40",
    "mobilenet_v2",
    "mobilenetv1_100",
    "mobilenetv1_050",
    "mobilenet_edgetpu",
)
SIDES = ("input", "output")

_WHAT, _DATA, _RUN = "What is tried", "Images", "How it runs"

Models = Annotated[
    list[str],
    typer.Option("--models", metavar="NAME,...", help="Of the table, torchvision or timm, or package.module:function."),
]
Importances = Annotated[
    list[str],
    typer.Option("--importance", metavar="NAME,...", help=", ".join(IMPORTANCES) + ".", rich_help_panel=_WHAT),
]
Amounts = Annotated[
    list[str],
    typer.Option(
        "--amounts",
        metavar="SHARE,...",
        help="Shares of the channels: numbers, or first:last:step.",
        rich_help_panel=_WHAT,
    ),
]
Sides = Annotated[list[str], typer.Option("--sides", metavar="NAME,...", help="input, output.", rich_help_panel=_WHAT)]
Methods = Annotated[
    list[str], typer.Option("--methods", metavar="NAME,...", help=", ".join(METHODS) + ".", rich_help_panel=_WHAT)
]
Rankings = Annotated[
    list[str],
    typer.Option(
        "--ranking",
        metavar="NAME,...",
        help="even: the same share of each layer; global: rank all layers together.",
        rich_help_panel=_WHAT,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="A .npz file, a folder that has it, or a folder of images by class.", rich_help_panel=_DATA),
]
Weights = Annotated[
    Path | None, typer.Option(help="A file (.safetensors, .pt) or a folder of them.", rich_help_panel=_DATA)
]
ImagesOption = Annotated[
    str, typer.Option("--images", metavar="N|all", help="How many are evaluated on.", rich_help_panel=_DATA)
]
Calibration = Annotated[
    int,
    typer.Option(min=1, help="Images for repairs and scores that need data; not evaluated on.", rich_help_panel=_DATA),
]
Repair = Annotated[
    bool,
    typer.Option("--repair", help="Each combination a second time, repaired: upscale.repair.", rich_help_panel=_WHAT),
]
Size = Annotated[int, typer.Option(min=1, help="Height and width, for models not of the table.", rich_help_panel=_DATA)]
Seed = Annotated[int, typer.Option(help="Of the choice of images.", rich_help_panel=_DATA)]
Workers = Annotated[
    int, typer.Option(min=0, help="Combinations at the same time; 0: as many as cores.", rich_help_panel=_RUN)
]
ExecutorOption = Annotated[
    str, typer.Option("--executor", metavar="local|ray", help="Processes here, or a Ray cluster.", rich_help_panel=_RUN)
]
Address = Annotated[str, typer.Option(help="Of the Ray cluster; without it one is started here.", rich_help_panel=_RUN)]
Out = Annotated[Path, typer.Option(help="Folder of the table, the pictures and the summary.", file_okay=False)]
Resume = Annotated[bool, typer.Option(help="Skip combinations that the table has.", rich_help_panel=_RUN)]

HELP = f"""\
How accurate is a pruned network? Mask, export, verify, evaluate and time every combination.

Examples:
  upscale reproduce --models resnet20 --importance l2 --amounts .1,.25 --repair --calibration 1024
  upscale reproduce --models resnet50 --weights resnet50.pth --data photos/ --importance l2,lamp
  upscale reproduce --models resnet56 --importance obs --ranking even,global --repair --calibration 1024
  upscale reproduce --models mynets:small --weights small.safetensors --data images.npz --size 64 --methods contiguous

Nothing is downloaded. Networks of the table ({", ".join(KNOWN)}) know their weights' file, images and size; weights and
data are looked for in the folders "weights" and "data" of $UPSCALE_SHARED or ../shared, unless said otherwise. Class
folders are numbered in alphabetical order.

A row is the exported model's: top-1 on the images, parameters, FLOPs, and latency of one image relative to the dense
network, timed in turns in processor time of one thread (combinations run beside each other). A model whose output
differs from the masked model's is a failure, not a row. OUT has the table (rows.csv), a picture for each network and
their average, and summary.md: what unconstrained masks gain at equal amount, equal FLOPs and equal latency.

With --ranking global the amount is a share of all layers' channels together, and the lowest go wherever they are.
Scores of obs and lamp compare between layers as they are; each layer's scores of another kind are divided by their root
mean square first. Gains are between masks of one ranking.

Stop at any time (Ctrl-C) and run the same command again to go on; what other commands wrote to OUT stays there, and is
in its pictures and summary.

Exit status: 0 if all combinations were measured, 1 if one was not, 2 for a mistake in the command, 130 if interrupted.
"""


def reproduce(
    context: typer.Context,
    models: Models = list(DEFAULT_MODELS),  # noqa: B006 - typer copies it
    importance: Importances = ["l1,l2,lamp,fpgm,hrank"],  # noqa: B006
    amounts: Amounts = [".05:.5:.05"],  # noqa: B006
    sides: Sides = ["input"],  # noqa: B006
    methods: Methods = ["unconstrained,constrained"],  # noqa: B006
    ranking: Rankings = [EVEN],  # noqa: B006
    repair: Repair = False,
    data: Data = None,
    weights: Weights = None,
    images: ImagesOption = "2000",
    calibration: Calibration = 256,
    size: Size = 224,
    mean: Mean = DEFAULT_MEAN,
    std: Std = DEFAULT_STD,
    seed: Seed = 0,
    out: Out = Path("results"),
    resume: Resume = True,
    workers: Workers = 0,
    executor: ExecutorOption = "local",
    address: Address = "",
) -> int:
    """The command; ``HELP`` is what it says of itself."""
    wanted = combinations(
        listed("--importance", importance, one_of(IMPORTANCES)),
        listed("--sides", sides, one_of(SIDES)),
        listed("--methods", methods, one_of(METHODS)),
        sorted({share for group in listed("--amounts", amounts, shares) for share in group}),
        ("", RIDGE) if repair else ("",),
        listed("--ranking", ranking, one_of(RANKINGS)),
    )
    _check_executor(executor)
    view = (colours("--mean", mean), colours("--std", std), size)
    shown = (_images(images), calibration, seed)
    try:
        sources = [_source(name, weights, data, shown, view) for name in listed("--models", models, str)]
        jobs = plan_jobs(sources, wanted)
        for source in sources:
            check(source, wanted)
        table_file = out / "rows.csv"
        todo = left(jobs, table_file, resume)
        _run(jobs, todo, table_file, executor, workers or os.cpu_count() or 1, address)
        return _conclude(jobs, out, shlex.join(["upscale", *context.obj]))
    except (DataError, ModelError, BadTableError, OSError) as error:
        raise UsageError(str(error)) from error


def _check_executor(name: str) -> None:
    """Raises ``UsageError`` for another name, or where what it needs is not installed."""
    if name not in EXECUTORS:
        raise UsageError(f"--executor: {name!r} is none of {', '.join(EXECUTORS)}")
    if name == "ray" and find_spec("ray") is None:
        raise UsageError("--executor ray needs ray: pip install 'upscale-pruning[ray]'")
    if find_spec("matplotlib") is None or find_spec("PIL") is None:
        raise UsageError("upscale reproduce needs matplotlib and pillow: pip install 'upscale-pruning[reproduce]'")


def _images(text: str) -> int:
    if text == "all":
        return 0
    if not text.isascii() or not text.isdigit() or int(text) < 2:
        raise UsageError(f"--images: {text!r} must be all, or a whole number of at least 2")
    return int(text)


def _source(
    name: str,
    weights: Path | None,
    data: Path | None,
    shown: tuple[int, int, int],
    view: tuple[tuple[float, ...], tuple[float, ...], int],
) -> Source:
    """Where a network's weights and images are. Raises ``ModelError`` and ``DataError``."""
    recipe = find_recipe(name)
    if not recipe.data and (weights is None or data is None):
        raise UsageError(f"{name} is not of the table: say --weights and --data")
    file = find_weights(name, recipe, weights or shared() / "weights")
    folder = data or shared() / "data"
    images = folder / recipe.data if recipe.data and (folder / recipe.data).is_file() else folder
    if not images.exists():
        raise DataError(f"{images} is not there: say where the images are with --data")
    own = ((), (), 0) if recipe.data else view
    return Source(name, str(file.resolve()), str(images.resolve()), *shown, *own)


def _run(jobs: Sequence[Job], todo: Sequence[Job], out: Path, executor: str, workers: int, address: str) -> None:
    """Measure what is left, with a bar; a line for each combination as it is done."""
    console = Console(stderr=True)
    if len(todo) < len(jobs):
        console.out(f"{len(jobs) - len(todo)} of {len(jobs)} combinations are in {out} already", highlight=False)
    if not todo:
        return
    with long_bar(console, 40) as progress:
        task = progress.add_task(todo[0].source.model, total=len(todo))
        for job, row in sweep(todo, out, executor, workers, address):
            progress.update(task, advance=1, description=f"{job.source.model} {job.combination}")
            progress.console.print(line(row), highlight=False, soft_wrap=True)


def _conclude(jobs: Sequence[Job], out: Path, command: str) -> int:
    from ..reproduce.plots import write_plots
    from ..reproduce.summary import write_summary

    every = read_rows(out / "rows.csv")
    wanted = {job.blank().key for job in jobs}
    rows: list[Row] = [row for row in every if row.key in wanted]
    console = Console()
    console.print(table(rows))
    console.print(gains_table(rows))
    failed = [row for row in rows if row.reason]
    for row in failed:
        console.print(f"{row.model} {row.combination}: {row.reason}", style="red", highlight=False, markup=False)
    pictures = write_plots(out, every)
    written = [out / "rows.csv", *pictures, write_summary(out, every, pictures, command)]
    console.out(f"written to {', '.join(map(os.fspath, written))}", highlight=False)
    return 1 if failed else 0

"""``upscale bench``: how fast is a pruned model, and how much of what could be had is had?"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..bench.backends import BACKENDS, missing_packages
from ..bench.markdown import write_markdown
from ..bench.models import UnknownModelError, default_suites, find_models
from ..bench.rows import MEMORY_FORMATS, VARIANTS, Row, Setting, read_rows
from ..bench.run import left, measured, plan_jobs
from ..bench.show import failed, line, remarks, tables
from ..bench.worker import Budget, Job
from ..zoo.process import Limits
from ..zoo.suites import SuiteError
from ..zoo.table import BadTableError
from .bars import long_bar
from .choices import Side
from .errors import UsageError
from .values import count, listed, one_of, share

DEFAULT_MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "efficientnet_v2_s",
    "densenet121",
    "googlenet",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
)


class DType(str, Enum):
    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


_ALL = ",".join(VARIANTS)

_WHAT, _HOW, _FILES = "What is timed", "How it is timed", "Tables"

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL", help="Names of the suites, or package.module:function.", show_default=False),
]
SuiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME|FILE",
        help="Where names are looked up: torchvision and timm, unless given. May be given again; files as in "
        "`upscale zoo`.",
        rich_help_panel=_WHAT,
    ),
]
Amounts = Annotated[
    list[str],
    typer.Option("--amount", metavar="SHARE,...", help="Share of each layer's channels.", rich_help_panel=_WHAT),
]
SideOption = Annotated[Side, typer.Option(help="Channels that a layer reads, or writes.", rich_help_panel=_WHAT)]
Variants = Annotated[
    list[str], typer.Option("--variants", metavar="NAME,...", help="unpruned always is.", rich_help_panel=_WHAT)
]
Batches = Annotated[list[str], typer.Option("--batch", metavar="N,...", help="Batch sizes.", rich_help_panel=_HOW)]
Formats = Annotated[
    list[str],
    typer.Option("--memory-format", metavar="FORMAT,...", help="contiguous, channels_last.", rich_help_panel=_HOW),
]
Backends = Annotated[
    list[str],
    typer.Option(
        "--backend", metavar="NAME,...", help="eager, compile, cudagraphs, onnxruntime.", rich_help_panel=_HOW
    ),
]
Threads = Annotated[list[str], typer.Option("--threads", metavar="N,...", help="Of the CPU.", rich_help_panel=_HOW)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=_HOW)]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Of weights and images.", rich_help_panel=_HOW)]
RoundTo = Annotated[
    list[str],
    typer.Option(
        "--round-to", metavar="N,...", help="Multiples that channel counts are kept at.", rich_help_panel=_HOW
    ),
]
Size = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of images. [default: 224; a suite file's own]", rich_help_panel=_HOW),
]
Seconds = Annotated[
    float, typer.Option(min=0, help="Of timed rounds, for each model and setting.", rich_help_panel=_HOW)
]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds, at most.", rich_help_panel=_HOW)]
Timeout = Annotated[
    float,
    typer.Option(min=1, metavar="SECONDS", help="Of a model in a setting, exports included.", rich_help_panel=_HOW),
]
Memory = Annotated[float, typer.Option(min=0.1, metavar="GB", help="Of one process.", rich_help_panel=_HOW)]
Seed = Annotated[int, typer.Option(help="Of weights and inputs.", rich_help_panel=_HOW)]
Out = Annotated[Path, typer.Option(help="The table; new rows are added.", rich_help_panel=_FILES, dir_okay=False)]
Resume = Annotated[
    bool,
    typer.Option(
        help="Skip what has rows of the same settings, version and machine in the table.", rich_help_panel=_FILES
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw the rows of this command (PNG, PDF, SVG).", rich_help_panel=_FILES)
]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the rows of this command as Markdown.", rich_help_panel=_FILES)
]

HELP = f"""\
How fast is a pruned model? Time it against the unpruned one, other ways to prune it, and the floor.

Examples:
  upscale bench resnet18 --seconds 3
  upscale bench resnet50 densenet121 --amount 0.25,0.5 --batch 1,8 --memory-format contiguous,channels_last
  upscale bench mynets:small_net --size 64 --backend eager,compile --plot speed.png --markdown speed.md

Without a MODEL: {", ".join(DEFAULT_MODELS)}. Nothing is downloaded: weights are random. Every combination of the listed
amounts, batch sizes, memory formats, backends, threads and multiples is a setting; each model has a process of its own
in each.

The variants are unpruned, constrained (layers on a shared tensor mask the same channels), baseline, gather and auto
(each layer its own channels; the three ways of `reads=`), contiguous (masks that leave contiguous reads) and ideal
(auto, with every read free of copies: the floor; its values are wrong). They are timed in turns, and an exported model
that does not compute what the masked one computes is not timed. Copied bytes and kernels are counted by torch's
profiler, in eager mode.

Keep the machine otherwise idle: a row says if its times vary by more than a tenth, and if the unpruned model, timed
under two names, differs from itself by more than 3 %. Stop at any time (Ctrl-C) and run the same command again to go
on.

Exit status: 0 if all models were measured, 1 if one was not, 2 for a mistake in the command, 130 if interrupted."""


def bench(
    context: typer.Context,
    models: Models = None,
    suite: SuiteOption = None,
    amount: Amounts = ["0.25"],  # noqa: B006 - typer copies it
    side: SideOption = Side.input,
    variants: Variants = [_ALL],  # noqa: B006
    batch: Batches = ["1"],  # noqa: B006
    memory_format: Formats = ["contiguous"],  # noqa: B006
    backend: Backends = ["eager"],  # noqa: B006
    threads: Threads = ["1"],  # noqa: B006
    device: Device = "cpu",
    dtype: DTypeOption = DType.float32,
    round_to: RoundTo = ["1"],  # noqa: B006
    size: Size = None,
    seconds: Seconds = 20,
    rounds: Rounds = 200,
    timeout: Timeout = 900,
    memory: Memory = 8,
    seed: Seed = 0,
    out: Out = Path("bench.csv"),
    resume: Resume = True,
    plot: PlotOption = None,
    markdown: MarkdownOption = None,
) -> int:
    """The command; ``HELP`` is what it says of itself."""
    on = _device(device)
    settings = [
        Setting(share_, images, form, runner, cores, on, dtype.value, side=side.value, seed=seed, round_to=multiple)
        for share_, images, form, runner, cores, multiple in itertools.product(
            listed("--amount", amount, share),
            listed("--batch", batch, count),
            listed("--memory-format", memory_format, one_of(MEMORY_FORMATS)),
            listed("--backend", backend, one_of(tuple(BACKENDS))),
            listed("--threads", threads, count),
            listed("--round-to", round_to, count),
        )
    ]
    _check_packages([setting.backend for setting in settings], plot)
    chosen = listed("--variants", variants, one_of(VARIANTS))
    chosen = [name for name in VARIANTS if name in chosen or name == "unpruned"]
    limits = Limits(timeout, memory)
    try:
        sources = find_models(models or DEFAULT_MODELS, suite or default_suites())
        jobs = plan_jobs(sources, settings, size, chosen, Budget(rounds, seconds=seconds), limits)
        _run(jobs, left(jobs, out, resume), out, limits)
        return _conclude(jobs, out, plot, markdown, shlex.join(["upscale", *context.obj]))
    except (SuiteError, UnknownModelError, BadTableError, OSError) as error:
        raise UsageError(str(error)) from error


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise UsageError(f"--device: {text!r} is no device; write cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: torch finds no CUDA device here")
    return text


def _check_packages(backends: Sequence[str], plot: Path | None) -> None:
    for backend in dict.fromkeys(backends):
        if missing := missing_packages(backend):
            raise UsageError(f"--backend {backend} needs {', '.join(missing)}: pip install 'upscale-pruning[onnx]'")
    if plot is not None and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'upscale-pruning[bench]'")
    if plot is not None and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--plot: {plot} must end in .png, .pdf or .svg")


def _run(jobs: Sequence[Job], todo: Sequence[Job], out: Path, limits: Limits) -> None:
    """Measure what is left, with a bar; a line for each model and setting as it is done."""
    console = Console(stderr=True)
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} measurements are in {out} already")
    if not todo:
        return
    with long_bar(console, 50) as progress:
        task = progress.add_task("", total=len(todo))
        tell = lambda job: progress.update(task, description=f"{job.source.model} {job.setting}")  # noqa: E731
        for rows in measured(todo, out, limits, tell):
            progress.advance(task)
            progress.console.print(line(rows), highlight=False)


def _conclude(jobs: Sequence[Job], out: Path, plot: Path | None, markdown: Path | None, command: str) -> int:
    wanted = {row.key for job in jobs for row in job.blanks()}
    rows: list[Row] = [row for row in read_rows(out) if row.key in wanted]
    console = Console()
    for shown in tables(rows):
        console.print(shown)
    for text in remarks(rows):
        console.print(text, style="yellow", highlight=False, markup=False)
    written = [out]
    if plot is not None:
        from ..bench.plot import write_plot

        write_plot(plot, rows)
        written.append(plot)
    if markdown is not None:
        write_markdown(markdown, rows, command, plot)
        written.append(markdown)
    console.print(f"written to {', '.join(map(os.fspath, written))}", highlight=False)
    return 1 if failed(rows) else 0

"""``upscale zoo``: try every model of a suite, one row each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..zoo.markdown import write_markdown
from ..zoo.process import Limits
from ..zoo.rows import BadTableError, Row, Settings, read_rows
from ..zoo.run import Run, Trial, UnknownModelError, choose, left
from ..zoo.show import failures, line, summary, table
from ..zoo.suite_file import FORMAT
from ..zoo.suites import BUILT_IN, SuiteError, load_suite
from .choices import Reads
from .errors import UsageError


class Side(str, Enum):
    input = "input"
    output = "output"
    both = "both"


class Method(str, Enum):
    unconstrained = "unconstrained"
    constrained = "constrained"


class DType(str, Enum):
    auto = "auto"
    float64 = "float64"
    float32 = "float32"


_RUN, _MASK, _FILES = "What is tried, and how long", "Masks and export", "Tables"

SuiteOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="NAME|FILE",
        help=f"{', '.join(BUILT_IN)}, or a CSV or TOML file (below); may be given again. All that are installed, "
        "unless given.",
        rich_help_panel=_RUN,
    ),
]
Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help="Only these models of the suites.")]
Listing = Annotated[bool, typer.Option("--list", help="Print the names of the models and end.", rich_help_panel=_RUN)]
Jobs = Annotated[int, typer.Option(min=1, help="Models tried at the same time.", rich_help_panel=_RUN)]
Timeout = Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Of one model.", rich_help_panel=_RUN)]
Memory = Annotated[float, typer.Option(min=0.1, metavar="GB", help="Of one model.", rich_help_panel=_RUN)]
Amount = Annotated[float, typer.Option(help="Share of each layer's channels to mask.", rich_help_panel=_MASK)]
SideOption = Annotated[Side, typer.Option(help="Channels that a layer reads, or writes.", rich_help_panel=_MASK)]
MethodOption = Annotated[
    Method, typer.Option(help="Each layer its own, or tied layers the same.", rich_help_panel=_MASK)
]
ReadsOption = Annotated[Reads, typer.Option(help="How layers get their channels.", rich_help_panel=_MASK)]
DTypeOption = Annotated[DType, typer.Option(help="auto: float64 up to 100 million parameters.", rich_help_panel=_MASK)]
Seed = Annotated[int, typer.Option(help="Of weights and inputs.", rich_help_panel=_MASK)]
Out = Annotated[Path, typer.Option(help="The table; new rows are added.", rich_help_panel=_FILES, dir_okay=False)]
Resume = Annotated[
    bool, typer.Option(help="Skip models whose row of the same settings and version exists.", rich_help_panel=_FILES)
]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the table as Markdown too.", rich_help_panel=_FILES)
]

HELP = f"""\
Which models can be pruned? Mask, export and compare each of them; one row a model.

Examples:
  upscale zoo --suite torchvision resnet18
  upscale zoo --suite timm --side both --jobs 2 --out timm.csv --markdown timm.md
  upscale zoo --suite mine.csv

Nothing is downloaded: every model gets random weights, with random batch norm statistics. It is built, masked, exported
and compared with its masked self in a process of its own, so a model that fails, hangs or eats the memory is a row with
the reason. Stop at any time (Ctrl-C) and run the same command again to go on.

Exit status: 0 if every model tried is equal, 1 if one is not, 2 for a mistake in the command, 130 if interrupted.

{FORMAT}"""


def zoo(
    models: Models = None,
    suite: SuiteOption = None,
    listing: Listing = False,
    jobs: Jobs = 1,
    timeout: Timeout = 600,
    memory: Memory = 8,
    amount: Amount = 0.25,
    side: SideOption = Side.input,
    method: MethodOption = Method.unconstrained,
    reads: ReadsOption = Reads.auto,
    dtype: DTypeOption = DType.auto,
    seed: Seed = 0,
    out: Out = Path("coverage.csv"),
    resume: Resume = True,
    markdown: MarkdownOption = None,
) -> int:
    """The command; ``HELP`` is what it says of itself."""
    settings = Settings(_checked(amount), side.value, method.value, reads.value, dtype.value, seed)
    limits = Limits(timeout, memory)
    suites = suite or [name for name, (_, package) in BUILT_IN.items() if find_spec(package)]
    if not suites:
        raise UsageError("no suite is installed: pip install 'upscale-pruning[zoo]', or give a file with --suite")
    try:
        if listing:
            return _list(suites)
        trials = choose(suites, models or [], settings, limits)
        todo = left(trials, out, resume)
        _run(Run(out, limits, jobs), trials, todo)
        return _conclude(out, trials, markdown)
    except (SuiteError, UnknownModelError, BadTableError, OSError) as error:
        raise UsageError(str(error)) from error


def _checked(amount: float) -> float:
    if not 0 < amount < 1:
        raise UsageError(f"--amount must be more than 0 and less than 1, not {amount:g}")
    return amount


def _list(suites: Iterable[str]) -> int:
    for which in suites:
        suite = load_suite(which)
        for name in suite.names():
            print(f"{suite.name}\t{name}")
    return 0


def _run(run: Run, trials: Sequence[Trial], todo: Sequence[Trial]) -> None:
    """Try what is left, with a bar; a line for each model as it is done."""
    console = Console(stderr=True)
    if len(todo) < len(trials):
        console.print(f"{len(trials) - len(todo)} of {len(trials)} models are in {run.out} already")
    columns = (TextColumn("{task.description:30.30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for row in run.rows(todo, lambda name: progress.update(task, description=name)):
            progress.advance(task)
            progress.console.print(line(row), highlight=False)


def _conclude(out: Path, trials: Sequence[Trial], markdown: Path | None) -> int:
    wanted = {trial.blank.key for trial in trials}
    rows: list[Row] = [row for row in read_rows(out) if row.key in wanted]
    console = Console()
    console.print(table(rows))
    if told := failures(rows):
        console.print(told, style="red", highlight=False, markup=False)
    console.print(summary(rows), highlight=False)
    console.print(f"written to {out}", highlight=False)
    if markdown is not None:
        write_markdown(markdown, read_rows(out))
        console.print(f"written to {markdown}", highlight=False)
    return 0 if all(row.good for row in rows) else 1

"""All commands in one application. A command is a function in a module of its own, added here."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

import upscale

from .bench import HELP as BENCH_HELP
from .bench import bench
from .coverage import HELP as COVERAGE_HELP
from .coverage import coverage
from .errors import UsageError
from .inspect import HELP as INSPECT_HELP
from .inspect import inspect
from .prune import HELP as PRUNE_HELP
from .prune import prune
from .reproduce import HELP as REPRODUCE_HELP
from .reproduce import reproduce
from .text import for_help
from .zoo import HELP as ZOO_HELP
from .zoo import zoo

INTERRUPTED = 130

app = typer.Typer(
    name="upscale",
    help="Zero channels of a PyTorch model, and get a smaller model that computes the same.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"upscale {upscale.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Options that come before the command."""


app.command(help=for_help(INSPECT_HELP), no_args_is_help=True)(inspect)
app.command(help=for_help(PRUNE_HELP), no_args_is_help=True)(prune)
app.command(help=for_help(ZOO_HELP))(zoo)
app.command(help=for_help(BENCH_HELP))(bench)
app.command(help=for_help(REPRODUCE_HELP))(reproduce)
app.command(help=for_help(COVERAGE_HELP), no_args_is_help=True)(coverage)


def run(arguments: Sequence[str]) -> int:
    """The exit status of ``upscale ARGUMENTS``; every error on purpose is one clear message and status 2."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        status = app(list(arguments), standalone_mode=False, obj=tuple(arguments))
    except UsageError as error:
        print(f"upscale: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        show = getattr(error, "show", None)  # click's own usage errors
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    if status == INTERRUPTED:  # typer makes a status of Ctrl-C itself
        print("upscale: interrupted; what was done is kept", file=sys.stderr)
    return status if isinstance(status, int) else 0


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

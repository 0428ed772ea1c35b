"""How near budgets are met: masks to a share of the FLOPs, parameters or latency, measured on the exported model.

``python -m benchmarks.budgets [--nets resnet50 swin_t] [--left 0.8 0.5] [--kinds flops params latency] [--size 224]``

Everything is counted anew on the exported model and on the original: FLOPs by torch's counter while they run,
parameters one by one, latency as the median ratio of calls made in turn (one thread, batch 1). *met*: within 1 % of
the share asked for, 10 % of a latency. A budget that masking refuses is a row with the reason. Networks are
torchvision's with random weights; masks are unconstrained, on the input side, by L2 norm. Rows are written to
``benchmarks/out/budgets.csv`` one by one; rows that are there already are kept unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import upscale
from upscale.zoo.table import read_table, write_table

from . import ROOT

from support.vision import build  # isort: skip

NETS = ("resnet50", "mobilenet_v2", "densenet121", "efficientnet_v2_s", "swin_t")
LEFT = (0.8, 0.5, 0.3)
TOLERANCE = {"flops": 0.01, "params": 0.01, "latency": 0.1}
OUT = ROOT / "benchmarks" / "out" / "budgets.csv"


@dataclass(frozen=True)
class Row:
    """One budget. ``left``: what the exported model has of the original; None, and a ``reason``, where refused."""

    model: str
    kind: str
    asked: float
    size: int
    left: float | None
    seconds: float
    reason: str

    @property
    def met(self) -> bool:
        return self.left is not None and abs(self.left - self.asked) <= TOLERANCE[self.kind] * self.asked

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.model, self.kind, self.asked, self.size


def flops(model: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    return _counted(pruned, x) / _counted(model, x)


def _counted(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def params(model: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    return sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())


def latency(model: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    found = upscale.measure.timings({"before": model, "after": pruned}, (x,), runs=60, threads=1, seconds=8)
    return median(after / before for before, after in zip(found["before"], found["after"], strict=True))


KINDS: dict[str, Callable[[nn.Module, nn.Module, Tensor], float]] = {
    "flops": flops,
    "params": params,
    "latency": latency,
}


def measured(name: str, kind: str, asked: float, size: int) -> Row:
    """Prune ``name`` to the budget and measure what came out."""
    model, x = build(name), torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    try:
        pruned = upscale.prune(model, x, **{kind: asked})
    except upscale.UpscaleError as error:
        return Row(name, kind, asked, size, None, round(time.perf_counter() - start, 1), str(error))
    seconds = round(time.perf_counter() - start, 1)
    return Row(name, kind, asked, size, round(KINDS[kind](model, pruned, x), 4), seconds, "")


def table(rows: Sequence[Row]) -> Table:
    """What is left, by network and budget."""
    shown = Table(title="What is left of the original where a share is asked for")
    for title in ("network", "budget"):
        shown.add_column(title)
    for title in ("asked", "left", "off by", "met", "seconds"):
        shown.add_column(title, justify="right")
    for row in rows:
        left = "refused" if row.left is None else f"{row.left:.4f}"
        off = "" if row.left is None else f"{row.left / row.asked - 1:+.1%}"
        met = "yes" if row.met else "no"
        shown.add_row(row.model, row.kind, f"{row.asked:g}", left, off, met, f"{row.seconds:.0f}")
    return shown


def run(keys: Sequence[tuple[str, str, float, int]], out: Path, again: bool, console: Console) -> list[Row]:
    """The rows of ``keys``, measured where ``out`` does not have them yet."""
    rows = {row.key: row for row in read_table(out, Row, "a table of budgets") if not again or row.key not in keys}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("budgets", total=len(keys))
        for name, kind, asked, size in keys:
            progress.update(task, description=f"{name} {kind}={asked:g}")
            key = name, kind, asked, size
            if key not in rows:
                rows[key] = measured(*key)
                write_table(out, Row, rows.values())
                console.print(f"{name} {kind}={asked:g}: {rows[key].left} {rows[key].reason}")
            progress.advance(task)
    return [rows[key] for key in keys]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NET", help=f"default: {' '.join(NETS)}")
    parser.add_argument("--left", nargs="+", type=float, default=LEFT, help="default: 0.8 0.5 0.3")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="default: all")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image; default: 224")
    parser.add_argument("--out", type=Path, default=OUT, help="default: benchmarks/out/budgets.csv")
    parser.add_argument("--again", action="store_true", help="measure rows that are in the file already, too")
    chosen = parser.parse_args(arguments)
    if not all(0 < left <= 1 for left in chosen.left):
        parser.error("--left must be above 0 and at most 1")
    torch.set_num_threads(1)
    console = Console()
    keys = [(n, kind, left, chosen.size) for kind in chosen.kinds for n in chosen.nets for left in chosen.left]
    rows = run(keys, chosen.out, chosen.again, console)
    console.print(table(rows))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

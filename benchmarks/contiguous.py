"""How much of the gap between constrained and unconstrained masks contiguous ones close: retained importance on
torchvision's networks and on trained ones, and top-1 of the trained CIFAR-10 ones.

``python -m benchmarks.contiguous [--nets resnet18 resnet56] [--amounts 0.1 0.25] [--limit 2000]``

Retained importance: the sum of the L2 norms of the channels that the layers keep; *constrained* and
*unconstrained* are masks of the same sizes and scores. Reads: how many of the exported network's reads copy a
part of a tensor (``gather``, ``collect``), and how many concatenations it has beside the unpruned network's.
torchvision's networks have random weights. Top-1, in percent on the first images of the test set, is of masks
made by the three methods of ``MaskingManager`` at the same amount; the sizes of constrained masks may differ
from the others' where layers read different parts of a tensor."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import upscale
from upscale.cli.bench import DEFAULT_MODELS
from upscale.masking import Method
from upscale.retained import Retained

from .data import Images, predictions, test_set, top1
from .nets import NETS, load, why_missing

from support.vision import build  # isort: skip

RANDOM = DEFAULT_MODELS
TRAINED = tuple(name for name, net in NETS.items() if net.dataset == "cifar10")
METHODS: tuple[Method, ...] = ("constrained", "contiguous", "unconstrained")
AMOUNTS = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class Row:
    """One network at one amount. ``accuracy``: top-1 by method, of trained networks only."""

    name: str
    amount: float
    retained: Retained
    seconds: float
    gathers: int
    more_concats: int
    accuracy: dict[str, float]


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network in eval mode and an example of two images: trained weights for ``TRAINED``, else random ones."""
    if name in TRAINED:
        return load(name), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"aux_logits": False} if name == "googlenet" else {}
    return build(name, **options), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def measured(name: str, amount: float, limit: int) -> Row:
    """Mask, export, count the reads, and run the trained ones over ``limit`` images."""
    dense, example = network(name)
    model = copy.deepcopy(dense)
    start = time.perf_counter()
    manager = upscale.MaskingManager(model, method="contiguous", example_inputs=example).importance("l2").mask(amount)
    seconds = time.perf_counter() - start
    assert manager.retained is not None
    reads = upscale.export(model, (example,)).report.reads
    concats = reads.get("concat", 0) - _concats(dense, example)
    accuracy = _accuracy(name, dense, example, amount, test_set(name).first(limit)) if name in TRAINED else {}
    gathers = sum(reads.get(kind, 0) for kind in ("gather", "collect"))
    return Row(name, amount, manager.retained, seconds, gathers, max(0, concats), accuracy)


def _concats(dense: nn.Module, example: torch.Tensor) -> int:
    """Concatenations of the unpruned network."""
    graph = torch.export.export(dense, (example,), strict=False).graph
    return sum(node.target in (torch.ops.aten.cat.default, torch.ops.aten.pad.default) for node in graph.nodes)


def _accuracy(name: str, dense: nn.Module, example: torch.Tensor, amount: float, images: Images) -> dict[str, float]:
    found = {}
    for method in METHODS:
        model = copy.deepcopy(dense)
        upscale.MaskingManager(model, method=method, example_inputs=example).importance("l2").mask(amount)
        title = f"{name} at {amount:.0%}, {method}"
        found[method] = top1(predictions(model, images, batch=100, title=title), images)
    return found


def table(rows: Sequence[Row]) -> Table:
    """All rows, and the median of the gap closed."""
    shown = Table(title="Retained importance (percent of all) and top-1 (percent)")
    shown.add_column("network")
    for title in ("zeroed", *METHODS, "gap closed", "seconds", "gathers", "more concats", "top-1 (same order)"):
        shown.add_column(title, justify="right")
    for row in rows:
        r = row.retained
        kept = [f"{100 * getattr(r, method) / r.total:.2f}" for method in METHODS]
        accuracy = " / ".join(f"{row.accuracy[m]:.1f}" for m in METHODS) if row.accuracy else "-"
        counts = [f"{row.seconds:.1f}", str(row.gathers), str(row.more_concats)]
        shown.add_row(row.name, f"{row.amount:.0%}", *kept, f"{r.closed:.0%}", *counts, accuracy)
    if rows:
        shown.caption = f"median of the gap closed: {median(row.retained.closed for row in rows):.0%}"
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*RANDOM, *TRAINED)
    parser.add_argument("--nets", nargs="+", choices=every, default=every, metavar="NET", help=", ".join(every))
    parser.add_argument("--amounts", nargs="+", type=float, default=AMOUNTS, help="default: 0.1 0.25 0.5")
    parser.add_argument("--limit", type=int, default=2000, help="images for top-1; default: 2000")
    chosen = parser.parse_args(arguments)
    if not all(0 <= amount < 1 for amount in chosen.amounts):
        parser.error("--amounts must be at least 0 and less than 1")
    torch.set_num_threads(1)
    console = Console(width=140)
    rows = []
    for name in chosen.nets:
        missing = why_missing(name) if name in TRAINED else None
        if missing:
            console.print(f"{name}: left out, {missing}")
            continue
        for amount in chosen.amounts:
            rows.append(measured(name, amount, chosen.limit))
            done = rows[-1]
            console.print(f"{name} at {amount:.0%}: {done.retained.closed:.0%} of the gap, {done.seconds:.1f} s")
    console.print(table(rows))


if __name__ == "__main__":
    main()

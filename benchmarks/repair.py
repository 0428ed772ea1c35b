"""What ``upscale.repair`` gives back: top-1 of trained networks dense, masked and repaired, without any training.

``python -m benchmarks.repair [--nets resnet20 resnet56] [--amounts 0.1 0.25 0.5] [--methods unconstrained]``

Masks are L2 on the input side. Calibration is without labels: on CIFAR-10 the first 1,024 ``calib_images``, which are
training images; on ImageNet, where the data has one image of each class and no others, the images of even number (500),
and the test is on those of odd number. Elsewhere the test set is whole. Rows are written to
``benchmarks/out/repair.csv`` one by one; the time is that of the repair alone."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import upscale
from upscale.files import replacing
from upscale.masking import Method
from upscale.repairing.blockwise import BLOCK_STEPS
from upscale.reproduce.images import load_dataset

from . import ROOT
from .data import Images, predictions, test_set, top1
from .nets import NETS, load, shared, why_missing

DEFAULT = ("resnet20", "resnet56", "densenet40", "mobilenet_v2")
AMOUNTS = (0.1, 0.25, 0.5)
METHODS: tuple[Method, ...] = ("constrained", "unconstrained")
CSV = ROOT / "benchmarks" / "out" / "repair.csv"
_CALIBRATION = 1024
_BATCH = {32: 128, 224: 25}  # by size of the image


@dataclass(frozen=True)
class Case:
    """How a network is masked and repaired."""

    method: Method
    repair: Literal["ridge", "blockwise"]
    steps: int  # of blockwise
    amount: float


@dataclass(frozen=True)
class Row:
    """Top-1 in percent on ``images`` images; ``output_error``: see ``RepairReport.outputs``, after the repair."""

    network: str
    method: str
    repair: str
    steps: int
    amount: float
    calibration: int
    images: int
    dense: float
    masked: float
    repaired: float
    output_error: float
    seconds: float


def calibration(name: str, count: int | None = None) -> list[Tensor]:
    """Batches of the first ``count`` images, without labels, none of which are among those of :func:`tested`."""
    net = NETS[name]
    if net.dataset == "cifar10":
        data = load_dataset(shared() / "data", net.recipe.data, net.recipe.view).calibration
        assert data is not None
        images = data.first(_CALIBRATION)
    else:
        images = test_set(name)
        images = images.of(range(0, len(images), 2))
    images = images if count is None else images.first(count)
    step = _BATCH[net.size]
    return [images.batch(range(start, min(start + step, len(images)))) for start in range(0, len(images), step)]


def tested(name: str) -> Images:
    """The whole test set; of ImageNet the images that are not for calibration."""
    images = test_set(name)
    return images if NETS[name].dataset == "cifar10" else images.of(range(1, len(images), 2))


def measured(name: str, dense: nn.Module, batches: list[Tensor], images: Images, before: float, case: Case) -> Row:
    """Mask, repair, and run both over the test images. ``before``: the dense network's top-1."""
    masked = upscale.mask(dense, batches[0][:2], amount=case.amount, method=case.method)
    start = time.perf_counter()
    repaired = upscale.repair(masked, dense, batches, method=case.repair, steps=case.steps or BLOCK_STEPS)
    seconds = time.perf_counter() - start
    found = [accuracy(f"{name} {case.method} {case.amount:.0%}", model, images) for model in (masked, repaired)]
    error = round(repaired.repair_report.outputs[1], 5)
    return Row(name, *astuple(case), sum(map(len, batches)), len(images), before, *found, error, round(seconds, 1))


def accuracy(title: str, model: nn.Module, images: Images) -> float:
    """Top-1 in percent."""
    return round(top1(predictions(model, images, batch=50, title=title), images), 2)


def table(rows: Sequence[Row]) -> Table:
    """All rows."""
    shown = Table(title="Top-1 (percent), without training and labels")
    for title in asdict(rows[0]):
        shown.add_column(title, justify="left" if title in ("network", "method", "repair") else "right")
    for row in rows:
        shown.add_row(*map(str, asdict(row).values()))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(DEFAULT))
    parser.add_argument("--amounts", nargs="+", type=float, default=list(AMOUNTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--blockwise", action="store_true", help="fit blocks after the regressions")
    parser.add_argument("--calibration", type=int, help="calibrate on the first images only")
    parser.add_argument("--steps", type=int, default=BLOCK_STEPS, help="of the fit of blocks")
    parser.add_argument("--limit", type=int, help="test on the first images only")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in chosen.nets:
        missing = why_missing(name)
        if missing:
            raise SystemExit(missing)
        dense, batches, images = load(name), calibration(name, chosen.calibration), tested(name)
        images = images if chosen.limit is None else images.first(chosen.limit)
        dense_top1 = accuracy(f"{name} dense", dense, images)
        for amount in chosen.amounts:
            for method in chosen.methods:
                case = Case(method, *(("blockwise", chosen.steps) if chosen.blockwise else ("ridge", 0)), amount)
                rows.append(measured(name, dense, batches, images, dense_top1, case))
                write(rows)
                print(rows[-1], flush=True)
    Console().print(table(rows))


def write(rows: Sequence[Row]) -> None:
    """``CSV``, whole or not at all."""
    with replacing(CSV) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main()

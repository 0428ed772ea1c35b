"""What ``upscale.recalibrate`` gives back: top-1 on CIFAR-10's whole test set, without training and labels.

``python -m benchmarks.recalibrate [--nets resnet20 resnet56] [--amounts 0.25 0.5]``

Masks are L2 on the input side, unconstrained. The statistics are those of 1,024 training images in batches of 128."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import upscale
from upscale.reproduce.images import Images, load_dataset

from .data import predictions, test_set, top1
from .nets import NETS, load, shared, why_missing

_IMAGES, _BATCH = 1024, 128


def calibration(name: str) -> list[Tensor]:
    """Batches of training images."""
    recipe = NETS[name].recipe
    images = load_dataset(shared() / "data", recipe.data, recipe.view).calibration
    assert images is not None
    return [images.batch(range(start, start + _BATCH)) for start in range(0, _IMAGES, _BATCH)]


def accuracy(title: str, model: nn.Module, images: Images) -> str:
    """Top-1 in percent."""
    return f"{top1(predictions(model, images, title=title), images):.2f}"


def rows(name: str, amounts: Sequence[float]) -> list[list[str]]:
    """Of one network: amount, top-1 dense, pruned and recalibrated, seconds of the recalibration."""
    dense, batches, images = load(name), calibration(name), test_set(name)
    before, found = accuracy(f"{name} dense", dense, images), []
    for amount in amounts:
        title = f"{name} {amount:.0%}"
        pruned = upscale.prune(dense, batches[0][:2], amount=amount)
        after = accuracy(title, pruned, images)
        start = time.perf_counter()
        upscale.recalibrate(pruned, batches)
        seconds = time.perf_counter() - start
        found.append([name, f"{amount:.0%}", before, after, accuracy(title, pruned, images), f"{seconds:.1f}"])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    networks = [name for name, net in NETS.items() if net.dataset == "cifar10"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=networks, default=["resnet20", "resnet56"])
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.25, 0.5])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = Table("network", "zeroed", "dense", "pruned", "recalibrated", "seconds", title="Top-1 in percent")
    for name in chosen.nets:
        if missing := why_missing(name):
            raise SystemExit(missing)
        for row in rows(name, chosen.amounts):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()

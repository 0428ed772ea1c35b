"""What ``upscale.repair`` gives back: top-1 of trained networks dense, masked and repaired, without any training.

``python -m benchmarks.repair [--nets resnet20 resnet56] [--amounts 0.1 0.25 0.5] [--flops 0.5] [--masks l2 global]``

Masks are on the input side: ``l2`` (every layer loses the same share), ``obs`` (the same, by ``upscale.OBS``) or
``global`` (OBS, all layers ranked together). Calibration is without labels: on CIFAR-10 the first 1,024
``calib_images``, which are training images, and the test set is whole. ImageNet's data has one image of each class
and no others, so there are two ways: ``--imagenet mirrored`` calibrates on all 1,000 and tests on the same images
mirrored; ``--imagenet unseen`` calibrates on those of even number (500) and tests on those of odd number, so that no
class that is tested was among the calibration images.

Rows are added to ``docs/accuracy/repair.csv`` one by one, and what is there is not measured again;
``docs/accuracy/repair.md`` is written from all of them. Times are those of the masks and of the repair alone, on one
thread."""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

import upscale
from upscale.amounts import Budget, Request
from upscale.files import replacing
from upscale.markdown import table
from upscale.masking import Method
from upscale.measure import flops
from upscale.repairing import with_blocks
from upscale.repairing.blockwise import BLOCK_STEPS
from upscale.reproduce.images import load_dataset

from . import ROOT
from .data import Images, predictions, test_set, top1
from .nets import NETS, load, shared, why_missing

DEFAULT = ("resnet20", "resnet56", "densenet40", "mobilenet_v2", "mobilenetv1_100")
AMOUNTS = (0.1, 0.25, 0.5)
METHODS: tuple[Method, ...] = ("constrained", "unconstrained")
MASKS = ("l2", "obs", "global")
TITLES = {"l2": "L2", "obs": "OBS", "global": "OBS, global"}
TESTED: dict[Tested, str] = {"whole": "whole test set", "mirrored": "mirrored", "unseen": "unseen classes"}
OUT = ROOT / "docs" / "accuracy"
DAMPING = 0.01  # of OBS, unless told otherwise
_CALIBRATION = 1024
_BATCH = {32: 128, 224: 25}  # by size of the image

Masks = Literal["l2", "obs", "global"]
#: ``whole``: CIFAR-10's test set.
Tested = Literal["whole", "mirrored", "unseen"]


@dataclass(frozen=True)
class Case:
    """How a network is masked, repaired and tested. ``asked``: ``"amount"`` or ``"flops"``, of which ``share``;
    ``steps``: of the fit of blocks, 0 for regressions alone; ``turns``: of masks and repair by which the share is
    reached; ``calibration``: images."""

    network: str
    masks: Masks
    method: Method
    asked: Literal["amount", "flops"]
    share: float
    steps: int
    turns: int
    calibration: int
    tested: Tested


@dataclass(frozen=True)
class Row(Case):
    """Top-1 in percent on ``images`` images; ``flops``: what is left of them; ``output_error``: see
    ``RepairReport.outputs``, after the repair; ``device``: what the masks and the repair took their seconds on."""

    images: int
    dense: float
    masked: float
    repaired: float
    flops: float
    output_error: float
    mask_seconds: float
    repair_seconds: float
    device: str = "cpu"

    @property
    def case(self) -> Case:
        return Case(*(getattr(self, entry.name) for entry in fields(Case)))


def test_of(name: str, imagenet: Tested = "mirrored") -> Tested:
    """How a network is tested; ``imagenet``: if it is one of ImageNet."""
    return "whole" if NETS[name].dataset == "cifar10" else imagenet


def calibration(name: str, on: Tested, count: int | None = None, device: str = "cpu") -> list[Tensor]:
    """Batches of the first ``count`` images, without labels, on ``device``. Whether they are among those of
    :func:`tested`: see above."""
    net = NETS[name]
    if on == "whole":
        data = load_dataset(shared() / "data", net.recipe.data, net.recipe.view).calibration
        assert data is not None
        images = data.first(_CALIBRATION)
    else:
        images = test_set(name)
        images = images.of(range(0, len(images), 2)) if on == "unseen" else images
    images = images if count is None else images.first(count)
    step = _BATCH[net.size]
    places = range(len(images))
    return [images.batch(places[start : start + step]).to(device) for start in places[::step]]


def tested(name: str, on: Tested) -> Images:
    """The images that are tested on."""
    images = test_set(name)
    if on == "mirrored":
        return images.mirrored()
    return images if on == "whole" else images.of(range(1, len(images), 2))


def measured(
    dense: nn.Module, batches: list[Tensor], images: Images, before: float, case: Case, damping: float = DAMPING
) -> Row:
    """Mask, repair, export, and run the masked and the exported network over the test images. ``before``: the dense
    network's top-1; ``damping``: of OBS."""
    masked, repaired, seconds = in_turns(dense, batches, case, damping)
    pruned = upscale.export(repaired, (batches[0][:2],))
    left = flops(pruned, batches[0][:2]) / flops(dense, batches[0][:2])
    title = f"{case.network} {case.masks} {case.method} {case.asked} {case.share:g}"
    found = [accuracy(title, model, images) for model in (masked, pruned)]
    error = round(repaired.repair_report.outputs[1], 5)
    device = batches[0].device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Row(*astuple(case), len(images), before, *found, round(left, 4), error, *seconds, where)


def in_turns(
    dense: nn.Module, batches: list[Tensor], case: Case, damping: float
) -> tuple[nn.Module, Any, tuple[float, float]]:
    """The network as it is masked last, repaired, and the seconds that masks and repair took; in each turn the same
    share of what is there is kept, as by ``prune(steps=)``."""
    masking, repairing, repaired = 0.0, 0.0, dense
    budget = Budget("flops", case.share) if case.asked == "flops" else None
    request = Request(case.share, budget, case.turns, "geometric")
    for part in request.parts():
        start = time.perf_counter()
        masked = masked_by(repaired, batches, case, damping, **request.asked(part))
        between = time.perf_counter()
        repaired = upscale.repair(masked, dense, batches, **with_blocks(case.steps if part == 1 else 0))
        masking, repairing = masking + between - start, repairing + time.perf_counter() - between
    return masked, repaired, (round(masking, 1), round(repairing, 1))


def masked_by(dense: nn.Module, batches: list[Tensor], case: Case, damping: float, **how: Any) -> nn.Module:
    """The masked network; ``how``: its amount or budget, which L2 or OBS masks meet by the same share of every
    layer."""
    how |= {"method": case.method, "is_global": case.masks == "global"}
    if case.masks != "l2":
        how["importance"] = upscale.OBS(batches, damping=damping)
    masked: nn.Module = upscale.mask(dense, batches[0][:2], **how)
    return masked


def accuracy(title: str, model: nn.Module, images: Images) -> float:
    """Top-1 in percent."""
    device = next(model.parameters()).device
    found = predictions(lambda x: model(x.to(device)).cpu(), images, batch=50, title=title)
    return round(top1(found, images), 2)


# -- rows -------------------------------------------------------------------------------------------------------------


def written() -> list[Row]:
    """The rows that are there."""
    path = OUT / "repair.csv"
    if not path.is_file():
        return []
    kinds = {entry.name: {"int": int, "float": float}.get(str(entry.type), str) for entry in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def write(rows: Sequence[Row]) -> None:
    """Both files, whole or not at all."""
    with replacing(OUT / "repair.csv") as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, [entry.name for entry in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    with replacing(OUT / "repair.md") as draft:
        draft.write_text(page(rows), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """Every number, by network."""
    parts = [
        "# Accuracy of repaired networks\n\nWritten by `python -m benchmarks.repair`, whose first lines say how it is "
        "measured. Nothing is trained and no label is seen. *Masked* and *repaired* are top-1 in percent, *FLOPs* what "
        "the exported network has left of them. *L2*: every layer loses the same share. *OBS*: the same, by "
        "`upscale.OBS`. *OBS, global*: all layers ranked together by what the outputs lose; for a budget, by that "
        "over what a channel costs. *Unseen classes*: no class that is tested was among the calibration images; "
        "*mirrored*: tested are the calibration images, mirrored.\n"
    ]
    parts.append(f"## Repaired by ridge regression\n\n{summary(rows)}")
    for name in dict.fromkeys(row.network for row in rows):
        mine = sorted((row for row in rows if row.network == name), key=_order)
        parts.append(f"## {NETS[name].title}\n\n{_dense(mine)}\n")
        header = ["asked", "masks", "method", "repair", "images", "tested on", "FLOPs", "masked", "repaired", "lost"]
        parts.append(table(header, map(_line, mine)))
    return "\n".join(parts)


def _dense(rows: Sequence[Row]) -> str:
    found = dict.fromkeys((row.tested, row.dense, row.images) for row in rows)
    return "Dense: " + ", ".join(f"{dense:.2f} on {count:,} images ({TESTED[on]})" for on, dense, count in found) + "."


def summary(rows: Sequence[Row]) -> str:
    """Top-1 after ridge regression alone: a line for each network, test and way of masking, a column for each share."""
    plain = [row for row in rows if not row.steps and row.turns == 1]
    shares = {(row.asked, row.share) for row in plain}
    asked = sorted(shares, key=lambda one: (one[0], -one[1] if one[0] == "flops" else one[1]))
    lines = []
    for key in itertools.product(dict.fromkeys(row.network for row in plain), TESTED, MASKS, METHODS):
        name, on, masks, method = key
        mine = {(r.asked, r.share): r for r in plain if (r.network, r.tested, r.masks, r.method) == key}
        if mine:
            dense = next(iter(mine.values())).dense
            cells = [f"{mine[one].repaired:.1f}" if one in mine else "" for one in asked]
            lines.append([NETS[name].title, TESTED[on], TITLES[masks], method, f"{dense:.1f}", *cells])
    return table(["network", "tested on", "masks", "method", "dense", *(_asked(*one) for one in asked)], lines)


def _asked(asked: str, share: float) -> str:
    return f"{share:.0%} of channels" if asked == "amount" else f"{share:g} of FLOPs"


def _order(row: Row) -> tuple[Any, ...]:
    return row.tested, row.asked, row.share, row.steps, row.turns, MASKS.index(row.masks), row.method, row.calibration


def _line(row: Row) -> list[str]:
    repair = f"{row.steps} steps on blocks" if row.steps else "ridge"
    repair += f", {row.turns} turns" if row.turns > 1 else ""
    numbers = [f"{row.flops:.3f}", f"{row.masked:.2f}", f"{row.repaired:.2f}", f"{row.dense - row.repaired:.2f}"]
    how = [TITLES[row.masks], row.method, repair, str(row.calibration), TESTED[row.tested]]
    return [_asked(row.asked, row.share), *how, *numbers]


# -- the command ------------------------------------------------------------------------------------------------------


def cases(name: str, chosen: argparse.Namespace, count: int, on: Tested) -> Iterator[Case]:
    """What is asked for of one network."""
    shares = [("amount", amount) for amount in chosen.amounts] + [("flops", left) for left in chosen.flops]
    steps = chosen.steps if chosen.blockwise else 0
    for (asked, share), masks, method in itertools.product(shares, chosen.masks, chosen.methods):
        yield Case(name, masks, method, asked, share, steps, chosen.turns, count, on)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(DEFAULT))
    parser.add_argument("--amounts", nargs="*", type=float, default=list(AMOUNTS))
    parser.add_argument("--flops", nargs="*", type=float, default=[], help="shares of FLOPs to leave")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=["l2", "global"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--blockwise", action="store_true", help="fit blocks after the regressions")
    parser.add_argument("--imagenet", choices=["mirrored", "unseen"], default="mirrored", help="see above")
    parser.add_argument("--calibration", type=int, help="calibrate on the first images only")
    parser.add_argument("--steps", type=int, default=BLOCK_STEPS, help="of the fit of blocks")
    parser.add_argument("--turns", type=int, default=1, help="of masks and repair, by which the share is reached")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit", type=int, help="test on the first images only; nothing is written")
    parser.add_argument("--damping", type=float, default=DAMPING, help="of OBS; with another nothing is written")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in chosen.nets:
        missing = why_missing(name)
        if missing:
            raise SystemExit(missing)
        on = test_of(name, chosen.imagenet)
        dense, images = load(name).to(chosen.device), tested(name, on)
        batches = calibration(name, on, chosen.calibration, chosen.device)
        images = images if chosen.limit is None else images.first(chosen.limit)
        is_kept = chosen.limit is None and chosen.damping == DAMPING
        done = {row.case for row in written()} if is_kept else set()
        todo = [case for case in cases(name, chosen, sum(map(len, batches)), on) if case not in done]
        before = accuracy(f"{name} dense", dense, images) if todo else 0.0
        for case in todo:
            row = measured(dense, batches, images, before, case, chosen.damping)
            if is_kept:
                write([*written(), row])
            print(row, flush=True)
    if written():
        Console().print(f"{len(written())} rows in {OUT / 'repair.csv'}, tables in repair.md")


if __name__ == "__main__":
    main()

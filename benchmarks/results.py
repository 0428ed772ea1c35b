"""Accuracy, size and latency of real trained networks: dense, masked, exported. Writes ``docs/results.md``.

Every network is masked on the input side without constraints (L2, a share of every layer's channels),
exported with each way of reading, and run over its whole test set. A finished network is kept in
``benchmarks/out`` and not measured again until the library or this file changes (or ``--fresh``).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import upscale
from upscale import measure

from . import ROOT
from .data import Images, predictions, test_set, top1
from .nets import NETS, load, why_missing

# Networks and the share of channels to zero. A quarter leaves the ImageNet networks with no accuracy to
# compare unless they are trained on, so that they have a second row.
ROWS = (
    ("resnet20", 0.25),
    ("resnet56", 0.25),
    ("densenet40", 0.25),
    ("mobilenet_v2", 0.25),
    ("squeezenet1_0", 0.25),
    ("mobilenet_v2", 0.05),
    ("squeezenet1_0", 0.05),
)
READS = ("baseline", "gather", "auto")
CACHE = ROOT / "benchmarks" / "out" / "results"
PAGE = ROOT / "docs" / "results.md"

console = Console()


class PredictionsDiffer(AssertionError):
    """The exported model gives some image another class than the masked model does."""


def masked(dense: nn.Module, images: Images, amount: float) -> nn.Module:
    """A copy of ``dense`` with a share ``amount`` of every layer's input channels zeroed, by L2 norm."""
    model = copy.deepcopy(dense)
    upscale.MaskingManager(model, example_inputs=images.batch(range(2))).importance("l2").mask(amount)
    return model


def measured(name: str, amount: float, limit: int | None, runs: int) -> dict[str, Any]:
    """One network's row; ``limit``: how many images to use, None for all; ``runs``: timed calls a model."""
    images = test_set(name) if limit is None else test_set(name).first(limit)
    dense = load(name)
    models = {"dense": dense, "masked": masked(dense, images, amount)}
    seconds = {}
    for reads in READS:
        start = time.perf_counter()
        models[reads] = upscale.export(models["masked"], (images.batch(range(2)),), reads=reads)
        seconds[reads] = time.perf_counter() - start
        console.print(f"  {name} at {amount:.0%}: export with reads={reads} took {seconds[reads]:.1f} s")
    example = images.batch(range(1))
    return {
        "name": name,
        "amount": amount,
        "images": len(images),
        "top1": _accuracies(name, models, images),
        "parameters": {key: measure.parameters(model) for key, model in models.items()},
        "flops": {key: measure.flops(model, example) for key, model in models.items()},
        "copied": {key: measure.copies(model, example).bytes for key, model in models.items()},
        "latency": measure.latency({k: m for k, m in models.items() if k != "masked"}, example, runs=runs),
        "seconds": seconds,
    }


_dense: dict[tuple[str, int], Tensor] = {}  # what the unpruned networks said: the same for every row of a network


def _accuracies(name: str, models: dict[str, nn.Module], images: Images) -> dict[str, float]:
    """Top-1 in percent; :class:`PredictionsDiffer` unless masked and exported agree on every image."""
    known = {"dense": _dense[name, len(images)]} if (name, len(images)) in _dense else {}
    batch = 100 if NETS[name].size == 32 else 8  # large activations are dear to allocate
    todo = [key for key in ("dense", "masked", "auto") if key not in known]
    found = {**known, **{key: predictions(models[key], images, batch=batch, title=f"{name}, {key}") for key in todo}}
    _dense[name, len(images)] = found["dense"]
    differing = (found["masked"] != found["auto"]).nonzero().flatten().tolist()
    if differing:
        raise PredictionsDiffer(f"{len(differing)} of {len(images)} images, the first: {differing[:10]}")
    return {key: top1(predicted, images) for key, predicted in found.items()}


def _fingerprint(*details: object) -> str:
    """Changes with the library, with the files here, and with the run's settings."""
    digest = hashlib.sha256(repr(details).encode())
    library = sorted((ROOT / "src" / "upscale").rglob("*.py"))
    for path in [*library, *(ROOT / "benchmarks" / name for name in ("nets.py", "data.py", "results.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _row(name: str, amount: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row of a network: from the last run where nothing has changed since, else measured now."""
    runs = chosen.runs if NETS[name].size == 32 else max(1, chosen.runs // 4)
    stamp = _fingerprint(name, amount, chosen.limit, runs, torch.__version__)
    kept = CACHE / f"{name}-{amount:g}.json"
    if kept.is_file() and not chosen.fresh:
        row = json.loads(kept.read_text())
        if row["stamp"] == stamp:
            console.print(f"  {name} at {amount:.0%}: measured before, nothing has changed since")
            return row
    row = {**measured(name, amount, chosen.limit, runs), "stamp": stamp, "runs": runs}
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(row, indent=1))
    return row


def page(rows: Sequence[dict[str, Any]], command: str) -> str:
    """The text of ``docs/results.md``."""
    return _PAGE.format(
        command=command,
        date=datetime.date.today().isoformat(),
        progress="" if len(rows) == len(ROWS) else f" (unfinished: {len(rows)} of {len(ROWS)} rows)",
        machine=f"{_processor()}, {platform.system()}",
        versions=f"torch {torch.__version__}, Python {platform.python_version()}",
        backend=_backend(),
        accuracy="\n".join(_accuracy_line(row) for row in rows),
        latency="\n".join(_latency_line(row) for row in rows),
    )


_PAGE = """\
# Results on trained networks

Written by `{command}` on {date}{progress}.
Machine: {machine}; {versions}.

Each network is masked on the input side, unconstrained, by L2 norm: a share of the channels that every layer
reads (but for the first layer and grouped convolutions) are zeroed, with no fine-tuning. The masked network
is then exported with each of the three ways of reading. *baseline* concatenates single channels, *gather*
does one `index_select` a read, and neither reorders anything; *auto* lets the planner choose.

## Accuracy and size

Top-1 in percent on the whole test set. The exported network (auto) gives **every image the same class** as
the masked one; the command fails otherwise. CIFAR-10's images are JPEGs here, which costs accuracy, and the
ImageNet sample has one image a class: compare these figures with each other, not with published ones. With a
quarter of their channels gone and no fine-tuning the ImageNet networks know nothing any more: that is a
property of the masks, and the reason for their second row.

| network | zeroed | images | dense | masked | exported | parameters | after | MFLOPs | after |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{accuracy}

FLOPs: two a multiply-accumulate; convolutions and linear layers.

## Latency and copies

Median milliseconds a call at batch 1, one CPU thread, eager mode, NCHW float32, the four models called in
turn. Convolutions run on {backend}. Copied: kB written by copying operators in one call, counted by torch's
profiler (a network's own concatenations, pads and casts are in all columns).

| network | zeroed | unpruned ms | baseline | gather | auto | copied: unpruned | baseline | gather | auto |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{latency}
"""


def _accuracy_line(row: dict[str, Any]) -> str:
    accuracy, size, work = row["top1"], row["parameters"], row["flops"]
    cells = [NETS[row["name"]].title, f"{row['amount']:.0%}", f"{row['images']:,}"]
    cells += [f"{accuracy[key]:.2f}" for key in ("dense", "masked", "auto")]
    cells += [f"{size[key]:,}" for key in ("dense", "auto")]
    cells += [f"{work[key] / 1e6:.1f}" for key in ("dense", "auto")]
    return f"| {' | '.join(cells)} |"


def _latency_line(row: dict[str, Any]) -> str:
    cells = [NETS[row["name"]].title, f"{row['amount']:.0%}"]
    cells += [f"{row['latency'][key]:.2f}" for key in ("dense", *READS)]
    cells += [f"{row['copied'][key] / 1e3:,.0f}" for key in ("dense", *READS)]
    return f"| {' | '.join(cells)} |"


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores visible)" if names else platform.machine()


def _backend() -> str:
    return "oneDNN and torch's own kernels" if torch.backends.mkldnn.is_available() else "torch's own kernels"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS), help="default: all")
    parser.add_argument("--limit", type=int, help="use the first images of each test set only; writes no page")
    parser.add_argument("--runs", type=int, default=200, help="timed calls a model; a quarter at 224 pixels")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console.print(f"{_processor()}, torch {torch.__version__}, one thread, {_backend()}")
    wanted = [row for row in ROWS if row[0] in chosen.nets]
    is_whole = chosen.limit is None and len(wanted) == len(ROWS)
    rows: list[dict[str, Any]] = []
    for name, amount in wanted:
        missing = why_missing(name)
        if missing:
            raise SystemExit(missing)
        rows.append(_row(name, amount, chosen))
        if is_whole:  # after every row: a run that is cut short leaves what it has measured
            PAGE.parent.mkdir(exist_ok=True)
            PAGE.write_text(page(rows, "make results"))
    print(f"Written: {PAGE}" if is_whole else page(rows, "make results"))


if __name__ == "__main__":
    main()

"""Time and memory of an export, network by network, against the time that ``torch.export`` itself takes.

Random weights, a quarter of the input channels zeroed (L2, unconstrained), dynamic batch. Each runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import ROOT

DEFAULT = ("resnet50", "densenet201", "efficientnet_v2_l", "swin_t")


def measured(name: str, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds and gigabytes of one export of torchvision's network ``name``, in this process."""
    import upscale
    from support.vision import build

    torch.set_num_threads(1)
    _warm_up()
    model = build(name).to(dtype)
    example = torch.randn(2, 3, size, size, dtype=dtype)
    upscale.MaskingManager(model, example_inputs=example).importance().mask(0.25)
    start = time.perf_counter()
    pruned = upscale.export(model, (example,))
    whole = time.perf_counter() - start
    stages = pruned.report.seconds
    rest = whole - stages["capture"] - stages["verify"]
    return {"name": name, "capture": stages["capture"], "verify": stages["verify"], "rest": rest, "peak": _peak()}


def _warm_up() -> None:
    """The first export of a process loads much of torch: not a network's own time."""
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),), strict=False)


def _peak() -> float:
    """The most memory that this process ever held, in gigabytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _in_own_process(name: str, size: int, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench", "--worker", name, "--size", str(size), "--dtype", dtype]
    ran = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if ran.returncode:
        return {
            "name": name,
            "error": ran.stderr.strip().splitlines()[-1:] or ["it failed without a message"],
        }
    return json.loads(ran.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(DEFAULT), help=f"torchvision names; default {DEFAULT}")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.worker:
        print(json.dumps(measured(chosen.worker, chosen.size, getattr(torch, chosen.dtype))))
        return 0
    table = Table(title=f"Export in {chosen.dtype} at {chosen.size} pixels, dynamic batch, one thread")
    for heading in ("network", "torch.export s", "all else s", "ratio", "verification s", "peak GB"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    console, failed = Console(), 0
    for name in chosen.nets:
        with console.status(name):
            row = _in_own_process(name, chosen.size, chosen.dtype)
        if "error" in row:
            failed += 1
            console.print(f"{name}: {row['error'][0]}")
            continue
        ratio = row["rest"] / row["capture"]
        numbers = (row["capture"], row["rest"], ratio, row["verify"], row["peak"])
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

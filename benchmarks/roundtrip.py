"""Save, load in a process that never saw the weights, compare bit by bit: every network of the first issue.

``python -m benchmarks.roundtrip [--networks resnet18 swin_t] [--mask both-25] [--reads auto] [--out FILE.csv]``

float32, 64 pixels where the architecture allows it. Each network is masked, exported and saved in one process, and
loaded from both files (``.safetensors`` into a freshly built network, ``.pt2`` by itself) in another. It is written as
ONNX too, and run there in ONNX Runtime. The exit status is 1 where an output differs in any bit (for ``.pt2`` and ONNX:
by more than 1e-4, relative), or where a file could not be loaded."""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils import _pytree as pytree

import upscale

from . import ROOT  # puts the tests' folder on the path, for the next one
from .matrix import CASES

from support.vision import NETWORKS, build, input_shape  # isort: skip


@dataclass
class Row:
    """One line of the table. ``weights``: bytes of all parameters and buffers, as their shapes say; ``beyond``: what
    the file has beyond them, in percent. ``same``: largest difference of any output, 0 where all bits agree."""

    network: str
    outcome: str = "FAILED"
    weights: int = 0
    beyond: float = float("nan")
    program_beyond: float = float("nan")
    save_s: float = float("nan")
    load_s: float = float("nan")
    difference: float = float("nan")
    program_difference: float = float("nan")
    onnx_difference: float = float("nan")
    detail: str = ""


def store(name: str, mask: str, reads: str, folder: Path) -> None:
    """Mask, export and save one network, and what it answers."""
    torch.manual_seed(0)
    model, x = build(name).eval(), torch.randn(input_shape(name, 2, 64))
    next(case for case in CASES if case.name == mask).apply(model, x)
    pruned = upscale.export(model, (x,), reads=reads, verify=False)  # type: ignore[arg-type]
    started = time.perf_counter()
    upscale.save(pruned, folder / "model.safetensors")
    seconds = time.perf_counter() - started
    upscale.save(pruned, folder / "model.pt2")
    upscale.to_onnx(pruned, folder / "model.onnx")
    y = torch.randn(input_shape(name, 3, 64))
    weights = sum(t.nbytes for t in [*pruned.parameters(), *pruned.buffers()])
    with torch.no_grad():
        torch.save({"x": y, "out": _tensors(pruned(y)), "weights": weights, "save_s": seconds}, folder / "seen.pt")


def fetch(name: str, folder: Path) -> None:
    """Load one network from its files and compare; prints the largest differences and the seconds."""
    seen = torch.load(folder / "seen.pt")
    torch.manual_seed(1)
    fresh = build(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    started = time.perf_counter()
    model = upscale.load(folder / "model.safetensors", fresh)
    seconds = time.perf_counter() - started
    program = upscale.load(folder / "model.pt2")
    with torch.no_grad():
        exact = _difference(seen["out"], _tensors(model(seen["x"])))
        relative = [
            _relative(seen["out"], found) for found in (_tensors(program(seen["x"])), _in_onnx(folder, seen["x"]))
        ]
    print(exact, *relative, seconds)


def _in_onnx(folder: Path, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    if [a.shape for a in expected] != [b.shape for b in actual]:
        return float("inf")
    return max(0.0 if torch.equal(a, b) else float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True))


def _relative(expected: list[Tensor], actual: list[Tensor]) -> float:
    largest = max(float(a.abs().max()) for a in expected)
    return _difference(expected, actual) / largest


def examine(name: str, mask: str, reads: str) -> Row:
    """The row of one network."""
    row = Row(name)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        options = ["--mask", mask, "--reads", reads, "--folder", text]
        for worker in ("store", "fetch"):
            command = [sys.executable, "-m", "benchmarks.roundtrip", "--worker", worker, "--networks", name, *options]
            result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if result.returncode:
                row.detail = f"{worker}: {result.stderr.strip().splitlines()[-1][:200] if result.stderr else '?'}"
                return row
        found = map(float, result.stdout.split()[-4:])
        row.difference, row.program_difference, row.onnx_difference, row.load_s = found
        seen = torch.load(folder / "seen.pt")
        row.weights, row.save_s = seen["weights"], seen["save_s"]
        sizes = [(folder / f"model.{kind}").stat().st_size for kind in ("safetensors", "pt2")]
        row.beyond, row.program_beyond = (100 * (size / row.weights - 1) for size in sizes)
    close = max(row.program_difference, row.onnx_difference) <= 1e-4
    row.outcome = "same" if row.difference == 0 and close else "FAILED"
    return row


def table(rows: list[Row]) -> str:
    """All rows as text."""
    lines = [
        f"{'network':20} {'outcome':8} {'weights MB':>10} {'file +%':>8} {'pt2 +%':>8} {'save s':>7} {'load s':>7} "
        f"{'diff':>8} {'pt2 diff':>9} {'onnx diff':>9}"
    ]
    lines += [
        f"{r.network:20} {r.outcome:8} {r.weights / 1e6:10.2f} {r.beyond:8.2f} {r.program_beyond:8.2f} {r.save_s:7.2f} "
        f"{r.load_s:7.2f} {r.difference:8.1e} {r.program_difference:9.1e} {r.onnx_difference:9.1e}  {r.detail}"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the table and print it; 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--mask", default="both-25", choices=[case.name for case in CASES], metavar="MASK")
    parser.add_argument("--reads", default="auto", choices=["auto", "gather", "baseline"])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "out" / "roundtrip.csv", help="where the CSV goes"
    )
    parser.add_argument("--worker", choices=["store", "fetch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker == "store":
        store(options.networks[0], options.mask, options.reads, options.folder)
        return 0
    if options.worker == "fetch":
        fetch(options.networks[0], options.folder)
        return 0
    rows: list[Row] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file, Progress(console=Console(stderr=True)) as progress:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for name in progress.track(options.networks, description="round trips"):
            rows.append(examine(name, options.mask, options.reads))
            writer.writerow(asdict(rows[-1]))
            file.flush()
    print(table(rows))
    failed = sum(row.outcome == "FAILED" for row in rows)
    print(f"{len(rows)} networks, {failed} failed; written to {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

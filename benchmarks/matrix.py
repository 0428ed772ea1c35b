"""Every network x every mask: is the exported model the masked model? ``make matrix``, or with arguments
``python -m benchmarks.matrix [--networks resnet18 swin_t] [--subset ci] [--reads auto] [--out matrix.csv]``.

float64, batch norm randomised, small images (64 pixels where the architecture allows it), compared at the
traced batch and at another. Each network runs in a process of its own, is captured once, and gives one row
for each mask; a crash gives a row too. The exit status is 1 where a row failed."""

from __future__ import annotations

import argparse
import csv
import gc
import json
import resource
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import upscale
from upscale import MaskingManager, measure
from upscale.capture import capture
from upscale.exporting import compile_program, finish
from upscale.program import Program

from . import ROOT  # puts the tests' folder on the path, for the next two

from support.oracle import rebatch, relative_error, varies  # isort: skip
from support.vision import NETWORKS, build, input_shape  # isort: skip

TOLERANCE = 1e-10
CI_NETWORKS = ("resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet")
CI_MASKS = ("input-50", "output-25", "both-50", "input-25-constrained")


@dataclass(frozen=True)
class Case:
    """One way to mask a network: L2 magnitude on one side or on both, without or with constraints."""

    side: str
    percent: int
    method: str = "unconstrained"

    @property
    def name(self) -> str:
        """``input-25``, ``both-50``, ``input-25-constrained``."""
        return f"{self.side}-{self.percent}" + ("-constrained" if self.method == "constrained" else "")

    def apply(self, model: nn.Module, example: torch.Tensor) -> None:
        """Write the zeros into ``model``."""
        for side in ("input", "output") if self.side == "both" else (self.side,):
            manager = MaskingManager(model, side=side, method=self.method, example_inputs=example)  # type: ignore
            manager.importance("l2").mask(self.percent / 100)


CASES = (
    *(Case("input", percent) for percent in (10, 25, 50, 75)),
    *(Case("output", percent) for percent in (10, 25, 50)),
    *(Case("both", percent) for percent in (10, 25, 50)),
    *(Case("input", percent, "constrained") for percent in (10, 25, 50)),
)


@dataclass
class Row:
    """One line of the table. ``outcome``: "same", "constant" (a justified refusal) or "FAILED"."""

    network: str
    mask: str
    outcome: str = "FAILED"
    error: float = float("nan")  # largest relative error over outputs and batch sizes
    parameters: float = float("nan")  # exported / original
    flops: float = float("nan")
    reads: str = ""
    capture_s: float = float("nan")  # torch.export, once per network
    export_s: float = float("nan")  # everything after it
    peak_mb: float = float("nan")  # of the process so far
    detail: str = ""


class Subject:
    """One network, captured once; its weights are drawn again before each mask (a copy kept would cost memory)."""

    def __init__(self, name: str, reads: str = "auto", size: int = 64) -> None:
        self.name, self.reads = name, reads
        self.model = build(name).double().eval()
        shape = input_shape(name, 2, size)
        generator = torch.Generator().manual_seed(1)
        self.example = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.others = (rebatch(self.example, 1 if name.startswith("vit") else 3, seed=2),)
        self._dense = True
        self.parameters = measure.parameters(self.model)
        self.flops = measure.flops(self.model, self.example)
        self._program: Program | None = None

    def examine(self, case: Case) -> Row:
        """Mask, export, compare. Never raises: what went wrong is in the row."""
        row = Row(self.name, case.name)
        try:
            self._make_dense()
            self._dense = False
            case.apply(self.model, self.example)
            self._export_and_compare(row)
        except Exception as error:  # a row for each failure is the point of this table
            row.detail = _last_line(error)
        row.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return row

    def _make_dense(self) -> None:
        """The weights without a mask, written into the captured model's own tensors."""
        gc.collect()  # what the last mask left: an fx graph and its module hold each other
        if not self._dense:
            fresh = build(self.name).state_dict()
            with torch.no_grad():
                for key, value in self.model.state_dict().items():
                    value.copy_(fresh[key])

    def _export_and_compare(self, row: Row) -> None:
        try:
            pruned = self._export()
        except upscale.errors.ConstantOutputError as error:
            justified = not varies(self.model, (self.example,), trials=2)
            row.outcome = "constant" if justified else "FAILED"
            row.detail = f"{'' if justified else 'unjustified: '}{error}"
            return
        row.export_s = sum(s for stage, s in pruned.report.seconds.items() if stage != "capture")
        row.capture_s = pruned.report.seconds["capture"]
        row.parameters = measure.parameters(pruned) / self.parameters
        row.flops = measure.flops(pruned, self.example) / self.flops
        row.reads = _reads(pruned)
        with torch.no_grad():
            errors = [relative_error(self.model(x), pruned(x)) for x in (self.example, *self.others)]
        row.error = max(errors)
        if not row.error <= TOLERANCE:
            row.detail = f"relative error {row.error:.3g}"
        elif row.parameters > 1:
            row.detail = "more parameters than before"
        else:
            row.outcome = "same"

    def _export(self) -> Any:
        """``upscale.export`` without verification, in two steps: the captured graph does not depend on the masks.

        A program shares the model's storage, so that what is written into the weights is seen in it.
        """
        if self._program is None:
            self._program = capture(self.model, (self.example,))
        compiled = compile_program(self._program, self.reads)  # type: ignore[arg-type]
        return finish(compiled, self.name, check=False)


def _reads(pruned: Any) -> str:
    return " ".join(f"{kind}:{count}" for kind, count in sorted(pruned.report.reads.items()))


def _last_line(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def examine(name: str, cases: Sequence[Case], reads: str = "auto") -> Iterator[Row]:
    """The rows of one network, one at a time."""
    torch.set_num_threads(1)
    try:
        subject = Subject(name, reads)
    except Exception as error:
        yield Row(name, "-", detail=_last_line(error))
        return
    for case in cases:
        yield subject.examine(case)


def _in_own_process(name: str, cases: Sequence[Case], reads: str) -> Iterator[Row]:
    """The same from a fresh process: memory is measured per network, and a crash costs only its own rows."""
    masks = [case.name for case in cases]
    command = [
        sys.executable,
        "-m",
        "benchmarks.matrix",
        "--worker",
        name,
        "--reads",
        reads,
        "--masks",
        *masks,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            if line.startswith("{"):
                seen += 1
                yield Row(**json.loads(line))
    if process.returncode or not seen:
        left = masks[seen] if seen < len(masks) else "-"
        yield Row(name, left, detail=f"the process ended with status {process.returncode}")


def table(rows: Sequence[Row]) -> str:
    """All rows as text, one line each."""
    lines = [
        f"{'network':20} {'mask':24} {'outcome':8} {'rel err':>8} {'params':>7} {'FLOPs':>7} {'s':>6} {'MB':>6}"
        "  reads, detail"
    ]
    for row in rows:
        lines.append(
            f"{row.network:20} {row.mask:24} {row.outcome:8} {row.error:8.1e} {row.parameters:7.3f} {row.flops:7.3f} "
            f"{row.export_s:6.1f} {row.peak_mb:6.0f}  {row.reads} {row.detail[:160]}"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=None, metavar="NAME", help="default: all of the list")
    parser.add_argument("--masks", nargs="+", default=None, metavar="MASK", help="such as input-25 both-50")
    parser.add_argument("--subset", choices=["ci"], help="the few networks and masks that CI runs")
    parser.add_argument("--reads", default="auto", choices=["auto", "gather", "baseline"])
    parser.add_argument("--out", type=Path, default=ROOT / "matrix.csv", help="where the CSV goes")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the table and print it; 1 where a row failed."""
    options = _arguments()
    masks = options.masks or (CI_MASKS if options.subset else [case.name for case in CASES])
    unknown = set(masks) - {case.name for case in CASES}
    names = options.networks or (CI_NETWORKS if options.subset else NETWORKS)
    unknown |= set(names) - set(NETWORKS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; masks are {', '.join(case.name for case in CASES)}")
        return 2
    cases = [case for case in CASES if case.name in masks]
    if options.worker:
        for row in examine(options.worker, cases, options.reads):
            print(json.dumps(asdict(row)), flush=True)
        return 0
    rows: list[Row] = []
    with options.out.open("w", newline="") as file, Progress(console=Console(stderr=True)) as progress:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        task = progress.add_task("matrix", total=len(names) * len(cases))
        for name in names:
            progress.update(task, description=name)
            for row in _in_own_process(name, cases, options.reads):
                rows.append(row)
                writer.writerow(asdict(row))
                file.flush()
                progress.advance(task)
                if row.outcome == "FAILED":
                    progress.console.print(f"[red]{row.network} {row.mask}: {row.detail}")
    print(table(rows))
    failed = sum(row.outcome == "FAILED" for row in rows)
    print(f"{len(rows)} rows, {failed} failed; written to {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

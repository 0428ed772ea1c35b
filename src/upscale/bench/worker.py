"""One model in one setting, in this process: ``python -m upscale.bench.worker JOB RESULT``, both JSON files.

The result is written anew after every stage, so that whoever kills this process learns how far it got.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import measure
from ..files import replacing
from ..zoo.worker import first_line, peak_mb
from . import checks
from .backends import BACKENDS, Prepared
from .machine import place
from .models import Source, build
from .rows import Row, Setting
from .variants import UnavailableError, Workbench, WrongValuesError, bound

CONTROL = "control"  # the unpruned model under a second name
_PLAIN = (UnavailableError, WrongValuesError)  # explain themselves


@dataclass(frozen=True)
class Budget:
    """Timed rounds at most, untimed ones before them, seconds of timed rounds."""

    rounds: int = 200
    warmup: int = 3
    seconds: float = 20.0


@dataclass(frozen=True)
class Job:
    """What a worker is to do. ``timeout``: seconds after which it ends itself."""

    source: Source
    setting: Setting
    variants: tuple[str, ...]
    budget: Budget
    timeout: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        data = json.loads(text)
        return cls(
            Source(**data["source"]),
            Setting(**data["setting"]),
            tuple(data["variants"]),
            Budget(**data["budget"]),
            data["timeout"],
        )

    def blanks(self) -> list[Row]:
        """A row for each variant that says only what is about to be measured."""
        here = place(self.setting.device)
        return [Row.blank(self.source.label, self.source.model, name, self.setting, here) for name in self.variants]


def examine(job: Job, tell: Callable[[Sequence[Row]], None] = lambda rows: None) -> list[Row]:
    """A row for each variant of the job. Never raises: what went wrong is in the rows. ``tell`` is called before every
    stage."""
    rows = {row.variant: row for row in job.blanks()}

    @contextlib.contextmanager
    def stage(name: str, *concerned: Row) -> Iterator[None]:
        try:
            for row in concerned:
                row.stage = name
            tell(list(rows.values()))
            yield
            for row in concerned:
                row.stage = ""
        except Exception as error:
            for row in concerned:
                row.reason = str(error) if isinstance(error, _PLAIN) else first_line(error)

    ready: dict[str, Prepared] = {}
    bench: Workbench | None = None
    args: tuple[Any, ...] = ()
    with stage("build", *rows.values()):
        subject, fits = build(job.source, job.setting)
        bench = Workbench(subject, job.setting)
        for row in rows.values():
            row.input = _shapes(subject.inputs)
            row.warning = "" if fits else f"does not take images of {job.setting.size} pixels"
    if bench is not None:
        for name, row in rows.items():
            with stage("make", row):
                started = time.perf_counter()
                made = bench.make(name)
                row.export_s = round(time.perf_counter() - started, 3) if name != "unpruned" else None
                row.error = made.error
                model, args = bound(made.model, bench.subject.inputs)
            if row.reason:
                continue
            with stage("measure", row):
                count(model, args, row)
            with stage(job.setting.backend, row):
                ready[name] = BACKENDS[job.setting.backend](model, args, job.setting)
        with stage("time", *(rows[name] for name in ready)):
            time_all(ready, args, rows, job)
    for row in rows.values():
        row.peak_mb = peak_mb()
    return list(rows.values())


def count(model: nn.Module, args: tuple[Any, ...], row: Row) -> None:
    """What can be counted without a clock."""
    row.parameters = measure.parameters(model)
    row.flops = measure.flops(model, args)
    row.denormal_weights = checks.denormal_weights(model)
    row.denormal_activations = checks.denormal_activations(lambda: model(*args))
    if row.backend == "eager":  # the profiler sees what torch itself calls
        copied = measure.copies(model, args)
        row.copied_bytes, row.copies = copied.bytes, copied.calls
        row.kernels = measure.kernels(model, args)


def time_all(ready: Mapping[str, Prepared], args: tuple[Any, ...], rows: Mapping[str, Row], job: Job) -> None:
    """Time what is ready, interleaved, the unpruned model under two names."""
    if "unpruned" not in ready:
        raise UnavailableError("there is no unpruned model to compare with")
    budget = job.budget
    found = measure.timings(
        {**ready, CONTROL: ready["unpruned"]},
        args,
        runs=budget.rounds,
        warmup=budget.warmup,
        threads=job.setting.threads,
        seconds=budget.seconds,
    )
    control = checks.paired_ratio(found[CONTROL], found["unpruned"])
    for name in ready:
        note_times(rows[name], found[name], found["unpruned"], control)


def note_times(row: Row, times: Sequence[float], unpruned: Sequence[float], control: float) -> None:
    """Fill in what the times of a variant, round by round, say."""
    low, middle, high = checks.quartiles(times)
    row.median_ms, row.iqr_ms, row.best_ms = round(middle, 4), round(high - low, 4), round(min(times), 4)
    row.runs, row.ratio, row.control = len(times), round(checks.paired_ratio(times, unpruned), 4), round(control, 4)
    told = checks.warnings_of(middle, high - low, control, row.denormal_weights, row.denormal_activations)
    row.warning = checks.joined([*([row.warning] if row.warning else []), *told])


def _shapes(inputs: Any) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return " ".join("x".join(map(str, tensor.shape)) for tensor in tensors)


def _write(path: Path, rows: Sequence[Row]) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Do the job in the first file and keep the rows in the second."""
    job, result = Job.from_json(Path(arguments[0]).read_text(encoding="utf-8")), Path(arguments[1])
    faulthandler.enable()
    faulthandler.dump_traceback_later(job.timeout, exit=True)  # nobody may be left to end this process
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.setting.threads)
    torch.backends.cudnn.benchmark = False
    _write(result, examine(job, lambda rows: _write(result, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

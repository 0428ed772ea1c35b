"""One model in this process: ``python -m upscale.zoo.worker JOB RESULT``, both JSON files.

The result is written anew after every stage, so that whoever kills this process learns how far it got.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upscale
from upscale import MaskingManager, measure
from upscale.files import replacing
from upscale.report import Report

from .compare import DifferentError, Masked, masked_count, relative_error, removed_share, tells
from .precision import computes_in_less
from .randomise import calibrate, randomise
from .rows import MIXED, TOLERANCE, Row, Settings
from .subject import Subject, batch_of, rebatched
from .suites import load_suite

_ZOO = Path(__file__).resolve().parent
SENSITIVITY = 1e-6  # least relative change of the output from one random input to another
FLOAT64_LIMIT = 100_000_000  # parameters


@dataclass(frozen=True)
class Job:
    """What a worker is to do. ``suite``: a name or a file. ``timeout``: seconds after which it ends itself."""

    suite: str
    model: str
    settings: Settings
    timeout: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        data = json.loads(text)
        return cls(**{**data, "settings": Settings(**data["settings"])})


class UntestableError(Exception):
    """The trial would say nothing: the model's output is zero or not finite, or there is nothing to mask."""


def examine(job: Job, tell: Callable[[Row], None] = lambda row: None) -> Row:
    """The row of one model. Never raises: what went wrong is in the row. ``tell`` is called after every stage."""
    suite = load_suite(job.suite)
    row = Row.blank(suite.name, job.model, job.settings, upscale.__version__)

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        row.stage = name
        tell(row)
        yield
        row.stage = ""

    try:
        with stage("build"):
            subject = build(lambda: suite.build(job.model, job.settings.seed), job.settings, row)
        with stage("mask"):
            masked = mask(subject, job.settings)
            row.masked_channels = masked_count(masked)
            calibrate(subject, job.settings.seed)
            row.sensitivity = sensitivity(subject)
        with stage("export"):
            pruned = export(subject, job.settings, row)
        with stage("measure"):
            row.channels_removed = removed_share(subject.model, pruned, masked)
            note_flops(subject, pruned, row)
        with stage("compare"):
            compare(subject, pruned, row)
    except Exception as error:
        row.reason = first_line(error)
    row.peak_mb = peak_mb()
    return row


def build(builder: Callable[[], Subject], settings: Settings, row: Row) -> Subject:
    """The model in the dtype asked for. "auto": float64 unless the model is large or does not run in it."""
    subject = builder()
    row.parameters_before = measure.parameters(subject.model)
    wanted = settings.dtype
    if wanted == "auto":
        wanted = "float64" if row.parameters_before <= FLOAT64_LIMIT else "float32"
    row.dtype = wanted
    subject = _prepared(subject, wanted, settings)
    try:
        subject.call(subject.model)
    except Exception:
        if settings.dtype != "auto" or wanted != "float64":
            raise
        row.dtype = "float32"
        subject = _prepared(builder(), row.dtype, settings)
        subject.call(subject.model)
    row.sensitivity = sensitivity(subject)
    return subject


def sensitivity(subject: Subject) -> float:
    """How much the output differs from one random input to another. Raises where equality would say nothing."""
    output = subject.call(subject.model)
    if not tells(output):
        raise UntestableError("no output of the model is a finite float tensor other than zero")
    inputs = rebatched(subject.inputs, batch_of(subject.inputs), seed=3)
    difference = relative_error(output, subject.call(subject.model, inputs))
    if difference < SENSITIVITY:
        raise UntestableError(f"the output hardly depends on the input: it varies by {difference:.0e}")
    return float(f"{difference:.2g}")


def _prepared(subject: Subject, dtype: str, settings: Settings) -> Subject:
    subject = subject.to(getattr(torch, dtype))
    subject.model.eval()
    randomise(subject, settings.seed)
    return subject


def mask(subject: Subject, settings: Settings) -> Masked:
    """Write the zeros into the model; which channels of which layer they are, by side."""
    masked: dict[Any, Any] = {}
    refusals = []
    for side in ("input", "output") if settings.side == "both" else (settings.side,):
        options: dict[str, Any] = {"side": side, "method": settings.method, "example_inputs": subject.inputs}
        try:
            masked[side] = MaskingManager(subject.model, **options).importance("l2").mask(settings.amount).masked
        except upscale.NothingToPruneError as refusal:
            refusals.append(refusal)
    if not masked:
        raise refusals[0]
    return masked


def export(subject: Subject, settings: Settings, row: Row) -> nn.Module:
    """``upscale.export``, and what it says about itself."""
    started = time.perf_counter()
    pruned = upscale.export(subject.model, subject.args, subject.kwargs, reads=settings.reads)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    report = pruned.report
    assert isinstance(report, Report)
    row.exported = "yes"
    row.capture_s = round(report.seconds["capture"], 3)
    row.verify_s = round(report.seconds["verify"], 3)
    row.export_s = round(seconds - row.capture_s - row.verify_s, 3)
    row.parameters_after = measure.parameters(pruned)
    row.reads = counted(report.reads)
    row.barriers = counted(Counter(operator for _, operator, _ in report.barriers))
    return pruned


def counted(counts: dict[str, int]) -> str:
    """``"a:2 b:1"``, the most frequent first."""
    return " ".join(f"{name}:{n}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n)


class _Caller(nn.Module):
    """A model whose arguments are given already."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.model, self.subject = model, [subject]

    def forward(self) -> Any:
        return self.subject[0].call(self.model)


def note_flops(subject: Subject, pruned: nn.Module, row: Row) -> None:
    """Operations counted while the model runs, for one example."""
    batch = max(batch_of(subject.inputs), 1)
    for model in (subject.model, pruned):  # torch's counter trips over parameters that are handed to a module
        model.requires_grad_(False)
    row.flops_before = measure.flops(_Caller(subject, subject.model), ()) // batch
    row.flops_after = measure.flops(_Caller(subject, pruned), ()) // batch
    if row.flops_before:
        row.flops_removed = round(1 - row.flops_after / row.flops_before, 6)


def compare(subject: Subject, pruned: nn.Module, row: Row) -> None:
    """Masked model against exported model, on the example's batch and on another."""
    row.equal = "no"
    batch = batch_of(subject.inputs)
    trials = [subject.inputs, rebatched(subject.inputs, batch, seed=1), rebatched(subject.inputs, batch + 1, seed=2)]
    seen: list[int] = []
    for inputs in trials:
        if (size := batch_of(inputs)) != batch and not _runs(subject, inputs):
            continue  # the model itself is made for one batch size
        try:
            error = relative_error(subject.call(subject.model, inputs), subject.call(pruned, inputs))
        except Exception as failure:
            row.reason = f"batch {size}: {first_line(failure)}"
            raise DifferentError(row.reason) from failure
        row.error = max(row.error or 0.0, error)
        seen += [size] if size not in seen else []
        row.batches = " ".join(map(str, seen))
    assert row.error is not None
    if row.error > TOLERANCE[row.dtype] and row.dtype == "float64" and computes_in_less(subject):
        row.dtype = MIXED
    if not row.error <= TOLERANCE[row.dtype]:
        raise DifferentError(f"relative error {row.error:.2g} is more than {TOLERANCE[row.dtype]:.0e}")
    row.equal = "yes"


def _runs(subject: Subject, inputs: Any) -> bool:
    try:
        subject.call(subject.model, inputs)
    except Exception:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Class and first line of an error, and where it was raised, on one line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:600]
    if isinstance(error, (upscale.errors.UpscaleError, DifferentError, UntestableError)):
        return text  # it explains itself
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(Path(frame.filename))][-1:]
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours, *frames[-1:]])
    return f"{text} ({', '.join(places)})" if places else text


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to the library, the zoo apart."""
    return _ZOO.parent in path.parents and _ZOO not in path.parents


def peak_mb() -> float | None:
    """Largest resident size of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1024 * 1024 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _write(path: Path, row: Row) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(asdict(row)), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Do the job in the first file and keep the row in the second."""
    job, result = Job.from_json(Path(arguments[0]).read_text(encoding="utf-8")), Path(arguments[1])
    faulthandler.enable()
    faulthandler.dump_traceback_later(job.timeout, exit=True)  # nobody may be left to end this process
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _write(result, examine(job, lambda row: _write(result, row)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

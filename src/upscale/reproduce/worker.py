"""One combination in this process: mask, export, verify, evaluate, time. What a network's combinations share is kept
between them."""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import upscale

from .. import measure
from ..bench.checks import paired_ratio
from ..capture import capture
from ..errors import NothingToPruneError
from ..exporting import compile_program, finish
from ..importance import Heuristic
from ..machine import processor
from ..masking import MaskingManager
from ..program import Program
from ..zoo.compare import relative_error
from ..zoo.rows import TOLERANCE
from ..zoo.worker import first_line
from .evaluation import FROM_IMAGES, accuracy, batches_of, check_outputs
from .images import DataError, Images, View, load_dataset
from .models import KNOWN, find_recipe, load_model
from .rows import DENSE, GLOBAL, Combination, Row, Source, blank

__all__ = ["Job", "Subject", "check", "evaluate"]

_COMPARED = 8  # images on which the exported model is compared with the masked one
_LESS = "evaluate on fewer, with --images"
_ROUNDS, _SECONDS, _WARMUP = 60, 1.5, 3  # of timing


@dataclass(frozen=True)
class Job:
    """One row to be made."""

    source: Source
    combination: Combination

    def blank(self) -> Row:
        """The row that says only what is about to be measured, here."""
        return blank(self.source, self.combination, upscale.__version__, torch.__version__, processor())


class DifferentError(Exception):
    """The exported model does not compute what the masked model computes."""


class Subject:
    """A network with its weights, its images, and what is found out about it once: its graph, its scores."""

    def __init__(self, source: Source) -> None:
        self.source = source
        view = View(source.mean, source.std, source.size) if source.size else None  # type: ignore[arg-type]
        recipe = find_recipe(source.model, view)
        self.images, self.calibration = _images(source, recipe.data, recipe.view)
        self.dense = load_model(source.model, recipe, Path(source.weights))
        self.model = copy.deepcopy(self.dense)
        check_outputs(self.dense, self.images)
        self._managers: dict[tuple[str, str, str], MaskingManager] = {}
        self._scored: dict[tuple[str, str, str], str] = {}

    @functools.cached_property
    def example(self) -> Tensor:
        return self.images.batch(range(2))

    @functools.cached_property
    def one(self) -> Tensor:
        return self.images.batch(range(1))

    @functools.cached_property
    def decoded(self) -> Images:
        return self.images.decoded()

    @functools.cached_property
    def _batches(self) -> list[Tensor]:
        return batches_of(self.calibration)

    @functools.cached_property
    def dense_flops(self) -> int:
        return measure.flops(self.dense, self.one)

    @functools.cached_property
    def _captured(self) -> Program:
        return capture(self.model, (self.example,))

    def program(self) -> Program:
        """The graph of the model with its present weights: captured once, where it holds the very parameters."""
        held = {id(tensor) for tensor in self._captured.tensors.values()}
        whole = all(id(tensor) in held for tensor in self.model.parameters())
        return self._captured if whole else capture(self.model, (self.example,))

    def mask(self, how: Combination) -> int:
        """Zero channels of ``model``, from the dense weights; how many."""
        self.restore()
        key = (how.side, how.method, how.ranking)
        if key not in self._managers:
            side, method, is_global = cast(Any, how.side), cast(Any, how.method), how.ranking == GLOBAL
            self._managers[key] = MaskingManager(self.model, side, method, is_global, self.example)
        manager = self._managers[key]
        if self._scored.get(key) != how.importance:  # scores are of the dense weights, whatever the amount
            self._scored.pop(key, None)
            manager.importance(self._heuristic(how.importance))
            self._scored[key] = how.importance
        manager.mask(how.amount)
        return sum(map(len, manager.masked.values()))

    def restore(self) -> None:
        """Dense weights again."""
        self._load(self.dense.state_dict())

    def repair(self) -> None:
        """Fit what the masks have left of ``model`` to the dense network's outputs on the calibration images."""
        if not len(self.calibration):
            raise DataError(f"the repair needs images that are not evaluated on: {_LESS}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", upscale.RepairWarning)  # the row says on how many images
            repaired = upscale.repair(self.model, self.dense, self._batches, progress=False)
        self._load(repaired.state_dict())

    def _load(self, state: Mapping[str, Tensor]) -> None:
        """In place: the captured graph holds the very tensors."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(state[name])

    def _heuristic(self, name: str) -> Heuristic:
        if name not in FROM_IMAGES:
            return name
        if not len(self.calibration):
            raise DataError(f"{name} needs images that are not evaluated on: {_LESS}")
        return FROM_IMAGES[name](self.calibration)


def _images(source: Source, data: str, view: View) -> tuple[Images, Images]:
    dataset = load_dataset(Path(source.data), data, view)
    test, calibration = dataset.split(source.images or None, source.calibration, source.seed)
    if len(test) < 2:
        raise DataError(f"{source.data} has {len(dataset.test)} images: too few to evaluate on")
    return test, calibration


@functools.lru_cache(maxsize=1)
def _subject(source: Source) -> Subject:
    return Subject(source)


def check(source: Source, wanted: Iterable[Combination] = ()) -> None:
    """Raises ``DataError`` where there are no images to evaluate on, or none for scores and repairs that need data."""
    recipe = KNOWN.get(source.model)
    view = recipe.view if recipe else View(source.mean, source.std, source.size)  # type: ignore[arg-type]
    _, calibration = _images(source, recipe.data if recipe else "", view)
    needing = {how.importance for how in wanted if how.importance in FROM_IMAGES}
    needing |= {"--repair" for how in wanted if how.repaired}
    for name in sorted(needing):
        if not len(calibration):
            raise DataError(f"{name} needs images that are not evaluated on, and {source.data} has no others: {_LESS}")


def evaluate(job: Job) -> Row:
    """The row of a job. Never raises: what went wrong is in the row."""
    started = time.perf_counter()
    row = job.blank()
    try:
        torch.set_num_threads(1)
        subject = _subject(job.source)
        row.evaluated = len(subject.images)
        _fill(row, subject, job.combination)
    except Exception as error:
        row.reason = first_line(error)
    row.seconds = round(time.perf_counter() - started, 2)
    return row


def _fill(row: Row, subject: Subject, how: Combination) -> None:
    model = subject.dense if how.method == DENSE else _pruned(row, subject, how)
    row.top1 = round(accuracy(model, subject.decoded), 4)
    row.parameters, row.flops = measure.parameters(model), measure.flops(model, subject.one)
    row.parameters_left = round(row.parameters / measure.parameters(subject.dense), 5)
    row.flops_left = round(row.flops / subject.dense_flops, 5)
    found = measure.timings(
        {"dense": subject.dense, "pruned": model},
        subject.one,
        runs=_ROUNDS,
        warmup=_WARMUP,
        seconds=_SECONDS,
        clock=time.thread_time,  # combinations run beside each other: their waiting for the processor is no latency
    )
    row.latency_ms = round(statistics.median(found["pruned"]), 4)
    row.latency_left = round(paired_ratio(found["pruned"], found["dense"]), 4) if model is not subject.dense else 1.0


def _pruned(row: Row, subject: Subject, how: Combination) -> nn.Module:
    """The masked network, exported; verified by the export itself, and on images."""
    try:
        row.channels = subject.mask(how)
        if how.repaired:
            subject.repair()
        exported: Any = finish(compile_program(subject.program()), row.model)
    except NothingToPruneError:  # a share of few channels may be none
        row.channels, row.error = 0, 0.0
        return subject.dense
    some = subject.images.batch(range(min(_COMPARED, len(subject.images))))
    with torch.no_grad():
        row.error = float(f"{relative_error(subject.model(some), exported(some)):.3g}")
    if not row.error <= TOLERANCE["float32"]:
        raise DifferentError(f"the exported network differs from the masked one by {row.error:.1e}, relatively")
    return exported

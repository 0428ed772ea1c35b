"""The models that are compared: one masked model, exported in several ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import upscale

from ..capture import capture
from ..channels import Side
from ..exporting import compile_program
from ..ideal import ideal
from ..masking import MaskingManager
from ..plan import Mode, Rates
from ..precision import full_precision
from ..zoo.compare import relative_error
from ..zoo.subject import Inputs, Subject
from .models import to_format
from .rows import Setting

#: Largest relative difference of an exported model's output from the masked model's, by dtype. The networks are random
#: and deep: rounding grows from layer to layer.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 0.2, "bfloat16": 0.5}


class UnavailableError(Exception):
    """A variant or a backend that there is not in this setting; the message says why."""


class WrongValuesError(Exception):
    """An exported model that does not compute what the masked model computes: its time means nothing."""


@dataclass(frozen=True)
class Made:
    """A model that is ready to be timed. ``error``: relative, against the masked model, where it is to be equal."""

    model: nn.Module
    error: float | None = None


class Workbench:
    """One model in one setting, with its unpruned weights to return to between masks."""

    def __init__(self, subject: Subject, setting: Setting) -> None:
        self.subject, self.setting = subject, setting
        self._weights = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}

    def make(self, variant: str) -> Made:
        """One of ``VARIANTS``, in the setting's memory format. The model itself has its unpruned weights afterwards.

        Raises ``UnavailableError``, ``WrongValuesError``, and whatever masking and exporting raise.
        """
        try:
            return _VARIANTS[variant](self)
        finally:
            self._restore()

    def mask(self, method: Any) -> None:
        """Write the L2 masks of the setting into the model."""
        side: Side = self.setting.side  # type: ignore[assignment]
        try:
            manager = MaskingManager(self.subject.model, side, method, example_inputs=self.subject.inputs)
        except upscale.InputError as error:
            if "method" in str(error):
                raise UnavailableError(f"this version has no masks of method {method!r}") from error
            raise
        manager.importance("l2").mask(self.setting.amount)

    def _restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self.subject.model.state_dict().items():
                tensor.copy_(self._weights[name])

    def finished(self, model: nn.Module) -> nn.Module:
        """Ready to be timed: eval mode, no gradients, weights in the memory format."""
        return to_format(model.eval().requires_grad_(False), self.setting)


def exported(subject: Subject, reads: Mode, setting: Setting) -> nn.Module:
    """The one place in which the benchmark exports. The example is of the setting's batch size and memory format."""
    target = upscale.Target(
        setting.batch,
        setting.memory_format,  # type: ignore[arg-type]
        setting.backend,  # type: ignore[arg-type]
        round_to=setting.round_to,
    )
    return upscale.export(subject.model, subject.args, subject.kwargs, reads=reads, target=target, verify=False)


def _pruned(method: str, reads: Mode) -> Callable[[Workbench], Made]:
    def make(bench: Workbench) -> Made:
        bench.mask(method)
        model = bench.finished(exported(bench.subject, reads, bench.setting))
        with full_precision():
            error = relative_error(bench.subject.call(bench.subject.model), bench.subject.call(model))
        if not error <= TOLERANCE[bench.setting.dtype]:
            raise WrongValuesError(f"its output differs from the masked model's by {error:.1e}, relatively")
        return Made(model, error)

    return make


def _unpruned(bench: Workbench) -> Made:
    return Made(bench.subject.model)


def _ideal(bench: Workbench) -> Made:
    if bench.setting.backend not in ("eager", "cudagraphs"):
        raise UnavailableError("a read without a copy can be written in eager mode only")
    bench.mask("unconstrained")
    subject = bench.subject
    # Where reads are free, every layer reads just what it wants.
    free = upscale.Target(rates=Rates(call=0.0, copy=0.0, pick=0.0, piece=0.0, stretch=0.0))
    compiled = compile_program(capture(subject.model, subject.args, subject.kwargs), "auto", target=free)
    return Made(ideal(compiled, subject.args, subject.kwargs, bench.finished))


_VARIANTS: dict[str, Callable[[Workbench], Made]] = {
    "unpruned": _unpruned,
    "constrained": _pruned("constrained", "auto"),
    "baseline": _pruned("unconstrained", "baseline"),
    "gather": _pruned("unconstrained", "gather"),
    "auto": _pruned("unconstrained", "auto"),
    "contiguous": _pruned("contiguous", "auto"),
    "ideal": _ideal,
}


class Bound(nn.Module):
    """A model with named inputs as one of positional ones, which all that measures can call."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Tensor) -> Any:
        return self.model(**dict(zip(self.names, args, strict=True)))


def bound(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model, and what to call it with: positional arguments only."""
    if isinstance(inputs, dict):
        return Bound(model, tuple(inputs)), tuple(inputs.values())
    return model, inputs

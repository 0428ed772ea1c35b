"""Translation validation: the exported model must compute what the masked model computes, every time.

Both are run on the example inputs, on perturbed ones and at other batch sizes. Outputs must agree to a relative error
of 1e-10 in float64; a float32 model whose rounding alone exceeds its tolerance is compared in float64 instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .aliases import first_tensor
from .errors import InputError, VerificationError
from .guards import accepted
from .plan import Plan
from .precision import full_precision
from .program import Program, interpret, run, steps, where

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


# What torch's batch norm without running statistics says to a batch of one, in the user's model as in the exported one;
# the captured operator does not.
_ONE_VALUE = "Expected more than 1 value per channel"


class _RefusedByLayerError(Exception):
    """A layer of torch's own does not take inputs that the bare operators would take."""


@dataclass(frozen=True)
class Verification:
    """What was compared: batch sizes, the largest relative error seen, seconds spent."""

    batches: tuple[int, ...]
    error: float
    tolerance: float
    seconds: float


def relative_error(expected: Any, actual: Any) -> float:
    """max|a - b| / max|a| over finite entries of two flat results; infinite where they differ in kind.

    Entries that are not finite must be the same on both sides.
    """
    if not isinstance(expected, torch.Tensor):
        return 0.0 if expected == actual else float("inf")
    if not isinstance(actual, torch.Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)):
        return float("inf")
    a, b = expected[finite], actual[finite]
    if not a.numel():
        return 0.0
    difference, scale = float((a - b).abs().max()), float(a.abs().max())
    return difference / scale if scale > 0 else difference


@full_precision()
def verify(
    masked: Program, lowered: Program, plan: Plan, call: Callable[[Sequence[torch.Tensor]], Sequence[Any]]
) -> Verification:
    """Compare ``call`` (the exported model on flat inputs, giving flat outputs) with the masked program.

    Raises:
        VerificationError: they differ (the message names the first layer that does), or the exported one cannot run.
        InputError: the masked model fails on the example (a wrong dtype, say).
    """
    started = time.perf_counter()
    worst, batches, tolerance = 0.0, [], _tolerance(masked)
    for inputs in example_inputs(masked):
        try:
            expected = run(masked, inputs)
        except RuntimeError as failure:
            raise InputError(f"the masked model itself does not run on inputs like the example: {failure}") from failure
        try:
            actual = _called(call, inputs)
        except _RefusedByLayerError:
            continue
        errors = [relative_error(a, b) for a, b in zip(expected, actual, strict=True)]
        error = max(errors, default=0.0)
        if error > tolerance:
            error = _double_check(masked, lowered, inputs, actual, error)
        if not error <= tolerance:
            raise VerificationError(_explain(masked, lowered, plan, inputs, error, tolerance))
        worst = max(worst, error)
        batches.append(_batch(inputs))
    return Verification(tuple(batches), worst, tolerance, time.perf_counter() - started)


def _called(call: Callable[[Sequence[torch.Tensor]], Sequence[Any]], inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
    """The exported model's outputs; that it cannot run at all is a fault of the export, not of the user's input."""
    try:
        with torch.no_grad():
            return call(inputs)
    except Exception as failure:
        if _ONE_VALUE in str(failure):
            raise _RefusedByLayerError from failure
        raise VerificationError(
            f"the exported model does not run at batch {_batch(inputs)}, where the masked one does: "
            f"{type(failure).__name__}: {failure}. Nothing was changed in your model. Please report this with its code."
        ) from failure


def _tolerance(program: Program) -> float:
    dtypes = [t.dtype for t in program.tensors.values() if t.is_floating_point()]
    return max((TOLERANCE.get(d, 1e-1) for d in dtypes), default=1e-10)


def _batch(inputs: Sequence[torch.Tensor]) -> int:
    return int(inputs[0].shape[0]) if inputs and inputs[0].ndim else 0


def example_inputs(program: Program) -> Iterator[tuple[torch.Tensor, ...]]:
    """The captured example; then, where the batch is dynamic, one image alone and three perturbed ones."""
    yield program.inputs
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    dynamic = [bool(n.meta["val"].ndim) and isinstance(n.meta["val"].shape[0], torch.SymInt) for n in placeholders]
    if not any(dynamic):
        return
    for batch in (1, 3):
        inputs = tuple(_resize(t, batch) if d else t for t, d in zip(program.inputs, dynamic, strict=True))
        if accepted(program.signature.guards, [t.shape for t in inputs]):
            yield inputs


def _resize(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """``batch`` examples made of the given ones, shifted and perturbed with a fixed seed."""
    repeats = -(-batch // tensor.shape[0]) + 1
    wide = tensor.repeat(repeats, *[1] * (tensor.ndim - 1))[1 : batch + 1].clone()
    if wide.is_floating_point():
        generator = torch.Generator().manual_seed(batch)
        noise = torch.randn(wide.shape, generator=generator, dtype=torch.float32)
        spread = float(wide.float().std()) if wide.numel() > 1 else 1.0
        wide += (0.1 * spread * noise).to(wide)
    return wide


class _Double(Mapping[str, torch.Tensor]):
    """Tensors in float64, converted when asked for and not kept."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return _double(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _double_check(
    masked: Program, lowered: Program, inputs: Sequence[torch.Tensor], actual: Sequence[Any], error: float
) -> float:
    """Rounding or a fault? In float64 rounding vanishes; the emitted model must still match the lowered program."""
    if not _rounds(masked):
        return error
    direct = max((relative_error(a, b) for a, b in zip(run(lowered, inputs), actual, strict=True)), default=0.0)
    if not direct <= 1e-6:
        return error
    wide = [_double(t) for t in inputs]
    try:
        with torch.no_grad():
            a = interpret(masked.graph, _Double(masked.tensors), wide, dtype=torch.float64)
            b = interpret(lowered.graph, _Double(lowered.tensors), wide, dtype=torch.float64)
    except RuntimeError:
        return error  # an operator has no float64 form
    exact = max((relative_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return exact if exact <= TOLERANCE[torch.float64] else error


def _rounds(program: Program) -> bool:
    """Whether any value of the model is of less than float64's precision."""
    values = (first_tensor(n.meta.get("val")) for n in program.graph.nodes)
    return any(v is not None and v.is_floating_point() and v.dtype != torch.float64 for v in values)


def _explain(
    masked: Program, lowered: Program, plan: Plan, inputs: Sequence[torch.Tensor], error: float, tolerance: float
) -> str:
    culprit = first_difference(masked, lowered, plan, inputs, max(tolerance, 1e-9))
    place = f" The first result that differs is that of {culprit}." if culprit else ""
    return (
        f"the exported model does not compute what the masked model computes: relative error {error:.1e} at batch "
        f"{_batch(inputs)} (tolerance {tolerance:.0e}).{place} Nothing was changed in your model. Please report this "
        "with the model's code."
    )


def first_difference(
    masked: Program, lowered: Program, plan: Plan, inputs: Sequence[torch.Tensor], tolerance: float
) -> str | None:
    """The first operator whose kept channels differ between the two programs, as "module (source line)".

    Both are run in step, so that neither's intermediate values are held.
    """
    origins = {n.meta.get("origin") for n in lowered.graph.nodes}
    with torch.no_grad():
        after = steps(lowered.graph, lowered.tensors, inputs)
        for node, expected in steps(masked.graph, masked.tensors, inputs):
            if node.name not in origins:
                continue
            actual = next((value for n, value in after if n.meta.get("origin") == node.name), None)
            layout = plan.layouts.get(node.name)
            if layout is None or node.op != "call_function":
                continue
            if node.name in plan.contractions and plan.contractions[node.name].delta:
                continue  # its bias differs on purpose: a folded constant is made up for later
            if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
                continue
            places = torch.tensor(layout.positions, dtype=torch.int64, device=expected.device)
            if relative_error(expected.index_select(layout.dim, places), actual) > tolerance:
                return where(node)
    return None

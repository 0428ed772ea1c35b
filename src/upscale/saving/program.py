"""A pruned module as a program of ``torch.export``, in eval mode, with the sizes free that were free at its export."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from upscale.capture import borrowed, free_batch
from upscale.errors import CaptureError, UpscaleError, VerificationError
from upscale.recipe import Step
from upscale.recipe.example import dtype_of, make_call, make_inputs, make_sizes
from upscale.signature import FlatShapes
from upscale.verification import TOLERANCE, relative_error

__all__ = ["ExampleCall", "check_same_outputs", "example_call", "reexported"]


@dataclass(frozen=True)
class ExampleCall:
    """A call of a pruned module with random tensors (``leaves``, in order) like those of its export."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[torch.Tensor, ...]


def example_call(pruned: nn.Module, step: Step, seed: int = 0, batch: int | None = None) -> ExampleCall:
    """On the module's device, and in its type of numbers where that is another since the export. Whole numbers are
    zero: what values an embedding or an index takes is not known. ``batch``: instead of that of the example."""
    parameters = list(pruned.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    was = _usual([dtype_of(fact.dtype) for fact in step.tensors])
    now = _usual([p.dtype for p in parameters]) or was
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    inputs = make_inputs(step.call, device)
    captured = next((leaf.shape[0] for leaf in inputs if leaf.dim()), None)
    for leaf in inputs:
        if batch is not None and leaf.dim() and leaf.shape[0] == captured:
            leaf = leaf[:1].expand(batch, *leaf.shape[1:]).clone()
        if leaf.is_floating_point():
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
        leaves.append(leaf.to(now) if leaf.dtype == was and now is not None else leaf)
    args, kwargs = make_call(step.call, leaves)
    return ExampleCall(args, kwargs, tuple(leaves))


def _usual(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    floating = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
    return floating.most_common(1)[0][0] if floating else None


def reexported(pruned: fx.GraphModule, step: Step) -> ExportedProgram:
    """The program of a pruned module, checked against it. ``step``: its last export.

    Raises:
        CaptureError: torch cannot export the module. VerificationError: the program computes something else.
    """
    example = example_call(pruned, step)
    shapes = _shapes(pruned, step, example)
    with borrowed(pruned), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(pruned, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        except UpscaleError:
            raise
        except Exception as error:
            raise CaptureError(f"torch.export cannot export the pruned model: {error}") from error
        module = exported.module()
        check_same_outputs(
            pruned(*example.args, **example.kwargs), module(*example.args, **example.kwargs), "the exported program"
        )
    return exported


def _shapes(pruned: nn.Module, step: Step, example: ExampleCall) -> Any:
    """Free sizes, nested like the arguments."""
    free = make_sizes(step.sizes, len(example.leaves))
    entries = free.entries if isinstance(free, FlatShapes) else free_batch(list(example.leaves), free == "spatial")[1]
    collected = ShapesCollection()
    for leaf, entry in zip(example.leaves, entries, strict=True):
        if entry:
            collected[leaf] = entry
    return collected.dynamic_shapes(pruned, example.args, example.kwargs)


def check_same_outputs(expected: Any, actual: Any, what: str, tolerance: float | None = None) -> None:
    """Raise VerificationError where two nested outputs differ by more than rounding."""
    before, after = (
        [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)] for value in (expected, actual)
    )
    if [x.shape for x in before] != [y.shape for y in after]:
        raise VerificationError(f"{what} gives tensors of other shapes than the pruned model")
    for x, y in zip(before, after, strict=True):
        allowed = TOLERANCE.get(x.dtype, 1e-1) if tolerance is None else tolerance
        if not (error := relative_error(x, y)) <= allowed:
            raise VerificationError(f"{what} differs from the pruned model: relative error {error:.1e}")

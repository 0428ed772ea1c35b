"""``upscale.repair``: the accuracy that masking took away, given back by regression."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..accept import unwrap
from ..errors import UnsupportedModelError
from ..importance.batches import checked_batches
from ..importance.progress import progress_bar
from ..mask_arguments import one_of, penalty, whole
from .blockwise import BLOCK_STEPS, BlockFit, fit_blocks
from .layerwise import RIDGES, repair_layer
from .outputs import Outputs
from .pair import Inputs, Pair, capture_pair, check_order, check_same_layers, collect
from .recalibrate import recalibrated
from .report import LayerRepair, RepairReport, RepairWarning
from .sites import Site, find_sites
from .tape import Frontier, Tape

__all__ = ["repair", "with_blocks"]

Model = TypeVar("Model", bound=nn.Module)
#: Activations that are kept between layers, for all batches together, in bytes.
_KEPT = 1 << 30


def repair(
    masked: Model,
    original: nn.Module,
    batches: Iterable[Any],
    ridge: float | Literal["auto"] = "auto",
    recalibrate: bool = True,
    progress: bool = True,
    *,
    method: Literal["ridge", "blockwise"] = "ridge",
    steps: int = BLOCK_STEPS,
    seed: int = 0,
) -> Model:
    """A copy of ``masked`` whose remaining weights are fitted to the outputs of ``original``, without labels.

    Layer by layer in the order of execution, the weights that are not zero are solved for by ridge regression, so that
    the layer writes what it writes in ``original``, from what it reads in the network repaired so far (He, Zhang and
    Sun 2017, arXiv 1707.06168). What is zero in a weight stays zero. A constant for each output is fitted too, where
    there is a place for it: the layer's bias, or the running mean of the batch norm behind it. Each layer keeps its
    old weights unless the new ones have a smaller error on held-out examples, every eighth one. ``masked`` and
    ``original`` are not changed.

    Args:
        masked: a masked copy of ``original``, by :func:`upscale.mask` or anything else that zeroes weights. Masks that
            are parametrisations or of ``torch.nn.utils.prune`` stay on.
        original: the network before masking, on the same device.
        batches: an iterable of batches: tensors, tuples or dicts, as for
            :func:`upscale.importance.batches.feed`; labels are ignored. All of them are held in memory for the
            time of the call, where they lie, and 2 GiB of activations and rows beside them at most.
        ridge: the penalty on a weight's change, relative to the mean square of what the layer reads; ``"auto"``: for
            each layer the one of ``RIDGES`` that is best on held-out examples.
        recalibrate: also try to take the batch norms' statistics anew from the calibration data, and keep what brings
            the network's outputs closest to the original's on held-out examples.
        progress: show a bar on stderr when it takes more than two seconds.
        method: ``"ridge"``, or ``"blockwise"``: afterwards fit all residual blocks (what lies between two joins) and
            the outputs to the original's by ``steps`` of Adam on 32 examples each (Li et al. 2021, arXiv
            2102.05426); where an example is one image, mirrored and shifted at random, and of a large one a part.
            Where that leads away from the original on held-out examples it starts again at a lower rate, and it is
            kept if the outputs are closer in the end. As dear as training for as long, and the better the more is
            masked.
        seed: of the places of the feature maps that are sampled, and of the examples of a step.

    Returns:
        The repaired copy. Its ``repair_report`` (:class:`RepairReport`) has the error of each layer before and after.

    Raises:
        InputError: a bad argument, no batches, a batch that does not fit the model, or ``masked`` is no masked
            ``original`` (the first layer that differs is named). NonFiniteError: NaN or infinite values.
            UnsupportedModelError: the model cannot be copied or captured. CaptureError: see :func:`upscale.export`.
    """
    started = time.perf_counter()
    ridges = _checked_ridges(ridge)
    one_of("method", method, ("ridge", "blockwise"))
    whole("steps", steps, 1)
    ours, theirs = unwrap(masked), unwrap(original)
    check_same_layers(ours, theirs)
    check_order(ours, theirs)
    inputs = collect(ours, checked_batches(batches))
    repaired = _copied(ours)
    with _buffers_put_back(theirs), torch.no_grad():
        pair = capture_pair(repaired, theirs, inputs)
        sites, left = find_sites(pair, repaired)
        outputs = Outputs(pair, inputs)
        before = outputs.error()
        layers = _layers(pair, sites, inputs, ridges, seed, progress)
        moved = recalibrated(pair, repaired, inputs, outputs) if recalibrate else None
        blocks: tuple[BlockFit, ...] = ()
        if method == "blockwise":
            blocks = fit_blocks(pair, repaired, sites, inputs, outputs, steps, seed, progress)
        after = outputs.error()
    _warn_of_few(layers)
    seconds = time.perf_counter() - started
    repaired.__dict__["repair_report"] = RepairReport(layers, left, (before, after), moved, blocks, seconds)
    return repaired


def with_blocks(steps: int) -> dict[str, Any]:
    """What :func:`repair` is called with to fit blocks too, in so many steps; 0: not at all."""
    return {"method": "blockwise", "steps": steps} if steps else {}


def _layers(
    pair: Pair, sites: Sequence[Site], inputs: Inputs, ridges: Sequence[float], seed: int, progress: bool
) -> tuple[LayerRepair, ...]:
    tapes = Tape(pair.masked, inputs.device), Tape(pair.original, inputs.device)
    frontier = Frontier(tapes, inputs.leaves, _KEPT)
    done = []
    with progress_bar("repair", len(sites), shown=progress) as advance:
        for number, site in enumerate(sites):
            done.append(repair_layer(site, frontier, inputs.sizes, ridges, seed + number))
            advance()
    return tuple(done)


def _checked_ridges(ridge: Any) -> tuple[float, ...]:
    if ridge == "auto" and isinstance(ridge, str):
        return RIDGES
    return (penalty("ridge", ridge, '"auto" or '),)


def _copied(model: Any) -> Any:
    """A deep copy. Tensors that a hook computed last (torch.nn.utils.prune, old weight norm) cannot be copied by
    ``copy.deepcopy``, so their values are handed to it."""
    computed = [t for module in model.modules() for t in module.__dict__.values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in computed if not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({error}), and repair returns a copy. What cannot be copied is "
            "usually a hook's or a wrapper's: take it off first"
        ) from error


@contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    """A captured program writes to the buffers that the model writes to."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)


def _warn_of_few(layers: Sequence[LayerRepair]) -> None:
    few = [row for row in layers if row.samples < row.unknowns]
    if few:
        row = few[0]
        warnings.warn(
            f"{len(few)} of {len(layers)} layers have fewer samples than unknowns, {row.name} the first "
            f"({row.samples:,} samples, {row.unknowns:,} unknowns): the ridge decides there; give more batches",
            RepairWarning,
            stacklevel=3,
        )

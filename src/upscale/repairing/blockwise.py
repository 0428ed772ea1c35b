"""Blocks fitted as a whole, by gradient descent from where the regressions have brought them.

Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", arXiv 2102.05426,
fit a block of a quantised network to the original block's output on unlabelled inputs; here what is fitted are the
weights that a mask has left. Inputs are those of the repaired network, as in the regressions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..aliases import argument
from ..importance.progress import progress_bar
from ..program import module_path
from .geometry import is_contraction
from .pair import Inputs, Pair
from .samples import is_held_out
from .segments import Segment, find_segments
from .sites import is_frozen, writer
from .tape import Frontier, State, Tape

__all__ = ["BLOCK_STEPS", "BlockFit", "fit_blocks"]

BLOCK_STEPS = 400
_EXAMPLES = 64  # of a step
_RATE = 1e-3
BlockFit = tuple[str, float, float]


@dataclass(frozen=True, eq=False)
class _Data:
    """What a block reads, and what it should write: (examples, ...). ``held``: bool (examples,)."""

    read: Tensor
    wanted: Tensor
    held: Tensor

    @property
    def scale(self) -> Tensor:
        return self.wanted.float().var().clamp_min(torch.finfo(torch.float32).tiny)


def fit_blocks(
    pair: Pair, model: nn.Module, inputs: Inputs, limit: int, steps: int, seed: int, progress: bool
) -> tuple[BlockFit, ...]:
    """Fit every segment in order; (where it ends, its error before, after) on held-out examples.

    A block keeps what it had unless the fit is better on these. Errors are relative to the target's variance.
    ``limit``: bytes of activations to keep between blocks, and of the examples of one block at most.
    """
    tapes = Tape(pair.masked, inputs.device), Tape(pair.original, inputs.device)
    frontier = Frontier(tapes, inputs.leaves, limit)
    segments = find_segments(pair.masked)
    done = []
    with progress_bar("blocks", len(segments), shown=progress) as advance:
        for number, segment in enumerate(segments):
            free = _parameters(pair, model, segment)
            if free:
                data = _collected(pair, segment, frontier, inputs, limit)
                before, after = _fit(tapes[0], segment, free, data, steps, seed + number)
                done.append((module_path(segment.end) or str(segment.end), before, after))
            advance()
    return tuple(done)


def _collected(pair: Pair, segment: Segment, frontier: Frontier, inputs: Inputs, limit: int) -> _Data:
    """What the segment reads in the repaired network and writes in the original, as many examples as fit."""
    tape, original = frontier.tapes
    end = pair.origin[segment.end]
    read: list[Tensor] = []
    wanted: list[Tensor] = []
    held: list[Tensor] = []
    bytes_held = 0

    def use(number: int, states: tuple[State, ...]) -> None:
        nonlocal bytes_held
        if bytes_held > limit:
            return
        original.advance(states[1], end)
        here = tape.value(states[0], segment.start)
        there = original.call(end, lambda node: original.value(states[1], node))
        start, size = sum(inputs.sizes[:number]), inputs.sizes[number]
        if len(here) != size or len(there) != size:
            return
        bytes_held += here.nbytes + there.nbytes
        read.append(here)
        wanted.append(there)
        held.append(is_held_out(torch.arange(start, start + size)))

    frontier.visit((segment.nodes[0], pair.origin[segment.nodes[0]]), use)
    if not read:
        empty = torch.empty(0)
        return _Data(empty, empty, torch.empty(0, dtype=torch.bool))
    return _Data(torch.cat(read), torch.cat(wanted), torch.cat(held).to(inputs.device))


@dataclass(frozen=True, eq=False)
class _Free:
    """A tensor that is fitted: its name in the program, itself, where it may change, and how it is written."""

    name: str
    tensor: Tensor
    kept: Tensor
    write: Callable[[Tensor], None]


def _parameters(pair: Pair, model: nn.Module, segment: Segment) -> list[_Free]:
    """Weights, biases, scales and shifts of the segment's layers and batch norms that nobody else uses."""
    inside = set(segment.nodes)
    found: dict[str, _Free] = {}
    for node in segment.nodes:
        for slot in _slots(node):
            if slot.op != "get_attr" or set(slot.users) - inside:
                continue
            name = str(slot.target)
            tensor, write = pair.masked.tensors[name], writer(model, pair.masked, name)
            if write is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                found[name] = _Free(name, tensor, tensor.detach() != 0, write)
    return list(found.values())


def _slots(node: fx.Node) -> Iterator[fx.Node]:
    if is_contraction(node) or (node.target is torch.ops.aten.batch_norm.default and is_frozen(node)):
        for name in ("weight", "bias", "other"):
            value = argument(node, name)
            if isinstance(value, fx.Node):
                yield value


def _fit(
    tape: Tape, segment: Segment, free: Sequence[_Free], data: _Data, steps: int, seed: int
) -> tuple[float, float]:
    """Adam with a cosine schedule on the mean square; the held-out error before and after."""
    used = torch.nonzero(~data.held).flatten()
    if not len(used) or not bool(data.held.any()):
        return 0.0, 0.0
    before = _error(tape, segment, {}, data)
    values = {entry.name: entry.tensor.detach().clone().requires_grad_() for entry in free}
    optimiser = torch.optim.Adam(values.values(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = used[torch.randint(len(used), (_EXAMPLES,), generator=generator).to(used.device)]
            effective = {entry.name: values[entry.name] * entry.kept for entry in free}
            written = _written(tape, segment, effective, data.read[chosen])
            loss = (written - data.wanted[chosen]).square().mean() / data.scale
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    fitted = {entry.name: (values[entry.name] * entry.kept).detach() for entry in free}
    after = _error(tape, segment, fitted, data)
    if not after < before:
        return before, before
    for entry in free:
        entry.write(fitted[entry.name])
    return before, after


@torch.no_grad()
def _error(tape: Tape, segment: Segment, values: dict[str, Tensor], data: _Data) -> float:
    wrong, count = 0.0, 0
    for part in torch.nonzero(data.held).flatten().split(_EXAMPLES):
        written = _written(tape, segment, values, data.read[part])
        wrong += float((written - data.wanted[part]).double().square().sum())
        count += written.numel()
    return wrong / count / float(data.scale)


def _written(tape: Tape, segment: Segment, values: dict[str, Tensor], read: Tensor) -> Tensor:
    """What the segment writes with ``values`` in place of the program's tensors."""
    found: dict[fx.Node, Tensor] = {segment.start: read}

    def value(node: fx.Node) -> Tensor:
        if node.op == "get_attr":
            name = str(node.target)
            return values[name] if name in values else tape.program.tensors[name].detach()
        return found[node]

    for node in segment.nodes:
        found[node] = tape.call(node, value)
    return found[segment.end]

"""Numbers that are measured, not planned: parameters, arithmetic, time, and bytes moved by copies."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .errors import InputError
from .observe import quietly_evaluated

__all__ = ["Copies", "copies", "flop_counter", "flops", "kernels", "latency", "parameters", "timings"]

_LEAST = 3  # timed rounds, however short the time allowed

# Operators whose result is a rearrangement of their inputs' values: what they allocate is what they copy.
_GATHERING = frozenset(
    f"aten::{name}"
    for name in ("cat", "index_select", "index", "gather", "take", "masked_select", "native_channel_shuffle")
)

# Operators that move no data, or answer a question, or only write a number, and those that copy only where they must.
_IDLE = frozenset(
    """_nnpack_available alias as_strided as_strided_ chunk detach detach_ diagonal expand expand_as fill_ flatten
    movedim narrow numpy_T permute resize_ resize_as_ resolve_conj resolve_neg select set_ slice split
    split_with_sizes squeeze squeeze_ t transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze
    unsqueeze_ view view_as zero_""".split()
)
_MAY_COPY = frozenset("clone constant_pad_nd contiguous expand_copy reshape to _to_copy type_as pad".split())


def parameters(model: nn.Module) -> int:
    """Number of values in the model's parameters; a parameter shared by several layers counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, args: Any) -> int:
    """Floating-point operations of one forward pass in eval mode: two for each multiply-accumulate.

    Counted are convolutions, matrix products (linear layers) and attention; elementwise work, norms and
    pooling are not. ``args``: a tensor or a tuple of positional arguments. Models on any device; parameters
    and buffers stay as they are."""
    counter = flop_counter()
    with quietly_evaluated(model), counter:
        model(*_as_args(args))
    return int(counter.get_total_flops())


def flop_counter() -> FlopCounterMode:
    """A context that counts what :func:`flops` counts."""
    # torch's own table lacks the kernel that attention runs through on the CPU.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of the two matrix products of attention, from the shapes (batch, heads, length, width)."""
    return int(sdpa_flop_count(query, key, value))


def latency(
    models: Mapping[str, Callable[..., Any]],
    args: Any,
    *,
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = 1,
) -> dict[str, float]:
    """Median milliseconds of one call of each model, the calls interleaved so that drift hits all alike.

    ``models``: name -> callable; modules are timed in eval mode, and get their flags back. ``runs`` timed
    rounds after ``warmup`` untimed ones, each in a different order. ``threads``: CPU threads of torch during
    the measurement, None to leave them as they are. Work queued on an accelerator is waited for."""
    found = timings(models, args, runs=runs, warmup=warmup, threads=threads)
    return {name: statistics.median(values) for name, values in found.items()}


def timings(
    models: Mapping[str, Callable[..., Any]],
    args: Any,
    *,
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = 1,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every timed call of each model, as :func:`latency` makes them: entry i is of round i.

    ``seconds``: no further round is begun after so many of timed rounds, but for the first three. ``clock``: in
    seconds. With ``time.thread_time``, for one thread of a CPU, time counts in which the thread runs: other processes
    may share its core.
    """
    if runs < 1 or warmup < 0:
        raise InputError(f"timing needs runs >= 1 and warmup >= 0, not {runs} and {warmup}")
    arguments = _as_args(args)
    wait = _waiter(arguments)
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_threads(threads))
        stack.enter_context(torch.inference_mode())
        for model in models.values():
            if isinstance(model, nn.Module):
                stack.enter_context(quietly_evaluated(model))
        stack.enter_context(_no_garbage_collection())
        begun = 0.0
        for turn in range(warmup + runs):
            if turn == warmup:
                begun = time.perf_counter()
            if seconds is not None and turn >= warmup + _LEAST and time.perf_counter() - begun > seconds:
                break
            shift = turn % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                wait()
                start = clock()
                models[name](*arguments)
                wait()
                if turn >= warmup:
                    times[name].append(1000 * (clock() - start))
    return times


@dataclass
class Copies:
    """One forward pass: ``bytes`` written by ``calls`` copying operators; ``by_op`` splits the bytes."""

    bytes: int = 0
    calls: int = 0
    by_op: dict[str, int] = field(default_factory=dict)

    def add(self, op: str, size: int) -> None:
        self.bytes += size
        self.calls += 1
        self.by_op[op] = self.by_op.get(op, 0) + size


def copies(model: Callable[..., Any], args: Any) -> Copies:
    """Bytes written by copying operators in one forward pass, as torch's profiler saw them.

    Counted are ``copy_`` (and with it ``contiguous``, ``clone``, ``pad`` and the copies that a kernel makes
    of an input which is not contiguous), ``cat``, ``index_select``, ``index`` and ``gather``. A copy made
    inside a counted operator is not counted again. ``model``: a module (run in eval mode) or any callable.
    """
    found = Copies()
    for event in _profiled(model, args).experimental_event_tree():
        _count(event, found)
    return found


def kernels(model: Callable[..., Any], args: Any) -> int:
    """How many kernels one forward pass launches, as torch's profiler saw them.

    On CUDA these are the device's own records, copies and fills included. On the CPU, where no such record is made,
    operators that compute or copy: not views, allocations and fills, and not operators that only call others.
    ``model``: a module (run in eval mode) or any callable.
    """
    results = _profiled(model, args)
    on_device = sum(event.device_type() == torch.autograd.DeviceType.CUDA for event in results.events())
    return on_device or sum(sum(_launched(event)) for event in results.experimental_event_tree())


def _launched(event: Any) -> tuple[int, int]:
    """Kernels at and below a profiler event: (those that compute, those that copy)."""
    if event.name == "aten::copy_":
        target, source = event.extra_fields.inputs[:2]
        return 0, int(_elements(source) == _elements(target) > 1)
    if event.name in _GATHERING:
        return 0, 1
    below = [_launched(child) for child in event.children]
    computing, copying = sum(c for c, _ in below), sum(c for _, c in below)
    operator = event.name.removeprefix("aten::")
    wraps = operator in _IDLE or operator in _MAY_COPY or operator.startswith(("empty", "new_empty", "_unsafe_view"))
    if wraps or not event.name.startswith("aten::"):
        return computing, copying
    return max(computing, 1), copying


def _profiled(model: Callable[..., Any], args: Any) -> Any:
    """What the profiler recorded of one forward pass."""
    arguments = _as_args(args)
    activities = [ProfilerActivity.CPU]
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(arguments)):
        activities.append(ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(quietly_evaluated(model))
        model(*arguments)  # what is done once, on the first call, is not a copy of every call
        wait = _waiter(arguments)
        wait()
        with profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True) as profiler:
            result = model(*arguments)
            wait()
        del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    return profiler.profiler.kineto_results


def _count(event: Any, found: Copies) -> None:
    """Add the outermost copying operators at and below a profiler event."""
    if event.name == "aten::copy_":
        target, source = event.extra_fields.inputs[:2]
        # A single number, or one spread over a tensor (a convolution does so with its bias), is a fill.
        if _elements(source) == _elements(target) > 1:
            found.add("copy_", _size(target))
    elif event.name == "aten::index_put_":
        found.add("index_put_", _size(event.extra_fields.inputs[2]))
    elif event.name in _GATHERING:
        found.add(event.name.removeprefix("aten::"), max(_allocations(event), default=0))
    else:
        for child in event.children:
            _count(child, found)


def _size(tensor: Any) -> int:
    """Bytes of a tensor described by the profiler; scalars are described as None."""
    return _elements(tensor) * tensor.dtype.itemsize if tensor is not None else 0


def _elements(tensor: Any) -> int:
    return math.prod(tensor.sizes) if tensor is not None else 0


def _allocations(event: Any) -> Iterator[int]:
    size = getattr(event.extra_fields, "alloc_size", 0)
    if size > 0:
        yield size
    for child in event.children:
        yield from _allocations(child)


def _as_args(args: Any) -> tuple[Any, ...]:
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)


def _waiter(args: tuple[Any, ...]) -> Callable[[], object]:
    """What to call before reading the clock: accelerators work on after a call has returned."""
    devices = {leaf.device.type for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)}
    if "cuda" in devices:
        return torch.cuda.synchronize
    if "mps" in devices:
        return torch.mps.synchronize
    return lambda: None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

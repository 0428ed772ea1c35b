"""The example call of an export as data: how the arguments nest, and of each tensor the shape, never the values."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim

from upscale.errors import FileError, InputError
from upscale.program import Program
from upscale.signature import FlatShapes, Leaf, call_with

__all__ = [
    "Call",
    "Input",
    "Sizes",
    "call_of",
    "dtype_of",
    "is_dense",
    "make_call",
    "make_inputs",
    "make_sizes",
    "sizes_of",
]

_DEEPEST = 50


@dataclass(frozen=True)
class Input:
    """One tensor of the example."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """The arguments of the example call. ``args``: a nested value, see :func:`_data`; None where it holds an object
    that data cannot describe, which ``missing`` then names."""

    inputs: tuple[Input, ...]
    args: Any
    kwargs: Any
    missing: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Which sizes were to be free: ``"batch"``, ``"spatial"``, or ``"given"`` with an entry for each tensor."""

    kind: str
    entries: Any = None


# -- the call ---------------------------------------------------------------------------------------------------------


def call_of(program: Program) -> Call:
    """The call that ``program`` was captured with."""
    inputs = tuple(
        Input(str(t.dtype).removeprefix("torch."), tuple(t.shape), tuple(t.stride()) if is_dense(t) else ())
        for t in program.inputs
    )
    args, kwargs = call_with(program.signature.arguments, [Leaf(i) for i in range(len(inputs))])
    try:
        return Call(inputs, _data(args), _data(kwargs))
    except _NotData as error:
        return Call(inputs, None, None, str(error))


class _NotData(Exception):
    """A value of a class of the user's, which a file cannot name without importing it."""


def _data(value: Any) -> Any:
    """A nested value as JSON: containers and what JSON lacks are objects with one key that says what they are."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Leaf):
        return {"tensor": value.index}
    if type(value) is float:
        return {"float": repr(value)}
    if type(value) is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_data(item) for item in value]}
    if type(value) in (dict, OrderedDict):
        name = "dict" if type(value) is dict else "ordered"
        return {name: [[_data(key), _data(item)] for key, item in value.items()]}
    raise _NotData(f"an argument is a {type(value).__name__}")


def make_inputs(call: Call, device: torch.device) -> list[torch.Tensor]:
    """Tensors like those of the example, all zero."""
    return [_tensor(item, device) for item in call.inputs]


def make_call(call: Call, leaves: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments that nest like those of the example, around ``leaves``.

    Raises:
        InputError: the example held an object of a class that a file cannot describe.
        FileError: the description is no description of a call.
    """
    if call.missing is not None:
        raise InputError(f"{call.missing}, which a file cannot hold: pass an example call, load(path, model, args=...)")
    args, kwargs = _value(call.args, leaves), _value(call.kwargs, leaves)
    if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise FileError("its example call is none")
    return tuple(args), kwargs


def _tensor(described: Input, device: torch.device) -> torch.Tensor:
    shape, strides = described.shape, described.strides
    dtype = dtype_of(described.dtype)
    if math.prod(shape) > 1 << 40 or not math.prod(shape):
        raise FileError(f"its example has an input of shape {shape}")
    if not strides:
        return torch.zeros(shape, dtype=dtype, device=device)
    if not are_dense(shape, strides):
        raise FileError(f"its example has an input of shape {shape} and strides {strides}")
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()


def _value(data: Any, leaves: Sequence[torch.Tensor], depth: int = 0) -> Any:
    if data is None or type(data) in (bool, int, str):
        return data
    if not isinstance(data, dict) or len(data) != 1 or depth > _DEEPEST:
        raise FileError("its example call is none")
    ((kind, content),) = data.items()
    try:
        if kind in _LITERALS:
            return _LITERALS[kind](content)
        if kind == "tensor":
            return leaves[_index(content)]
        if kind in ("list", "tuple"):
            items = [_value(item, leaves, depth + 1) for item in content]
            return items if kind == "list" else tuple(items)
        if kind in ("dict", "ordered"):
            pairs = [(_value(key, leaves, depth + 1), _value(item, leaves, depth + 1)) for key, item in content]
            return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise FileError(f"its example call is none ({kind})") from error
    raise FileError(f"its example call holds a {kind[:40]!r}")


def _index(content: Any) -> int:
    if type(content) is not int or content < 0:
        raise ValueError(content)
    return content


def _torch_value(kind: type) -> Callable[[Any], Any]:
    def find(name: Any) -> Any:
        value = getattr(torch, name, None) if isinstance(name, str) and name.isidentifier() else None
        if not isinstance(value, kind):
            raise ValueError(name)
        return value

    return find


_LITERALS: dict[str, Callable[[Any], Any]] = {
    "float": lambda text: float(str(text)),
    "complex": lambda parts: complex(float(str(parts[0])), float(str(parts[1]))),
    "dtype": _torch_value(torch.dtype),
    "memory_format": _torch_value(torch.memory_format),
    "device": lambda text: torch.device(str(text)),
}


def dtype_of(name: str) -> torch.dtype:
    """Raises FileError for what is no dtype of torch."""
    try:
        dtype: torch.dtype = _LITERALS["dtype"](name)
        return dtype
    except ValueError as error:
        raise FileError(f"{name[:40]!r} is no type of numbers") from error


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills its stretch of memory, each place once."""
    return tensor.layout is torch.strided and are_dense(tuple(tensor.shape), tuple(tensor.stride()))


def are_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """The same of a shape and strides."""
    if len(shape) != len(strides):
        return False
    filled = 1
    for stride, size in sorted((st, si) for st, si in zip(strides, shape, strict=True) if si != 1):
        if stride != filled:
            return False
        filled *= size
    return all(stride <= max(filled, 1) for stride in strides)


# -- free sizes -------------------------------------------------------------------------------------------------------


def sizes_of(program: Program) -> Sizes:
    """Which sizes were to be free when ``program`` was captured."""
    if isinstance(program.free, FlatShapes):
        return Sizes("given", [_dims(entry) for entry in program.free.entries])
    return Sizes("spatial" if program.free == "spatial" else "batch")


def _dims(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        return {"by_number": [[int(dim), _dim(size)] for dim, size in entry.items()]}
    return None if entry is None else [_dim(size) for size in entry]


def _dim(size: Any) -> Any:
    """One dimension: None, a number, a hint to torch, a named size, or a linear function of one."""
    if size is None or type(size) is int:
        return size
    if hasattr(size, "root"):
        offset = int(size.fn(0))
        root = _dim(size.root)
        return {**root, "times": int(size.fn(1)) - offset, "plus": offset}
    if hasattr(size, "__name__"):
        low, high = size.min, size.max
        return {"name": size.__name__, "min": int(low), "max": high if type(high) is int else None}
    hint = getattr(size, "type", size)  # an enumeration by itself in older versions of torch
    return {"hint": hint.name, "min": getattr(size, "min", None), "max": getattr(size, "max", None)}


def make_sizes(sizes: Sizes, count: int) -> Any:
    """What :func:`upscale.capture.capture` takes as ``dynamic_shapes`` for ``count`` tensors.

    Raises:
        FileError: the description is none.
    """
    if sizes.kind in ("batch", "spatial"):
        return None if sizes.kind == "batch" else "spatial"
    entries = sizes.entries
    known: dict[str, Any] = {}
    if sizes.kind != "given" or not isinstance(entries, list) or len(entries) != count:
        raise FileError("its free sizes do not fit its example call")
    try:
        return FlatShapes(tuple(_entry(entry, known) for entry in entries))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, NotImplementedError) as error:
        raise FileError("its free sizes are none") from error


def _entry(entry: Any, known: dict[str, Any]) -> Any:
    if isinstance(entry, dict):
        return {_index(dim): _size(size, known) for dim, size in entry["by_number"]}
    return None if entry is None else [_size(size, known) for size in entry]


def _size(data: Any, known: dict[str, Any]) -> Any:
    if data is None or type(data) is int:
        return data
    low, high = data["min"], data["max"]
    if any(bound is not None and type(bound) is not int for bound in (low, high)):
        raise ValueError(data)
    if "hint" in data:
        hint = {"AUTO": Dim.AUTO, "DYNAMIC": Dim.DYNAMIC, "STATIC": Dim.STATIC}[data["hint"]]
        return hint if low is None and high is None else hint(min=low, max=high)
    size = known.setdefault(data["name"], None) or Dim(data["name"], min=low, max=high)
    known[data["name"]] = size
    if "times" in data:
        times, plus = _index(data["times"]), data["plus"]
        size = size * times if times != 1 else size
        size = size + plus if plus > 0 else size - (-plus) if plus < 0 else size
    return size

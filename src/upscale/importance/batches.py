"""Run a model on batches of data for the sake of a score, and leave no trace in it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError, NonFiniteError, UpscaleError
from ..large import all_finite
from ..observe import quietly_evaluated
from .progress import progress_bar

__all__ = ["FromBatches", "call_of", "checked_batches", "feed"]


def checked_batches(batches: Any) -> Iterable[Any]:
    """``batches`` itself. Raises ``InputError`` if it is a single batch, or nothing that can be iterated over."""
    if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
        raise InputError(
            "batches must be an iterable of batches, such as a DataLoader or a list of tensors, not "
            f"{type(batches).__name__}; a single batch goes in a list: [batch]"
        )
    return batches


class FromBatches:
    """A score that needs nothing but data."""

    def __init__(self, batches: Iterable[Any]) -> None:
        """Raises ``InputError`` if ``batches`` is no iterable of batches."""
        self._batches = checked_batches(batches)


def feed(
    model: nn.Module,
    batches: Iterable[Any],
    title: str,
    use: Callable[[Any, Any], None] | None = None,
    watch: AbstractContextManager[Any] | None = None,
) -> None:
    """Call ``model``, in eval mode, on every batch.

    A batch is a tensor; a tuple or list, of which the model gets the first items, as many as its ``forward`` has
    arguments without a default (one at least); or a dict, of which it gets the entries that its ``forward`` names (all
    of them, if that takes ``**kwargs``). Tensors are moved to the device of the model's first parameter.

    ``use(output, batch)`` is called after each batch, ``watch`` is entered around the model's call; whatever
    gradients they need they turn on. Training flags, buffers and the random state are put back, whatever happens.
    A bar of progress is shown on stderr if it all takes more than two seconds.

    Raises ``InputError`` where there are no batches, or the model does not accept one; ``NonFiniteError`` for NaN or
    infinite values in a batch.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    count = 0
    with (
        quietly_evaluated(model),
        torch.random.fork_rng(devices=cuda),
        progress_bar(title, _length(batches)) as advance,
    ):
        for batch in batches:
            moved = _on_device(batch, device)
            args, kwargs = call_of(model, count, moved)
            with watch or contextlib.nullcontext():
                output = _called(model, count, args, kwargs)
            if use is not None:
                use(output, moved)
            count += 1
            advance()
    if not count:
        raise InputError(f"{title}: there are no batches (a generator can be used only once)")


def _called(model: nn.Module, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except UpscaleError:
        raise
    except Exception as error:
        raise InputError(f"batch {number}: the model does not accept it: {error}") from error


def _on_device(batch: Any, device: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(moved, dict(batch) if isinstance(batch, Mapping) else batch)


def _check_values(number: int, inputs: Any) -> None:
    for tensor in (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)):
        if not tensor.numel():
            raise InputError(f"batch {number} holds an empty tensor, of shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NonFiniteError(f"batch {number} holds NaN or infinite values")


def call_of(model: nn.Module, number: int, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What batch ``number`` is for ``model``: positional and keyword arguments, without labels; see :func:`feed`."""
    args, kwargs = _arguments(model, number, dict(batch) if isinstance(batch, Mapping) else batch)
    _check_values(number, (args, kwargs))
    return args, kwargs


def _arguments(model: nn.Module, number: int, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parameters = inspect.signature(model.forward).parameters.values()
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, dict):
        names = {p.name for p in parameters}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return (), {key: value for key, value in batch.items() if takes_any or key in names}
    if isinstance(batch, (tuple, list)) and batch:
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = sum(p.kind in positional and p.default is p.empty for p in parameters)
        return tuple(batch[: max(1, needed)]), {}
    raise InputError(f"batch {number} must be a tensor, a tuple or a dict, and not empty; it is {type(batch).__name__}")


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a DataLoader over a data set without a length
        return None

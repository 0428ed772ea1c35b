"""See what a model's layers read and write while it runs, wherever it calls them from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..channels import Side, channel_count
from ..errors import InputError, NonFiniteError
from ..printing import listed

__all__ = ["Watch", "as_maps", "check_reached"]

#: Parts of the names of functions in which a weight makes new channels.
_CONTRACTIONS = ("conv", "linear", "mm", "mv", "matmul", "einsum")
#: Those of them whose first argument is what the product is added to.
_ADDING = frozenset(("addmm", "addmv", "addbmm", "baddbmm"))
#: Functions that leave a channel what it is: the map that a layer writes is their result, not the layer's own.
_AFTER = frozenset(
    "batch_norm relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus hardtanh hardswish hardsigmoid "
    "sigmoid tanh clamp clip".split()
)

Note = Callable[[str, Tensor], None]


class Watch(TorchFunctionMode):
    """While it is entered, ``note(layer, map)`` is called for every call of a layer.

    ``map`` is the tensor that the layer reads, on the input side; on the output side what it writes, after the batch
    norm and the activation if nothing else reads it before them. A layer is recognised by its weight, or a weight
    computed from it, and not by its module: some models hand a layer's weight to a function themselves.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], side: Side, note: Note) -> None:
        super().__init__()
        self._side, self._note = side, note
        self._constants = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._weights = {id(layer.weight): name for name, layer in layers.items()}
        # Keyed by identity; the tensors are kept, so that no other can take their place meanwhile.
        self._computed: dict[int, tuple[str, Tensor]] = {}
        self._written: dict[int, tuple[str, Tensor]] = {}

    def __enter__(self) -> Watch:
        self._computed, self._written = {}, {}
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self._settle(list(self._written))
        self._computed, self._written = {}, {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        layer = next(filter(None, map(self._layer_of, tensors)), None)
        read = tensors[1:] if name.rstrip("_") in _ADDING else tensors
        values = [t for t in read if id(t) not in self._constants and self._layer_of(t) is None]
        follows = bool(tensors) and id(tensors[0]) in self._written and name.rstrip("_") in _AFTER
        called = layer is not None and bool(values) and any(word in name for word in _CONTRACTIONS)
        if not follows and _in_place(name):
            self._settle(map(id, tensors))  # before it is overwritten
        if called and self._side == "input":
            self._note(str(layer), values[0])
        written = self._written.pop(id(tensors[0])) if follows else None
        result = func(*args, **kwargs)
        if not isinstance(result, (Tensor, tuple, list)) or isinstance(result, torch.Size):
            return result  # a question about a shape or a type: nothing was read
        if written is not None and isinstance(result, Tensor):
            self._written[id(result)] = (written[0], result)
        else:
            self._settle(map(id, tensors))
        if called and self._side == "output" and isinstance(result, Tensor):
            self._written[id(result)] = (str(layer), result)
        elif layer is not None and not values and isinstance(result, Tensor):
            self._computed[id(result)] = (layer, result)
        return result

    def _layer_of(self, tensor: Tensor) -> str | None:
        name = self._weights.get(id(tensor))
        return name if name is not None else self._computed.get(id(tensor), (None,))[0]

    def _settle(self, keys: Iterable[int]) -> None:
        """Note the maps that are about to be read, or overwritten, by something that is no activation."""
        for key in keys:
            if key in self._written:
                self._note(*self._written.pop(key))


def _in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"


def as_maps(name: str, layer: nn.Module, side: Side, tensor: Tensor) -> Tensor | None:
    """What a layer reads or writes as (examples, channels, ...); None if its channels are not where they should be.

    Convolutions have their channels before the dimensions of space, linear layers last; the batch may be missing.
    Raises ``NonFiniteError`` for NaN and infinite values.
    """
    dim = -1 - len(getattr(layer, "kernel_size", ()))
    if tensor.ndim < -dim or tensor.shape[dim] != channel_count(layer, side):
        return None
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{name}: what it {'reads' if side == 'input' else 'writes'} is NaN or infinite somewhere")
    tensor = tensor.detach()
    whole = tensor if tensor.ndim > -dim else tensor.unsqueeze(0)
    return whole.movedim(dim, 1)


def check_reached(layers: Iterable[str], reached: Mapping[str, Any]) -> None:
    """Raises ``InputError`` that names the layers of which nothing was seen."""
    missing = [name for name in layers if name not in reached]
    if missing:
        raise InputError(
            f"the data never reaches {listed(missing)}, which therefore cannot be scored: give batches on which the "
            "model runs all of its layers, or choose a score of weights"
        )

"""Run a model once and note which layer reads what: enough for masking, without capturing a graph.

A layer is recognised by its *weight*, not by its module's ``forward``: Swin's ``qkv`` and other layers whose
weight is handed to a functional call are seen too, and so is a layer that is called twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Observation", "observe", "quietly_evaluated"]

# Operators that put several tensors side by side: a reader of the result reads each of them.
_JOINS = ("cat", "stack", "concat")
# Parts of the names of operators in which a weight makes new channels.
_CONTRACTIONS = ("conv", "mm", "linear", "mv", "embedding", "lstm", "gru", "rnn")


@dataclass(frozen=True)
class _Origin:
    """Where the values in one storage come from: the model's inputs, layers' outputs, or a layer's weight."""

    is_input: bool = False
    layers: frozenset[str] = frozenset()
    weight: str | None = None
    direct: str | None = None  # the layer that wrote this storage, nothing computed since


_CONSTANT = _Origin()


@dataclass
class Observation:
    """What one run of a model showed; names are module paths.

    ``executed``: layers that ran at all. ``input_readers``: layers that read a model input, as it is or after
    ops without a weight of their own. ``output_writers``: layers whose result reaches a model output with no
    other layer in between. ``norms``: for a layer, the batch norms that read its result with nothing between
    the two.
    """

    executed: set[str] = field(default_factory=set)
    input_readers: set[str] = field(default_factory=set)
    output_writers: set[str] = field(default_factory=set)
    norms: dict[str, set[str]] = field(default_factory=dict)


def observe(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
) -> Observation:
    """Run ``model(*args, **kwargs)`` once in eval mode and report who reads and writes what.

    ``layers`` and ``norms`` map module paths to the layers and batch norms of interest. Training flags,
    buffers and the random state are as before afterwards. Whatever the model raises on these inputs is passed
    on.
    """
    tracer = _Tracer(model, layers, norms)
    with quietly_evaluated(model), tracer.reading((args, dict(kwargs))):
        outputs = model(*args, **kwargs)
    tracer.note_outputs(outputs)
    return tracer.seen


@contextlib.contextmanager
def quietly_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; flags, buffers and random numbers are put back on the way out."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone(), _version(buffer)) for buffer in model.buffers()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer kernel would hide its layers
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, before, version in buffers:
                if version is None or _version(buffer) != version:
                    buffer.copy_(before)


def _version(buffer: Tensor) -> int | None:
    """How often a tensor was written to; None for those of ``torch.inference_mode``, which do not count."""
    return None if buffer.is_inference() else buffer._version


class _Tracer(TorchDispatchMode):
    """Keeps the origin of every storage while the model runs.

    Keyed by storage and not by tensor object, so that views and in-place ops need no care: an address that is
    freed and used again gets a new entry when the op that allocates it writes its result. Parameters are
    known by the address of their first element, because several may lie in one storage; they live as long as
    the run.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.seen = Observation()
        self._origins: dict[int, _Origin] = {}
        self._norm_weights = {_tensor_of(module).data_ptr(): name for name, module in norms.items()}
        # A matrix that belongs to no layer of interest makes channels all the same, under no name.
        self._weights = {p.data_ptr(): _Origin(weight="") for p in model.parameters() if p.ndim > 1}
        for name, module in layers.items():
            # All of a layer's matrices: its weight may be computed from others (weight norm, pruning masks).
            self._weights.update((p.data_ptr(), _Origin(weight=name)) for p in module.parameters() if p.ndim > 1)

    @contextlib.contextmanager
    def reading(self, inputs: Any) -> Iterator[None]:
        for tensor in _tensors(inputs):
            self._origins[_storage(tensor)] = _Origin(is_input=True)
        with self:
            yield

    def note_outputs(self, outputs: Any) -> None:
        for tensor in _tensors(outputs):
            self.seen.output_writers |= self._origin(tensor).layers - {""}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = list(_tensors((args, kwargs)))
        before = [self._origin(tensor) for tensor in sources]
        storages = {_storage(tensor) for tensor in sources}
        self._note_norm(func, sources, before)
        result = func(*args, **kwargs)
        origin = self._combine(func, before)
        for tensor in _tensors(result):
            is_view = _storage(tensor) in storages and not func._schema.is_mutable
            if not is_view:  # a view shows the same storage: its origin is known already
                self._origins[_storage(tensor)] = origin
        return result

    def _origin(self, tensor: Tensor) -> _Origin:
        weight = self._weights.get(tensor.data_ptr())
        return weight if weight is not None else self._origins.get(_storage(tensor), _CONSTANT)

    def _note_norm(self, func: Any, sources: list[Tensor], before: list[_Origin]) -> None:
        if "batch_norm" not in func._schema.name or not sources or before[0].direct is None:
            return
        for tensor in sources[1:]:
            norm = self._norm_weights.get(tensor.data_ptr())
            if norm is not None:
                self.seen.norms.setdefault(before[0].direct, set()).add(norm)

    def _combine(self, func: Any, before: list[_Origin]) -> _Origin:
        name = func._schema.name.split("::")[-1]
        weights = [origin.weight for origin in before if origin.weight is not None]
        moving = [origin for origin in before if origin.is_input or origin.layers]
        if weights and moving and any(word in name for word in _CONTRACTIONS):
            return self._note_layer(weights[0], moving)
        if not moving:  # computed from weights alone: a cast, a standardisation, a mask times a weight
            return _Origin(weight=weights[0]) if weights else _CONSTANT
        joins = name in _JOINS
        reads_input = any(o.is_input for o in moving) if joins else all(o.is_input for o in moving)
        layers: frozenset[str] = frozenset().union(*(o.layers for o in moving))
        return _Origin(is_input=reads_input, layers=layers)

    def _note_layer(self, layer: str, moving: Iterable[_Origin]) -> _Origin:
        if layer:
            self.seen.executed.add(layer)
            if any(origin.is_input for origin in moving):
                self.seen.input_readers.add(layer)
        return _Origin(layers=frozenset({layer}), direct=layer or None)


def _tensor_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _storage(tensor: Tensor) -> int:
    """What two tensors have in common when one is a view of the other."""
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a nest of containers (dataclasses too) that have elements and a storage."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            if leaf.layout == torch.strided and leaf.numel():
                yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(list(vars(leaf).values()))

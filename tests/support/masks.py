"""Writers of zeros that share no code with the library: what a pruner, a training run or a bug might leave behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear, nn.Embedding)
KINDS = (
    "input",
    "output",
    "output_bn",
    "both",
    "both_bn",
    "layer",
    "layer_bn",
    "single_input",
    "single_output",
    "all_but_one_input",
    "all_but_one_output",
    "parameter",
    "norm_affine",
    "norm_scale",
    "elements",
    "mixed",
)


@dataclass(frozen=True)
class Mask:
    """A mask as data: ``apply(model, inputs)`` writes the same zeros each time it is given the same model."""

    kind: str
    amount: float = 0.5
    seed: int = 0

    def apply(self, model: nn.Module, inputs: Sequence[Any] = ()) -> list[str]:
        """Write the zeros; a line for each thing zeroed. ``inputs`` are needed by the kinds ending in ``_bn``."""
        rng = random.Random(self.seed)
        with torch.no_grad():
            return _WRITERS[self.kind](model, self, rng, inputs)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer with channels; what belongs to ``nn.MultiheadAttention`` or to a recurrent layer is left out."""
    closed = [name for name, m in model.named_modules() if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))]
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and not any(name.startswith(prefix + ".") for prefix in closed):
            found[name] = module
    return found


def widths(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer; an embedding has no input channels."""
    if isinstance(layer, nn.Embedding):
        return 0, layer.embedding_dim
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels  # type: ignore[return-value]


def zero_input(layer: nn.Module, channel: int) -> None:
    """Make ``layer`` ignore its input channel ``channel``."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, TRANSPOSED):
        weight[channel] = 0
    elif groups == 1:
        weight[:, channel] = 0
    else:
        per_in, per_out = weight.shape[1], weight.shape[0] // groups
        group = channel // per_in
        weight[group * per_out : (group + 1) * per_out, channel % per_in] = 0


def zero_output(layer: nn.Module, channel: int, bias: bool = True) -> None:
    """Make ``layer`` put out zero (or, without ``bias``, its bias) at output channel ``channel``."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, nn.Embedding):
        weight[:, channel] = 0
    elif isinstance(layer, TRANSPOSED):
        groups = layer.groups
        per_in, per_out = weight.shape[0] // groups, weight.shape[1]
        group = channel // per_out
        weight[group * per_in : (group + 1) * per_in, channel % per_out] = 0
    else:
        weight[channel] = 0
    if bias and isinstance(getattr(layer, "bias", None), torch.Tensor):
        layer.bias[channel] = 0  # type: ignore[index,operator]


def following_norms(model: nn.Module, inputs: Sequence[Any]) -> dict[str, nn.Module]:
    """Layer name -> the batch norm that reads that layer's output tensor itself, found by running the model once."""
    source: dict[int, str] = {}
    found: dict[str, nn.Module] = {}
    keep: list[torch.Tensor] = []  # an id is only an identity while the tensor lives
    handles = []
    for name, module in layers(model).items():

        def produced(_module: nn.Module, _args: Any, output: torch.Tensor, name: str = name) -> None:
            source[id(output)] = name
            keep.append(output)

        handles.append(module.register_forward_hook(produced))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def read(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                if id(args[0]) in source:
                    found.setdefault(source[id(args[0])], module)

            handles.append(module.register_forward_pre_hook(read))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def some(rng: random.Random, count: int, amount: float, leave: int = 1) -> list[int]:
    """At least one, at most ``count - leave`` of ``count`` indices, about ``amount`` of them."""
    wanted = min(max(1, round(count * amount)), count - leave)
    return sorted(rng.sample(range(count), wanted)) if wanted > 0 else []


Writer = Callable[[nn.Module, Mask, random.Random, Sequence[Any]], list[str]]


def _inputs(model: nn.Module, mask: Mask, rng: random.Random, _inputs: Sequence[Any]) -> list[str]:
    log = []
    for name, layer in layers(model).items():
        chosen = some(rng, widths(layer)[0], mask.amount * rng.choice([0.5, 1, 1]))
        for channel in chosen:
            zero_input(layer, channel)
        log += [f"{name} in {chosen}"] if chosen else []
    return log


def _outputs(model: nn.Module, mask: Mask, rng: random.Random, inputs: Sequence[Any], norms: bool = False) -> list[str]:
    following = following_norms(model, inputs) if norms else {}
    log = []
    for name, layer in list(layers(model).items())[:-1]:
        chosen = some(rng, widths(layer)[1], mask.amount * rng.choice([0.5, 1, 1]))
        bias = norms or rng.random() < 0.7
        for channel in chosen:
            zero_output(layer, channel, bias)
            if name in following and following[name].weight is not None:
                following[name].weight[channel] = 0  # type: ignore[index,operator]
                following[name].bias[channel] = 0  # type: ignore[index,operator]
        log += [f"{name} out {chosen} bias={bias} norm={name in following}"] if chosen else []
    return log


def _both(model: nn.Module, mask: Mask, rng: random.Random, inputs: Sequence[Any], norms: bool = False) -> list[str]:
    return _inputs(model, mask, rng, inputs) + _outputs(model, mask, rng, inputs, norms)


def _layer(model: nn.Module, mask: Mask, rng: random.Random, inputs: Sequence[Any], norms: bool = False) -> list[str]:
    """One or two whole layers are zero: weight, most often bias, and the norm behind it."""
    following = following_norms(model, inputs) if norms else {}
    names = list(layers(model))
    log = []
    for name in rng.sample(names, min(len(names), rng.choice([1, 1, 2]))):
        layer = layers(model)[name]
        bias = rng.random() < 0.6
        for channel in range(widths(layer)[1]):
            zero_output(layer, channel, bias)
        if name in following and following[name].weight is not None:
            following[name].weight.zero_()  # type: ignore[operator,union-attr]
            following[name].bias.zero_()  # type: ignore[operator,union-attr]
        log.append(f"{name} wholly, bias={bias}")
    return log


def _single(model: nn.Module, _mask: Mask, rng: random.Random, side: int) -> list[str]:
    names = [name for name, layer in layers(model).items() if widths(layer)[side] > 1]
    if not names:
        return []
    name = rng.choice(names)
    layer = layers(model)[name]
    channel = rng.randrange(widths(layer)[side])
    (zero_output if side else zero_input)(layer, channel)
    return [f"{name} {'out' if side else 'in'} {channel}"]


def _all_but_one(model: nn.Module, mask: Mask, rng: random.Random, side: int) -> list[str]:
    """Some layers keep exactly one channel of one side."""
    log = []
    named = list(layers(model).items())
    for name, layer in named[:-1] if side else named:
        if rng.random() < mask.amount:
            chosen = some(rng, widths(layer)[side], 1.0)
            for channel in chosen:
                (zero_output if side else zero_input)(layer, channel)
            log += [f"{name} {'out' if side else 'in'} all but one"] if chosen else []
    return log


def _parameter(model: nn.Module, mask: Mask, rng: random.Random, _inputs: Sequence[Any]) -> list[str]:
    """Whole slices of any parameter along any dimension, whoever uses it: free parameters and norms included."""
    closed = [name for name, m in model.named_modules() if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))]
    log = []
    for name, parameter in model.named_parameters():
        if any(name.startswith(prefix + ".") for prefix in closed) or not parameter.dim() or rng.random() < 0.4:
            continue
        dims = [dim for dim in range(min(2, parameter.dim())) if parameter.shape[dim] > 1]
        if dims:
            dim = rng.choice(dims)
            chosen = some(rng, parameter.shape[dim], mask.amount)
            parameter.index_fill_(dim, torch.tensor(chosen), 0.0)
            log.append(f"{name} dim {dim} {chosen}")
    return log


def _norms(model: nn.Module, mask: Mask, rng: random.Random, shift: bool) -> list[str]:
    log = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, torch.Tensor) and weight.dim() == 1:
            chosen = some(rng, len(weight), mask.amount)
            weight[chosen] = 0
            if shift:
                module.bias[chosen] = 0  # type: ignore[index,operator]
            log.append(f"{name} {chosen}")
    return log


def _elements(model: nn.Module, mask: Mask, rng: random.Random, inputs: Sequence[Any]) -> list[str]:
    """Unstructured zeros that look like channels and are not, beside a few that are."""
    generator = torch.Generator().manual_seed(mask.seed)
    for layer in layers(model).values():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        weight.mul_((torch.rand(weight.shape, generator=generator) > 0.6).to(weight.dtype))
    return _single(model, mask, rng, 0) + _single(model, mask, rng, 1)


def _mixed(model: nn.Module, mask: Mask, rng: random.Random, inputs: Sequence[Any]) -> list[str]:
    log = []
    for kind in rng.sample(["input", "output", "output_bn", "single_input", "norm_scale", "parameter"], 2):
        log += _WRITERS[kind](model, mask, rng, inputs)
    return log


_WRITERS: dict[str, Writer] = {
    "input": _inputs,
    "output": _outputs,
    "output_bn": lambda m, k, r, x: _outputs(m, k, r, x, norms=True),
    "both": _both,
    "both_bn": lambda m, k, r, x: _both(m, k, r, x, norms=True),
    "layer": _layer,
    "layer_bn": lambda m, k, r, x: _layer(m, k, r, x, norms=True),
    "single_input": lambda m, k, r, x: _single(m, k, r, 0),
    "single_output": lambda m, k, r, x: _single(m, k, r, 1),
    "all_but_one_input": lambda m, k, r, x: _all_but_one(m, k, r, 0),
    "all_but_one_output": lambda m, k, r, x: _all_but_one(m, k, r, 1),
    "parameter": _parameter,
    "norm_affine": lambda m, k, r, x: _norms(m, k, r, True),
    "norm_scale": lambda m, k, r, x: _norms(m, k, r, False),
    "elements": _elements,
    "mixed": _mixed,
}


def zero_channels(model: nn.Module) -> int:
    """How many input or output channels of the model's layers are zero throughout (weights only)."""
    total = 0
    for layer in layers(model).values():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        for dim in (0, 1):
            if not (isinstance(layer, nn.Embedding) and dim == 0):
                total += int((weight.transpose(0, dim).flatten(1) == 0).all(1).sum())
    return total


def removable(model: nn.Module, inputs: Sequence[Any]) -> int:
    """Zero input channels of the layers that run and do not read a model input itself: these can surely be removed."""
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, torch.Tensor)}
    running: set[nn.Module] = set()
    handles = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].untyped_storage().data_ptr() not in given:
            running.add(module)

    for layer in layers(model).values():
        if not isinstance(layer, nn.Embedding) and getattr(layer, "groups", 1) == 1:
            handles.append(layer.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    total = 0
    for layer in running:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        dim = 0 if isinstance(layer, TRANSPOSED) else 1
        total += int((weight.transpose(0, dim).flatten(1) == 0).all(1).sum())
    return total

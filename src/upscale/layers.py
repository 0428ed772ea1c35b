"""Which calls of a program are ordinary ``torch.nn`` layers, and how to build these from the program's tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from upscale.aliases import argument
from upscale.idle import is_frozen_norm

_aten = torch.ops.aten


@dataclass(frozen=True)
class LayerCall:
    """A call that a layer can make: its class, constructor options, tensors by attribute, and the data input."""

    kind: type[nn.Module]
    options: tuple[tuple[str, Any], ...]
    slots: tuple[tuple[str, str], ...]  # attribute -> name in Program.tensors
    source: fx.Node

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that one layer object can make."""
        return self.kind, self.options, self.slots


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _spread(value: Any, dims: int) -> Any:
    """ATen accepts one number for all dimensions; layers print a tuple."""
    if isinstance(value, str):
        return value
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value * dims if len(value) == 1 else value


Shapes = Callable[[Any], "torch.Tensor | None"]  # get_attr node or None -> tensor


def _convolution(node: fx.Node, tensor: Shapes, original: nn.Module | None) -> tuple[type[nn.Module], dict[str, Any]]:
    weight = tensor(argument(node, "weight"))
    assert weight is not None
    dims, groups = weight.dim() - 2, argument(node, "groups")
    transposed = "transpose" in str(node.target)
    options: dict[str, Any] = {
        "in_channels": weight.shape[0] if transposed else weight.shape[1] * groups,
        "out_channels": weight.shape[1] * groups if transposed else weight.shape[0],
        "kernel_size": tuple(weight.shape[2:]),
        "groups": groups,
        "bias": argument(node, "bias") is not None,
    }
    for name in ("stride", "padding", "dilation"):
        options[name] = _spread(argument(node, name), dims)
    if transposed:
        options["output_padding"] = _spread(argument(node, "output_padding"), dims)
    family = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else _CONVOLUTIONS
    return family[dims - 1], options


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _linear(node: fx.Node, tensor: Shapes, original: nn.Module | None) -> tuple[type[nn.Module], dict[str, Any]] | None:
    weight = tensor(argument(node, "weight"))
    if weight is None or weight.dim() != 2:
        return None
    attention = nn.modules.linear.NonDynamicallyQuantizableLinear  # nn.MultiheadAttention's own kind
    kind = attention if type(original) is attention else nn.Linear
    return kind, {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": argument(node, "bias") is not None,
    }


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _statistics_norm(
    node: fx.Node, tensor: Shapes, original: nn.Module | None
) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """Batch and instance norm; their dimension and momentum are the original module's."""
    kind = next((k for k in _NORMS if isinstance(original, k)), None)
    if isinstance(original, nn.SyncBatchNorm):
        kind = nn.BatchNorm2d
    batch = node.target is _aten.batch_norm.default
    if kind is None or kind.__name__.startswith("Batch") is not batch:
        return None
    if is_frozen_norm(original):
        return None  # a call stays frozen, a layer would not
    mean = tensor(argument(node, "running_mean"))
    weight, bias = tensor(argument(node, "weight")), tensor(argument(node, "bias"))
    live = argument(node, "training" if batch else "use_input_stats")
    if live is not (mean is None) or (weight is None and bias is not None):
        return None  # statistics are tracked but not used, or the other way round: no layer does that in eval mode
    size = mean if mean is not None else weight
    assert size is not None
    bias_option = {} if weight is None or bias is not None else {"bias": False}
    return kind, bias_option | {
        "num_features": size.numel(),
        "eps": argument(node, "eps"),
        "momentum": original.momentum,  # type: ignore[union-attr]
        "affine": weight is not None,
        "track_running_stats": mean is not None,
    }


def _layer_norm(node: fx.Node, tensor: Shapes, original: nn.Module | None) -> tuple[type[nn.Module], dict[str, Any]]:
    return nn.LayerNorm, {
        "normalized_shape": _frozen(argument(node, "normalized_shape")),
        "eps": argument(node, "eps"),
        "bias": argument(node, "bias") is not None,
    }


def _rms_norm(node: fx.Node, tensor: Shapes, original: nn.Module | None) -> tuple[type[nn.Module], dict[str, Any]]:
    return nn.RMSNorm, {
        "normalized_shape": _frozen(argument(node, "normalized_shape")),
        "eps": argument(node, "eps"),
    }


def _group_norm(
    node: fx.Node, tensor: Shapes, original: nn.Module | None
) -> tuple[type[nn.Module], dict[str, Any]] | None:
    weight = tensor(argument(node, "weight"))
    if weight is None or argument(node, "bias") is None:
        return None
    groups = argument(node, "num_groups")
    return nn.GroupNorm, {"num_groups": groups, "num_channels": weight.numel(), "eps": argument(node, "eps")}


def _embedding(node: fx.Node, tensor: Shapes, original: nn.Module | None) -> tuple[type[nn.Module], dict[str, Any]]:
    weight = tensor(argument(node, "weight"))
    assert weight is not None
    padding = argument(node, "padding_idx")
    return nn.Embedding, {
        "num_embeddings": weight.shape[0],
        "embedding_dim": weight.shape[1],
        "padding_idx": None if padding < 0 else padding,
        "scale_grad_by_freq": argument(node, "scale_grad_by_freq"),
        "sparse": argument(node, "sparse"),
    }


def _prelu(node: fx.Node, tensor: Shapes, original: nn.Module | None) -> tuple[type[nn.Module], dict[str, Any]] | None:
    weight = tensor(argument(node, "weight"))
    return (nn.PReLU, {"num_parameters": weight.numel()}) if weight is not None and weight.dim() == 1 else None


_AFFINE = ("weight", "bias")
_STATISTICS = ("weight", "bias", "running_mean", "running_var")
_Rule = Callable[[fx.Node, Shapes, "nn.Module | None"], "tuple[type[nn.Module], dict[str, Any]] | None"]
_RULES: dict[Any, tuple[_Rule, str, tuple[str, ...]]] = {
    **{getattr(_aten, f"conv{d}d").default: (_convolution, "input", _AFFINE) for d in (1, 2, 3)},
    **{getattr(_aten, f"conv{d}d").padding: (_convolution, "input", _AFFINE) for d in (1, 2, 3)},
    _aten.conv_transpose1d.default: (_convolution, "input", _AFFINE),
    _aten.conv_transpose2d.input: (_convolution, "input", _AFFINE),
    _aten.conv_transpose3d.input: (_convolution, "input", _AFFINE),
    _aten.linear.default: (_linear, "input", _AFFINE),
    _aten.batch_norm.default: (_statistics_norm, "input", _STATISTICS),
    _aten.instance_norm.default: (_statistics_norm, "input", _STATISTICS),
    _aten.layer_norm.default: (_layer_norm, "input", _AFFINE),
    _aten.group_norm.default: (_group_norm, "input", _AFFINE),
    _aten.rms_norm.default: (_rms_norm, "input", ("weight",)),
    _aten.embedding.default: (_embedding, "indices", ("weight",)),
    _aten.prelu.default: (_prelu, "self", ("weight",)),
}


def may_be_layer(node: fx.Node) -> bool:
    """True for the operators that have a layer with parameters."""
    return node.target in _RULES


def slot_nodes(node: fx.Node) -> dict[str, Any]:
    """The tensor arguments of a layer operator by attribute name, those that are given."""
    _, _, slots = _RULES[node.target]
    found = {slot: argument(node, slot) for slot in slots}
    return {slot: value for slot, value in found.items() if value is not None}


def layer_call(node: fx.Node, tensors: Mapping[str, torch.Tensor], original: nn.Module | None) -> LayerCall | None:
    """How a layer would make this call; None where none can. All its tensors must be ``get_attr`` nodes."""
    rule, data, _ = _RULES[node.target]
    slots = slot_nodes(node)
    source = argument(node, data)
    if not slots or not isinstance(source, fx.Node):
        return None
    if any(not isinstance(value, fx.Node) or value.op != "get_attr" for value in slots.values()):
        return None

    def tensor(value: Any) -> torch.Tensor | None:
        return tensors[str(value.target)] if isinstance(value, fx.Node) else None

    if "weight" not in slots and node.target not in (_aten.batch_norm.default, _aten.instance_norm.default):
        return None
    made = rule(node, tensor, original)
    if made is None or any(isinstance(v, fx.Node) for v in made[1].values()):
        return None
    kind, options = made
    names = tuple((slot, str(value.target)) for slot, value in slots.items())
    return LayerCall(kind, tuple(sorted(options.items())), names, source)


def build_layer(call: LayerCall, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The layer itself, holding exactly ``tensors`` (Parameters for parameters) by attribute name."""
    layer = call.kind(**dict(call.options), device="meta")
    for name in list(layer._parameters):
        layer._parameters[name] = tensors.get(name)  # type: ignore[assignment]
    for name in list(layer._buffers):
        layer._buffers[name] = tensors.get(name)
    return layer.eval()


#: Parameterless ``torch.nn`` layers that can be emitted as they are, with the operators their ``forward`` may be.
PLAIN_LAYERS: dict[type[nn.Module], set[str]] = {
    **{
        getattr(nn, f"{kind}Pool{d}d"): {f"{op}_pool{d}d"}
        for kind, op in (("Max", "max"), ("Avg", "avg"))
        for d in (1, 2, 3)
    },
    **{getattr(nn, f"AdaptiveAvgPool{d}d"): {f"adaptive_avg_pool{d}d"} for d in (1, 2, 3)},
    **{
        getattr(nn, f"{kind}Pad{d}d"): {"pad", "constant_pad_nd"}
        for kind in ("Zero", "Reflection", "Replication", "Constant")
        for d in (1, 2, 3)
    },
    **{kind: {"dropout"} for kind in (nn.Dropout,)},
    **{kind: {"feature_dropout"} for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    nn.AlphaDropout: {"alpha_dropout"},
    nn.FeatureAlphaDropout: {"feature_alpha_dropout"},
    nn.ReLU: {"relu"},
    nn.ReLU6: {"relu6", "hardtanh"},
    nn.LeakyReLU: {"leaky_relu"},
    nn.ELU: {"elu"},
    nn.CELU: {"celu"},
    nn.SELU: {"selu"},
    nn.GELU: {"gelu"},
    nn.SiLU: {"silu"},
    nn.Mish: {"mish"},
    nn.Hardswish: {"hardswish"},
    nn.Hardsigmoid: {"hardsigmoid"},
    nn.Hardtanh: {"hardtanh"},
    nn.Sigmoid: {"sigmoid"},
    nn.Tanh: {"tanh"},
    nn.LogSigmoid: {"log_sigmoid"},
    nn.Softplus: {"softplus"},
    nn.Threshold: {"threshold"},
    nn.Softmax: {"softmax"},
    nn.LogSoftmax: {"log_softmax"},
    nn.Flatten: {"flatten"},
    nn.Unflatten: {"unflatten"},
    nn.GLU: {"glu"},
    nn.PixelShuffle: {"pixel_shuffle"},
    nn.PixelUnshuffle: {"pixel_unshuffle"},
    nn.ChannelShuffle: {"channel_shuffle", "native_channel_shuffle"},
    nn.Upsample: {
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
    },
    nn.Unfold: {"im2col"},
    nn.Fold: {"col2im"},
}
PLAIN_LAYERS[nn.UpsamplingNearest2d] = PLAIN_LAYERS[nn.UpsamplingBilinear2d] = PLAIN_LAYERS[nn.Upsample]


def is_plain(module: nn.Module | None) -> bool:
    """True for a layer of torch's own without parameters, buffers and children: safe to copy by configuration."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules"):
        return False
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Module)
    if type(module) in containers or module._modules:
        return False
    tensors = (*module._parameters.values(), *module._buffers.values())
    return all(tensor is None for tensor in tensors)


def clone_plain(module: nn.Module) -> nn.Module:
    """The same layer without hooks, in eval mode."""
    clone = type(module).__new__(type(module))
    nn.Module.__init__(clone)
    own = set(clone.__dict__)
    for name, value in module.__dict__.items():
        if name not in own:
            clone.__dict__[name] = copy.copy(value)
    for registry in ("_parameters", "_buffers"):
        for name in getattr(module, registry):
            getattr(clone, registry)[name] = None
    return clone.eval()

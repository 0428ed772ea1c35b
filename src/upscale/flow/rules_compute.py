"""Rules for operators with weights: producers, depthwise convolutions, normalisations."""

from __future__ import annotations

import torch
from torch.fx import Node

from .effects import Barrier, ConstantRule, Constants, Contract, Effect, Mixing, Op, PerChannel, Pointwise
from .evaluate import affine, evaluate, zero_only
from .registry import names, rule


def _pads(op: Op) -> bool:
    """Whether a convolution pads, so that its border sees fewer taps than its middle."""
    padding = op["padding"]
    if isinstance(padding, str):
        return padding != "valid"
    return any(p != 0 for p in (padding if isinstance(padding, (list, tuple)) else [padding]))


@rule(*names("aten", "conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding"))
def convolution(op: Op) -> Effect:
    x, weight, groups = op["input"], op["weight"], op["groups"]
    shape = op.shape(weight)
    channel = op.rank(x) - len(shape) + 1  # 0 for an unbatched input
    if groups > 1 and groups == shape[0] and shape[1] == 1:
        return _depthwise(op, channel)
    return Contract(x, channel, channel, weight, 1, 0, op["bias"], exact=not _pads(op), groups=groups)


def _depthwise(op: Op, channel: int) -> Effect:
    weight, bias = op["weight"], op["bias"]
    slices = ((weight, 0),) if bias is None else ((weight, 0), (bias, 0))
    w = op.value_of(weight)
    constant: ConstantRule | None = None
    if w is not None:
        b = op.value_of(bias) if bias is not None else None
        shift = torch.zeros(len(w), dtype=w.dtype) if b is None else b.detach().cpu()
        rows = w.detach().flatten(1).cpu()
        blocked = (rows == 0).all(1)
        constant = zero_only(shift, blocked) if _pads(op) else affine(rows.sum(1), shift, blocked)
    return PerChannel(op["input"], channel, channel, slices, constant, groups_arg="groups")


@rule(*names("aten", "conv_transpose1d conv_transpose2d.input conv_transpose3d.input"))
def transposed_convolution(op: Op) -> Effect:
    # A constant does not stay constant (kernel 3, stride 2 gives c, 2c, 4c): only zeros may be folded.
    x, weight = op["input"], op["weight"]
    channel = op.rank(x) - len(op.shape(weight)) + 1
    return Contract(x, channel, channel, weight, 0, 1, op["bias"], exact=False, groups=op["groups"])


@rule("aten.linear.default")
def linear(op: Op) -> Effect:
    x, weight = op["input"], op["weight"]
    if len(op.shape(weight)) != 2:
        return Barrier("linear with a weight that is not a matrix", op.tensors)
    return Contract(x, op.rank(x) - 1, len(op.shape()) - 1, weight, 1, 0, op["bias"], exact=True)


@rule("aten.embedding.default")
def embedding(op: Op) -> Effect:
    return Contract(None, None, len(op.shape()) - 1, op["weight"], None, 1, None, exact=True)


@rule("aten.batch_norm.default")
def batch_norm(op: Op) -> Effect:
    x, names_ = op["input"], ("weight", "bias", "running_mean", "running_var")
    slices = tuple((op[n], 0) for n in names_ if op[n] is not None)
    if op["training"] or op["running_mean"] is None:
        return PerChannel(x, 1, 1, slices)  # computes its statistics from the data: nothing is constant
    mean, var = op.value_of(op["running_mean"]), op.value_of(op["running_var"])
    gamma = op.value_of(op["weight"]) if op["weight"] is not None else None
    beta = op.value_of(op["bias"]) if op["bias"] is not None else None
    if mean is None or var is None:
        return PerChannel(x, 1, 1, slices)
    scale = torch.rsqrt(var.detach().cpu() + op["eps"])
    scale = scale if gamma is None else scale * gamma.detach().cpu()
    shift = -mean.detach().cpu() * scale
    shift = shift if beta is None else shift + beta.detach().cpu()
    return PerChannel(x, 1, 1, slices, affine(scale, shift, scale == 0))


@rule("aten.instance_norm.default")
def instance_norm(op: Op) -> Effect:
    names_ = ("weight", "bias", "running_mean", "running_var")
    return PerChannel(op["input"], 1, 1, tuple((op[n], 0) for n in names_ if op[n] is not None))


@rule(*names("aten", "layer_norm rms_norm"))
def layer_norm(op: Op) -> Effect:
    x, count = op["input"], len(op["normalized_shape"])
    channels = op.channels_of(x)
    first = op.rank(x) - count
    params = [op[n] for n in ("weight", "bias") if op.args.get(n) is not None]
    if channels is None or channels.dim < first:
        # normalises within a channel; without channels there is nothing to permute either
        dim = 1 if channels is None else channels.dim
        return PerChannel(x, dim, dim)
    return Mixing(x, channels.dim, tuple((p, channels.dim - first) for p in params))


@rule("aten.group_norm.default")
def group_norm(op: Op) -> Effect:
    params = [op[n] for n in ("weight", "bias") if op[n] is not None]
    if op["num_groups"] == op.shape(op["input"])[1]:  # one channel a group: no channel sees another
        return PerChannel(op["input"], 1, 1, tuple((p, 0) for p in params), groups_arg="num_groups")
    return Mixing(op["input"], 1, tuple((p, 0) for p in params), ordered=True)


@rule(*names("aten", "softmax.int log_softmax.int _softmax _log_softmax"))
def softmax(op: Op) -> Effect:
    x = op.operand
    dim = op["dim"] % max(op.rank(x), 1)
    channels = op.channels_of(x)
    if channels is not None and channels.dim == dim:
        return Mixing(x, dim)
    own = dim if channels is None else channels.dim
    return PerChannel(x, own, own)


@rule("aten.prelu.default")
def prelu(op: Op) -> Effect:
    x, weight = op["self"], op["weight"]
    if op.shape(weight) in ((), (1,)):
        return PerChannel(x, _channel_of(op, x), _channel_of(op, x))
    dim = 1 if op.rank(x) > 1 else 0
    slope = op.value_of(weight)

    def constant(operands: list[Constants | None]) -> Constants | None:
        c = operands[0]
        if c is None or slope is None:
            return None
        return Constants(c.known, torch.where(c.value > 0, c.value, c.value * slope.detach().cpu()))

    return PerChannel(x, dim, dim, ((weight, 0),), constant)


def _channel_of(op: Op, x: Node) -> int:
    channels = op.channels_of(x)
    return 1 if channels is None else channels.dim


@rule(*names("aten", "dropout feature_dropout alpha_dropout feature_alpha_dropout"))
def dropout(op: Op) -> Effect:
    return Pointwise((op["input"],), None if op["train"] else evaluate(op))

"""Rules for operators that work inside a channel: pooling, resampling, reductions, padding, products."""

from __future__ import annotations

import torch

from .effects import Barrier, ConstantRule, Effect, Op, Pad, PerChannel, Pointwise
from .evaluate import evaluate, keep, product, zero_only
from .registry import names, rule


def _inside(op: Op, spatial: int, constant: ConstantRule | None) -> Effect:
    x = op.operand
    channel = op.rank(x) - spatial - 1
    return PerChannel(x, channel, channel, (), constant)


def _zero_stays_zero(op: Op) -> ConstantRule:
    size = op.shape()[op.rank(op.node) - _spatial(op) - 1]
    val = op.node.meta["val"]
    return zero_only(torch.zeros(size, dtype=val.dtype), torch.zeros(size, dtype=torch.bool))


def _spatial(op: Op) -> int:
    return next(int(c) for c in op.name if c.isdigit())  # aten.max_pool2d.default -> 2


@rule(*names("aten", "max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"))
def pool(op: Op) -> Effect:
    # The padding of max pooling is minus infinity and never wins: a constant stays what it is.
    return _inside(op, _spatial(op), keep)


@rule(*names("aten", "avg_pool1d avg_pool2d avg_pool3d"))
def average_pool(op: Op) -> Effect:
    padded = any(p != 0 for p in op["padding"]) and op["count_include_pad"]
    exact = not padded and op.args.get("divisor_override") is None
    return _inside(op, _spatial(op), keep if exact else _zero_stays_zero(op))


@rule(
    *names(
        "aten",
        "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d.vec "
        "upsample_bilinear2d.vec upsample_trilinear3d.vec upsample_bicubic2d.vec "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
        "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec",
    )
)
def resample(op: Op) -> Effect:
    return _inside(op, _spatial(op), keep)


@rule(
    *names(
        "aten",
        "mean.dim amax amin sum.dim_IntList var.correction std.correction var.dim std.dim logsumexp prod.dim_int "
        "linalg_vector_norm norm.ScalarOpt_dim any.dim all.dim",
    )
)
def reduce(op: Op) -> Effect:
    x = op.operand
    rank, dims = op.rank(x), op["dim"]
    dims = [dims] if isinstance(dims, int) else (list(range(rank)) if dims is None or len(dims) == 0 else dims)
    reduced = sorted({d % rank for d in dims}) if rank else []
    channels = op.channels_of(x)
    if channels is None or channels.dim in reduced:
        return Barrier("reduction over channels", op.tensors, ordered=False, silent=True)
    out = channels.dim if op["keepdim"] else channels.dim - sum(d < channels.dim for d in reduced)
    kind = op.name.split(".")[1]
    constant: ConstantRule | None = keep if kind in ("mean", "amax", "amin") else None
    return PerChannel(x, channels.dim, out, (), constant)


@rule(*names("aten", "mean sum max min all any"))
def reduce_everything(op: Op) -> Effect:
    return Barrier("reduction over everything", op.tensors, ordered=False, silent=True)


@rule(*names("aten", "constant_pad_nd pad"))
def pad(op: Op) -> Effect:
    x, widths = op["self"], op["pad"]
    mode = op.args.get("mode", "constant")
    rank = op.rank(x)
    before, after = [0] * rank, [0] * rank
    if not all(isinstance(w, int) for w in widths):
        return Barrier("padding by a symbolic width", op.tensors)
    for i in range(len(widths) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    if mode != "constant":
        channels = op.channels_of(x)
        if channels is None or before[channels.dim] or after[channels.dim]:
            return Barrier(f"{mode} padding over channels", op.tensors)
        return PerChannel(x, channels.dim, channels.dim, (), keep)
    return Pad(x, tuple(before), tuple(after), float(op["value"] or 0.0))


@rule(
    *names(
        "aten",
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
    )
)
def mirror(op: Op) -> Effect:
    return _inside(op, _spatial(op), keep)


@rule(
    *names(
        "aten",
        # pointwise operators that torch does not tag as such
        "hardswish hardsigmoid hardtanh relu6 celu selu softshrink hardshrink threshold logit masked_fill.Scalar "
        "masked_fill.Tensor where.self where.ScalarOther where.ScalarSelf where.Scalar floor_divide",
    )
)
def pointwise(op: Op) -> Effect:
    return Pointwise(op.tensors, evaluate(op))


@rule(*names("aten", "mul.Tensor"))
def multiply(op: Op) -> Effect:
    return Pointwise(op.tensors, product(op))


@rule(*names("aten", "bernoulli rand_like randn_like native_dropout rrelu"))
def random(op: Op) -> Effect:
    return Barrier("random numbers", op.tensors)

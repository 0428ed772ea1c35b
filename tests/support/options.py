"""The blocks of the random networks by name, and what each of their options may be: plain data, so that specs print."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from support import blocks as b
from support import blocks_more as m
from support.parts import COMMON_ACTS, NORM_NAMES, ODD_ACTS, ZERO_ACTS

ANY_ACT = ZERO_ACTS + ODD_ACTS
_SEEN_NORMS = ("bn", "bn", "bn", "none", *NORM_NAMES)
MODES = ("zeros", "zeros", "circular", "reflect", "replicate")
# block name -> (class, what each option may be). Everything here is plain data, so that a spec can be pasted.
BLOCKS: dict[str, tuple[Callable[..., nn.Module], dict[str, tuple[Any, ...]]]] = {
    "ConvNorm": (
        b.ConvNorm,
        {
            "out": (2, 5, 6),
            "kernel": (1, 3),
            "stride": (1, 1, 2),
            "mode": MODES,
            "bias": (True, False),
            "normal": _SEEN_NORMS,
            "act": ANY_ACT,
            "order": ("cna", "cna", "can", "nac", "anc"),
            "dilation": (1, 1, 2),
        },
    ),
    "Residual": (
        b.Residual,
        {
            "kind": ("basic", "bottleneck", "preact"),
            "shortcut": ("conv", "pad", "pool"),
            "stride": (1, 1, 2),
            "grow": (0, 0, 2, 3),
            "act": COMMON_ACTS + ("sigmoid", "softplus"),
            "inplace": (True, False),
            "normal": ("bn", "bn", "bn", "none", "gn1", "in", "frozen"),
            "last": (True, False),
            "flip": (False, True),
        },
    ),
    "Dense": (
        b.Dense,
        {
            "growth": (2, 3),
            "layers": (2, 3),
            "bottleneck": (False, True),
            "front": (False, True),
            "style": ("list", "running"),
            "transition": (True, False),
        },
    ),
    "Inception": (
        b.Inception,
        {
            "pool": ("max", "avg", "avg_exclude"),
            "act": ("relu_", "relu", "sigmoid", "hardswish_"),
            "nested": (False, True),
        },
    ),
    "ShuffleUnit": (
        b.ShuffleUnit,
        {
            "split": ("chunk", "split", "slice", "every"),
            "style": ("view", "reshape", "stack", "flatten"),
            "groups": (2,),
            "wide": (False, True),
        },
    ),
    "SqueezeExcite": (
        b.SqueezeExcite,
        {
            "by": ("conv", "linear"),
            "gate": ("sigmoid", "hardsigmoid", "plus1", "tanh"),
            "act": ("relu", "silu", "relu6_"),
            "residual": (False, True),
            "form": ("mul", "expand", "blend"),
            "squeeze": (1, 2, 4),
        },
    ),
    "Depthwise": (
        b.Depthwise,
        {
            "multiplier": (1, 1, 2),
            "stride": (1, 2),
            "act": ANY_ACT,
            "mode": MODES,
            "out": (3, 6),
            "twice": (False, True),
            "bias": (True, False),
            "normal": ("bn", "bn", "none", "in", "gn1"),
        },
    ),
    "Inverted": (
        b.Inverted,
        {
            "stride": (1, 1, 2),
            "expand": (1, 2, 3),
            "se": ("none", "sigmoid", "hardsigmoid"),
            "act": ("hardswish_", "relu6_", "silu_"),
            "grow": (0, 2),
        },
    ),
    "UNet": (
        b.UNet,
        {
            "down": ("max", "avg", "conv", "ceil"),
            "up": ("transposed", "transposed3", "transposed_dw", "nearest", "bilinear"),
            "skip": ("cat", "add"),
            "deep": (False, True),
            "act": ("relu", "silu", "sigmoid"),
        },
    ),
    "TokenMixer": (
        m.TokenMixer,
        {
            "act": ("gelu", "relu", "sigmoid", "silu"),
            "scale": (False, True),
            "cls": ("none", "drop", "gate"),
            "mix": (True, False),
        },
    ),
    "ConvNeXt": (
        m.ConvNeXt,
        {"kernel": (3, 5), "scale": ("last", "first", "scalar"), "act": ("gelu", "relu", "sigmoid")},
    ),
    "Attention": (
        m.Attention,
        {"kind": ("sdpa", "module", "separate", "chunk", "explicit"), "prenorm": (True, False), "heads": (1, 2)},
    ),
    "Glu": (m.Glu, {"kind": ("chunk", "glu", "slice", "narrow", "unbind"), "out": (3, 4), "kernel": (1, 3)}),
    "Slices": (
        m.Slices,
        {
            "kind": (
                "halves",
                "partial",
                "roll",
                "roll_spatial",
                "flip",
                "index",
                "advanced",
                "select",
                "write",
                "write_const",
                "shift",
                "stack",
                "stack_flat",
                "repeat",
                "interleave",
            ),
            "at": (1, 2, 3),
            "act": ("relu", "silu", "sigmoid", "plus1"),
        },
    ),
    "Space": (m.Space, {"kind": ("shuffle", "unshuffle", "views", "merge"), "act": ("relu", "gelu", "sigmoid")}),
    "Context": (
        m.Context,
        {
            "kind": (
                "expand",
                "spatial",
                "amax",
                "logit",
                "softmax_space",
                "vector",
                "scalar",
                "buffer",
                "product",
                "normalise",
                "cumsum",
                "var",
                "lerp",
                "sub_mean",
                "addcmul",
            ),
            "act": ("sigmoid", "relu", "silu", "plus1"),
        },
    ),
    "Sharing": (
        m.Sharing,
        {
            "kind": (
                "twice",
                "twice_residual",
                "siamese",
                "tied",
                "tied_all",
                "functional",
                "transpose",
                "matmul",
                "einsum",
                "penalty",
                "crossed",
            ),
            "act": ("relu", "silu", "sigmoid"),
            "bias": (True, False),
        },
    ),
    "Padding": (
        m.Padding,
        {
            "kind": (
                "value",
                "zero",
                "reflect",
                "circular",
                "channel_value",
                "channel_crop",
                "avg_include",
                "avg_exclude",
                "avg_ceil",
                "avg_divisor",
                "avg_divisor_ceil",
                "max_pad",
                "max_dilated",
                "lp",
                "adaptive",
                "adaptive_max",
                "unfold",
            ),
            "act": ANY_ACT,
            "out": (2, 5),
        },
    ),
    "Grouped": (
        m.Grouped,
        {
            "groups": (2, 3),
            "kind": ("conv", "shuffled", "transposed"),
            "per": (1, 2),
            "normal": ("bn", "none"),
            "act": ("relu", "silu", "sigmoid"),
        },
    ),
}

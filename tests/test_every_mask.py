"""Property: every mask that this library makes exports to a smaller model that computes the same.

Random small networks with shortcuts, concatenations, grouped convolutions and attention; every importance, side,
method and ranking, any amount, one step or several. Always the same cases; ``UPSCALE_EXAMPLES`` sets how many a family,
``UPSCALE_RANDOM=1`` draws new ones. A failure prints the call that repeats it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import upscale
from support.networks import Spec, build, specs
from support.oracle import check_equal, leaves, parameter_count, varies
from upscale.importance import L2, ActivationMagnitude, BatchNormScale, HRank, Random, Taylor

STEADY = settings(
    max_examples=int(os.environ.get("UPSCALE_EXAMPLES", "7")),
    deadline=None,
    derandomize="UPSCALE_RANDOM" not in os.environ,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # the cases are small, and shrinking takes minutes
)
STEMS = ("conv", "conv_bn")
FAMILIES = {
    "residual": specs("Residual", ndims=(2,), stems=STEMS, mixed=False),
    "concatenation": specs("Dense", "Inception", ndims=(2,), stems=STEMS, mixed=False),
    "grouped": specs("Grouped", "ShuffleUnit", "Depthwise", "Inverted", ndims=(2,), stems=STEMS, mixed=False),
    "attention": specs("Attention", "TokenMixer", "SqueezeExcite", ndims=(1,), stems=("linear",), mixed=False),
}


def _energy(output: Any, _: Any) -> Tensor:
    return sum((v.square().sum() for _, v in leaves(output) if isinstance(v, Tensor)), torch.zeros(()).double())


#: From example inputs to an importance.
HEURISTICS: dict[str, Callable[[tuple[Tensor, ...]], Any]] = {
    "l1": lambda _: "l1",
    "l2": lambda _: "l2",
    "lamp": lambda _: "lamp",
    "fpgm": lambda _: "fpgm",
    "random": lambda _: Random(seed=5),
    "bn_scale": lambda _: BatchNormScale(otherwise=L2()),
    "function": lambda _: lambda weight: weight.abs().sqrt(),
    "activation": lambda inputs: ActivationMagnitude([inputs]),
    "hrank": lambda inputs: HRank([inputs]),
    "taylor": lambda inputs: Taylor([inputs], _energy),
}
WAYS = [("input", "unconstrained"), ("input", "constrained"), ("input", "contiguous")]
WAYS += [("output", "unconstrained"), ("output", "constrained")]


@dataclass(frozen=True)
class Choice:
    """A masking as data."""

    heuristic: str
    way: tuple[str, str]
    is_global: bool
    amount: float
    steps: int


choices = st.builds(
    Choice,
    st.sampled_from(sorted(HEURISTICS)),
    st.sampled_from(WAYS),
    st.booleans(),
    st.sampled_from((0.1, 0.3, 0.5, 0.8, 0.95)),
    st.sampled_from((1, 1, 3)),
)


def judge(spec: Spec, choice: Choice) -> None:
    """Mask, export, compare; the error of a failure has the call that repeats it."""
    try:
        examine(spec, choice)
    except Exception as error:
        error.add_note(f"judge({spec!r}, {choice!r})")
        raise


def examine(spec: Spec, choice: Choice) -> None:
    model, inputs = build(spec)
    side, method = choice.way
    try:
        manager = upscale.MaskingManager(model, side, method, choice.is_global, inputs)  # type: ignore[arg-type]
        manager.importance(HEURISTICS[choice.heuristic](inputs)).mask(choice.amount, steps=choice.steps)
    except upscale.NothingToPruneError:
        assert not manager.masks, "there are layers to mask"
        return
    for name, channels in manager.masked.items():
        assert 0 < len(channels) < len(manager.masks[name]), f"{name} keeps nothing"
    try:
        pruned = upscale.export(model, inputs)
    except upscale.NothingToPruneError:
        assert not manager.masked or side == "output", "masked channels are not seen"
        return
    except upscale.ConstantOutputError:
        assert not varies(model, inputs), "the output still depends on the input"
        return
    assert parameter_count(pruned) <= parameter_count(model)
    check_equal(model, pruned, *inputs, batches=(1, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mask_exports_to_a_model_that_computes_the_same(family: str) -> None:
    @STEADY
    @given(FAMILIES[family], choices)
    def check(spec: Spec, choice: Choice) -> None:
        judge(spec, choice)

    check()

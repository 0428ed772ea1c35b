"""Property: whatever the network and wherever the zeros, the exported model computes what the masked model computes.

At least 300 networks per run, always the same ones (``derandomize``); ``UPSCALE_EXAMPLES`` sets how many per family,
``UPSCALE_RANDOM=1`` draws new ones. A failure prints ``Spec(...)`` and ``Mask(...)``: ``judge(spec, mask)`` repeats it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import upscale
from support.masks import Mask, removable, zero_channels
from support.networks import BLOCKS, Spec, build, masks, specs
from support.oracle import check_equal, fingerprint, parameter_count, relative_error, varies

EXAMPLES = int(os.environ.get("UPSCALE_EXAMPLES", "22"))
STEADY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="UPSCALE_RANDOM" not in os.environ,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
FAMILIES = {
    "plain": specs("ConvNorm"),
    "residual": specs("Residual"),
    "dense": specs("Dense"),
    "inception": specs("Inception"),
    "shuffle": specs("ShuffleUnit", "Grouped"),
    "squeeze_excite": specs("SqueezeExcite"),
    "depthwise": specs("Depthwise", "Inverted"),
    "encoder_decoder": specs("UNet"),
    "tokens": specs("TokenMixer", "ConvNeXt", "Attention"),
    "movement": specs("Slices", "Space", "Glu", ndims=(2, 2, 1)),
    "sharing": specs("Sharing"),
    "padding": specs("Padding"),
    "context": specs("Context"),
    "sequence": specs(
        "ConvNorm", "Residual", "TokenMixer", "Attention", "Glu", ndims=(1,), stems=("embedding", "linear")
    ),
}
assert EXAMPLES * len(FAMILIES) >= 300 or "UPSCALE_EXAMPLES" in os.environ


def judge(spec: Spec, mask: Mask, reads: tuple[str, ...] = ("auto",), verify: bool = False) -> str:
    """``examine`` with the call that repeats a failure added to the failure."""
    try:
        return examine(spec, mask, reads, verify)
    except Exception as error:
        error.add_note(f"judge({spec!r}, {mask!r}, {reads!r}, {verify!r})")
        raise


def examine(spec: Spec, mask: Mask, reads: tuple[str, ...], verify: bool) -> str:
    """Export the masked network and compare; what came of it: "smaller", "same size", "constant" or "nothing"."""
    model, inputs = build(spec)
    mask.apply(model, inputs)
    before = fingerprint(model)
    exported = {}
    try:
        for mode in reads:
            exported[mode] = upscale.export(model, inputs, reads=mode, verify=verify)
    except upscale.errors.NothingToPruneError:
        assert removable(model, inputs) == 0, "there are zero channels, yet: nothing to prune"
        return "nothing"
    except upscale.errors.ConstantOutputError:
        assert not varies(model, inputs), "the output does vary with the input"
        return "constant"
    assert fingerprint(model) == before, "the user's model was touched"
    counts = {mode: parameter_count(pruned) for mode, pruned in exported.items()}
    for mode, pruned in exported.items():
        check_equal(model, pruned, *inputs, batches=(1, 3), seed=spec.seed)
        assert counts[mode] <= parameter_count(model), f"{mode}: more parameters than before"
        assert not pruned.training
    modes = list(exported)
    with torch.no_grad():
        for mode in modes[1:]:
            assert relative_error(exported[modes[0]](*inputs), exported[mode](*inputs)) <= 1e-10
    return "smaller" if counts[modes[0]] < parameter_count(model) else "same size"


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_equals_masked(family: str) -> None:
    """Masked and exported agree to 1e-10 in float64 at the traced batch and at others; refusals are justified."""
    outcomes: Counter[str] = Counter()

    @STEADY
    @given(FAMILIES[family], masks())
    def prove(spec: Spec, mask: Mask) -> None:
        outcomes[judge(spec, mask, verify=spec.seed % 8 == 0)] += 1

    prove()
    assert outcomes["smaller"] >= sum(outcomes.values()) // 3, f"too little was pruned to mean anything: {outcomes}"


def test_the_three_ways_to_read_agree() -> None:
    """``auto``, ``gather`` and ``baseline`` give the same numbers."""

    @settings(STEADY, max_examples=max(1, EXAMPLES // 2))
    @given(specs("Residual", "Dense", "Inception", "ShuffleUnit", "Inverted", "UNet", "ConvNeXt", "Slices"), masks())
    def prove(spec: Spec, mask: Mask) -> None:
        judge(spec, mask, reads=("auto", "gather", "baseline"))

    prove()


def test_every_block_can_be_built() -> None:
    """The generator itself: all blocks build, masks write zeros, and the same spec gives the same network."""
    for name in BLOCKS:
        skipped: list[str] = []
        defaults = Spec(blocks=((name, {}),), width=6, size=7)
        model, inputs = build(defaults, skipped)
        assert not skipped, skipped
        again, _ = build(defaults)
        with torch.no_grad():
            assert relative_error(model(*inputs), again(*inputs)) == 0
        assert Mask("input").apply(model, inputs) and zero_channels(model) > 0
        with torch.no_grad():
            assert relative_error(again(*inputs), model(*inputs)) > 1e-6, f"{name}: the mask changed nothing"

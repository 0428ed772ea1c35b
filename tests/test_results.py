"""Trained networks on real images: the exported model classifies as the masked one does.

On a part of each test set; ``make results`` does the whole. Skipped where ``../shared`` is not there.
"""

from __future__ import annotations

import pytest
import torch

import upscale
from benchmarks.data import predictions, test_set, top1
from benchmarks.nets import NETS, load, why_missing
from benchmarks.results import masked, page
from upscale import measure

IMAGES = {"cifar10": 500, "imagenet_sample": 40}
# A quarter of their channels gone, the ImageNet networks give nearly every image the same class: a small
# share too.
ROWS = [*((name, 0.25) for name in NETS), ("mobilenet_v2", 0.05), ("squeezenet1_0", 0.05)]


def need(name: str) -> None:
    missing = why_missing(name)
    if missing:
        pytest.skip(missing)


@pytest.mark.shared
@pytest.mark.parametrize("name", NETS)
def test_trained_weights_load_and_classify(name: str) -> None:
    """Architecture, normalisation and weights belong together: dense top-1 is near the published figure."""
    need(name)
    images = test_set(name).first(IMAGES[NETS[name].dataset])
    right = top1(predictions(load(name), images, quiet=True), images)
    # Within four standard errors of a sample this small.
    expected = NETS[name].dense_top1 / 100
    assert abs(right / 100 - expected) < 4 * (expected * (1 - expected) / len(images)) ** 0.5


@pytest.mark.shared
@pytest.mark.parametrize(("name", "amount"), ROWS)
def test_exported_top1_is_the_masked_top1(name: str, amount: float) -> None:
    need(name)
    images = test_set(name).first(IMAGES[NETS[name].dataset])
    model = masked(load(name), images, amount)
    pruned = upscale.export(model, (images.batch(range(2)),))
    before = predictions(model, images, quiet=True)
    after = predictions(pruned, images, quiet=True)
    assert torch.equal(before, after)
    assert top1(before, images) == top1(after, images)
    assert len(before.unique()) > 4  # classes: so that agreeing means something
    assert measure.parameters(pruned) < (1 - amount / 2) * measure.parameters(model)


@pytest.mark.shared
@pytest.mark.parametrize("reads", ["baseline", "gather"])
def test_other_ways_of_reading_classify_alike(reads: str) -> None:
    need("resnet20")
    images = test_set("resnet20").first(200)
    model = masked(load("resnet20"), images, 0.25)
    pruned = upscale.export(model, (images.batch(range(2)),), reads=reads)
    assert torch.equal(predictions(model, images, quiet=True), predictions(pruned, images, quiet=True))


def test_the_page_holds_every_figure() -> None:
    keys = ("dense", "masked", "baseline", "gather", "auto")
    row = {
        "name": "resnet20",
        "amount": 0.25,
        "images": 10000,
        "top1": {"dense": 87.951, "masked": 70.123, "auto": 70.123},
        "parameters": dict(zip(keys, (269722, 269722, 4, 5, 200001), strict=True)),
        "flops": dict(zip(keys, (81.6e6, 81.6e6, 1, 1, 60.4e6), strict=True)),
        "copied": dict(zip(keys, (1000, 1000, 52000, 53000, 7000), strict=True)),
        "latency": {"dense": 3.001, "baseline": 4.002, "gather": 3.503, "auto": 2.254},
    }
    text = page([row], "make results")
    for figure in (
        "87.95",
        "70.12",
        "269,722",
        "200,001",
        "81.6",
        "60.4",
        "3.00 | 4.00 | 3.50 | 2.25",
        "52 | 53 | 7",
    ):
        assert figure in text

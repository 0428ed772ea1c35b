"""``manager.segments()``: what layers share, as people who choose masks themselves see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, randomise
from upscale import InputError, MaskingManager

IMAGE = torch.rand(2, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """A residual stream, a flattened tensor, and a padded one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.three = nn.Conv2d(12, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.two(torch.relu(self.one(x)))
        x = nn.functional.pad(x, (0, 0, 0, 0, 1, 3))
        return self.head(nn.functional.max_pool2d(torch.relu(self.three(x)), 2).flatten(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net().double().eval())


def by_writer(manager: MaskingManager) -> dict[str, upscale.Segment]:
    return {segment.producers[0].name: segment for segment in manager.segments()}


def test_segments_have_their_producers_and_readers() -> None:
    found = by_writer(MaskingManager(network(), example_inputs=(IMAGE,)))
    told = {name: ([m.name for m in s.producers], [m.name for m in s.readers]) for name, s in found.items()}
    assert told == {  # nothing of the model's output
        "stem": (["stem", "two"], ["one", "three"]),
        "one": (["one"], ["two"]),
        "three": (["three"], ["head"]),
    }
    assert str(found["one"]) == "12 channels written by one, read by two"
    assert found["stem"].channels == 12  # four are the padding, which only one layer reads


def test_places_follow_padding_and_flattening() -> None:
    found = by_writer(MaskingManager(network(), example_inputs=(IMAGE,)))
    three = next(member for member in found["stem"].readers if member.name == "three")
    assert three.places([0, 5]).tolist() == [1, 6] and three.size == 12
    head = found["three"].readers[0]
    assert head.places(torch.tensor([2])).tolist() == list(range(32, 48)) and head.size == 96
    mask = head.mask([2])
    assert mask.dtype == torch.bool and mask.sum() == 80 and not mask[32:48].any()
    assert head.mask([]).all()
    assert head.summed(torch.ones(96)).tolist() == [16] * 6
    stem = found["stem"].producers[0]
    assert stem.summed(torch.arange(1, 9)).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0]
    with pytest.raises(InputError, match="stem has 8 output channels"):
        stem.summed(torch.ones(12))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ([12], "channels 0 to 11, not 12"),
        ([-1], "not -1"),
        ([0.5], "whole numbers"),
        (torch.ones(8) > 0, "whole numbers"),
    ],
)
def test_channels_that_are_none_are_refused(channels: object, message: str) -> None:
    segment = by_writer(MaskingManager(network(), example_inputs=(IMAGE,)))["stem"]
    with pytest.raises(InputError, match=message):
        segment.layers[0].places(channels)


def test_masks_made_by_segment_are_constrained_ones() -> None:
    """Dropped from all readers, a channel is gone from the producers too, and nothing is copied."""
    model = network()
    manager = MaskingManager(model, example_inputs=(IMAGE,))
    for segment in manager.segments():
        for layer in segment.readers:
            if layer.name in manager.masks:
                manager.masks[layer.name] &= layer.mask(list(range(0, segment.channels, 3)))
    pruned = upscale.export(model, (IMAGE,))
    check_equal(model, pruned, IMAGE)
    assert pruned.stem.out_channels == pruned.two.out_channels == 5
    assert (pruned.one.out_channels, pruned.three.out_channels) == (8, 4)
    assert set(pruned.report.reads) <= {"whole", "view"}


def test_segments_need_inputs_that_run() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 1))
    manager = MaskingManager(nn.ModuleDict({"inner": model}))  # its forward takes nothing
    with pytest.raises(InputError, match="give example_inputs="):
        manager.segments()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_channels_may_be_chosen_on_another_device() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    segment = MaskingManager(model, example_inputs=torch.rand(1, 3, 4, 4)).segments()[0]
    assert segment.layers[0].places(torch.tensor([5, 2], device="cuda")).tolist() == [2, 5]

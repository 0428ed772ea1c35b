"""The spaces that a plan records: against what the weights themselves say."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.subjects import SmallResNet, masked
from upscale.plan import Plan, Space


class Dense(nn.Module):
    """Two layers joined, normalised and read by a third; two more read the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(20)
        self.c, self.d = nn.Conv2d(20, 6, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A sum of both branches."""
        a = self.a(x)
        both = torch.cat([a, self.b(a)], dim=1)
        return self.c(torch.relu(self.bn(both))) + self.d(a)


IMAGE = torch.rand(1, 3, 8, 8)


def zeroed(seed: int = 0) -> Dense:
    torch.manual_seed(seed)
    model = Dense().eval()
    with torch.no_grad():
        for layer in (model.b, model.c, model.d):
            layer.weight[:, torch.randperm(layer.in_channels)[: layer.in_channels // 3]] = 0
        model.b.weight[:, 5] = model.c.weight[:, 5] = model.d.weight[:, 5] = 0  # nobody reads channel 5 of a
        model.c.weight[:, 12 + 2] = 0  # nor channel 2 of b
    return model


def columns(layer: nn.Conv2d, start: int = 0, stop: int | None = None) -> tuple[int, ...]:
    """Input channels that a weight uses, counted from ``start``."""
    used = (layer.weight[:, start:stop] != 0).flatten(2).any(2).any(0)
    return tuple(torch.nonzero(used).flatten().tolist())


def runs_of(order: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    return sum(1 for inside, _ in groupby(c in wanted for c in order) if inside)


def spaces(model: nn.Module, image: Tensor = IMAGE, **options: object) -> dict[str, Space]:
    plan = upscale.export(model, (image,), **options).report.plan  # type: ignore[arg-type]
    return {space.name: space for space in plan.spaces}


@pytest.mark.parametrize("reads", ["auto", "gather", "baseline"])
@pytest.mark.parametrize("seed", range(3))
def test_readers_want_what_their_weights_use(reads: str, seed: int) -> None:
    model = zeroed(seed)
    found = spaces(model, reads=reads)
    a, b = found["a"], found["b"] if "b" in found else None
    assert a.producers[0].layer == "a"
    wanted = {r.layer: r.wanted for r in a.readers}
    assert wanted["b"] == columns(model.b) and wanted["d"] == columns(model.d)
    if reads == "auto":  # the join is read through: its parts are spaces of their own
        assert [r.layer for r in a.readers] == ["b", "c", "d"]  # the chain before c is c's read, not one of its own
        assert b is not None and wanted["c"] == columns(model.c, 0, 12)
        assert {r.layer: r.wanted for r in b.readers} == {"c": columns(model.c, 12)}
        assert (a.channels, b.channels) == (12, 8)
        assert 5 not in a.order and 2 not in b.order
    for space in found.values():
        assert len(set(space.order)) == len(space.order) and set(space.order) <= set(range(space.channels))
        for reader in space.readers:
            assert set(reader.wanted) <= set(space.order if reader.present is None else reader.present)
            if reader.present is None:
                assert reader.slices(space.order) == runs_of(space.order, reader.wanted)


def test_the_recorded_order_is_that_of_the_tensors() -> None:
    plan = upscale.export(zeroed(), (IMAGE,)).report.plan
    (a,) = (space for space in plan.spaces if space.name == "a")
    assert plan.layouts[a.producers[0].call].positions == a.order


def test_a_residual_stream_is_one_space_with_all_its_producers() -> None:
    model = masked(SmallResNet())
    image = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    found = spaces(model, image)
    stream = found["conv1"]
    assert [p.layer for p in stream.producers] == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert stream.channels == 8
    assert {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"} <= {r.layer for r in stream.readers}
    for reader in stream.readers:
        layer = model.get_submodule(reader.layer) if "(" not in reader.layer else None
        if isinstance(layer, nn.Conv2d):
            assert reader.wanted == columns(layer)


class Summed(nn.Module):
    """Two layers added, two that read the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 12, 1) for i in (3, 3, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        """A sum of what both read."""
        y = torch.relu(self.a(x) + self.b(x))
        return self.c(y) + self.d(y)


def test_a_channel_that_one_producer_lacks_keeps_its_number() -> None:
    torch.manual_seed(0)
    model = Summed().eval()
    with torch.no_grad():
        for layer, gone in ((model.a, [2, 7]), (model.b, [4, 7])):
            layer.weight[gone], layer.bias[gone] = 0.0, 0.0  # type: ignore[index]
        model.c.weight[:, [0, 3]] = 0
        model.d.weight[:, [1, 5, 9]] = 0
    sums = spaces(model)["a"]
    assert [p.layer for p in sums.producers] == ["a", "b"] and sums.channels == 12
    assert set(sums.order) == set(range(12)) - {7}
    wanted = {r.layer: set(r.wanted) for r in sums.readers if "(" not in r.layer}
    assert wanted == {"c": set(range(12)) - {0, 3, 7}, "d": set(range(12)) - {1, 5, 7, 9}}


def test_channels_a_tensor_lacks_part_no_slice() -> None:
    reader = upscale.plan.SpaceReader("c", "c", 1, "t", ("c", "t"), wanted=(0, 3), present=(0, 3, 4))
    assert reader.slices((0, 1, 2, 3, 4)) == 1
    assert replace(reader, present=None).slices((0, 1, 2, 3, 4)) == 2
    assert replace(reader, wanted=()).slices((0, 1)) == 0


def test_spaces_survive_json_and_older_plans_have_none() -> None:
    plan = upscale.export(zeroed(), (IMAGE,)).report.plan
    data = json.loads(json.dumps(plan.to_dict()))
    assert plan.spaces and Plan.from_dict(data) == plan
    del data["spaces"]
    assert Plan.from_dict(data) == replace(plan, spaces=())

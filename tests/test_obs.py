"""Second-order masks against elimination by least squares, and on networks where the answer is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import upscale
from upscale.errors import InputError
from upscale.importance import channel_scores
from upscale.importance.subject import Subject
from upscale.repairing import obs
from upscale.repairing.samples import HELD_OUT


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(model: nn.Module, batches: list[Tensor], side: str = "input", **layers: nn.Module) -> dict[str, Tensor]:
    return channel_scores(upscale.OBS(batches), Subject(model, side, layers or {"0": model[0]}, {}))


@torch.no_grad()
def test_each_removal_is_the_one_that_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is tried by least squares on the rows themselves."""
    monkeypatch.setattr(obs, "_DAMPING", 0.0)
    x = normal(300, 6) + 0.8 * normal(300, 1, seed=2)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    found = scored(nn.Sequential(layer).eval(), [x[:100], x[100:]])["0"]
    x = x[torch.arange(300) % HELD_OUT != 1]
    wanted = layer(x) - layer(x).mean(0)
    left, scores = set(range(6)), {}
    while left:
        errors = {}
        for channel in left:
            rest = x[:, sorted(left - {channel})]
            rest = rest - rest.mean(0)
            fitted = rest @ torch.linalg.lstsq(rest, wanted).solution if rest.shape[1] else torch.zeros_like(wanted)
            errors[channel] = float((wanted - fitted).square().sum() / wanted.square().sum())
        chosen = min(errors, key=errors.__getitem__)
        scores[chosen] = errors[chosen]
        left -= {chosen}
    assert found.tolist() == pytest.approx([scores[channel] for channel in range(6)], rel=1e-6)


@torch.no_grad()
def test_channels_that_others_make_up_for_go_first_however_large() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 5, 3, bias=False)).double().eval()
    nn.init.dirac_(model[0].weight)
    model[1].weight[:, :2] *= 3
    x = normal(64, 4, 6, 6)
    x[:, 1] = 0.5 * x[:, 0]  # channel 1 is a copy of channel 0, both with the largest weights
    found = scored(model, [x], **{"1": model[1]})["1"]
    assert found.argmin() in (0, 1) and found.sort().values[0] < 0.5 * found.sort().values[1]
    masked = upscale.mask(model, x[:2], amount=0.25, importance=upscale.OBS([x]))
    repaired = upscale.repair(masked, model, [x], progress=False)
    assert repaired.repair_report.outputs[1] < 1e-6
    plain = upscale.repair(upscale.mask(model, x[:2], amount=0.25), model, [x], progress=False)
    assert plain.repair_report.outputs[1] > 1e-3


@torch.no_grad()
def test_groups_are_taken_on_their_own() -> None:
    """A depthwise layer's channels cannot stand in for each other: the score is what is lost with each."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False)).double().eval()
    x = normal(64, 4, 6, 6)
    found = scored(model, [x])["0"]
    used = model(x[torch.arange(64) % HELD_OUT != 1]).square().sum((0, 2, 3))
    assert found.tolist() == pytest.approx((used / used.sum()).tolist(), rel=0.05)


@pytest.mark.parametrize(("groups", "kind"), [*itertools.product((1, 2), (nn.Conv2d, nn.ConvTranspose2d))])
def test_every_channel_has_a_score(groups: int, kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(4, 6, 3, groups=groups)).double().eval()
    found = scored(model, [normal(40, 4, 7, 7)])["0"]
    assert found.shape == (4,) and bool((found > 0).all()) and bool((found < 1.01).all())


def test_what_cannot_be_scored_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    with pytest.raises(InputError, match='side="input"'):
        scored(model, [normal(20, 4)], side="output")
    with pytest.raises(InputError, match="no batches"):
        scored(model, [])
    with pytest.raises(InputError, match=r"cannot score aside \(aside: no batch reaches it\)"):
        scored(model, [normal(20, 4)], aside=nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"upscale.OBS\(batches\)"):
        upscale.mask(model, normal(2, 4), importance="obs")
    assert model.training

"""Second-order masks against elimination by least squares, and on networks where the answer is known."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import upscale
from upscale.errors import InputError
from upscale.importance import channel_scores
from upscale.importance.subject import Subject


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(model: nn.Module, batches: list[Tensor], side: str = "input", **layers: nn.Module) -> dict[str, Tensor]:
    return channel_scores(upscale.OBS(batches), Subject(model, side, layers or {"0": model[0]}, {}))


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
    lost = model(x).square().sum((0, 2, 3))
    assert scored(model, [x])["0"].argsort().tolist() == lost.argsort().tolist()


@torch.no_grad()
def test_the_first_scores_add_up_to_the_error_of_the_outputs() -> None:
    """Of a linear network the first order is all there is: what half of the channels cost is told beforehand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 5, 3, padding=1)).double().eval()
    batches = [normal(64, 8, 7, 7, seed=seed) for seed in range(8)]
    scores = scored(model, batches, **{"1": model[1]})["1"]
    told = float(scores.sort().values[:6].sum())
    masked = copy.deepcopy(model)
    masked[1].weight[:, scores.argsort()[:6]] = 0
    repaired = upscale.repair(masked, model, batches, recalibrate=False, progress=False)
    assert repaired.repair_report.outputs[1] == pytest.approx(told, rel=0.25)


class TwoBranches(nn.Module):
    """Two layers alike, of which the output hardly depends on the second."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.much, self.little = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        little = self.little(x)
        return self.much(x).mean((2, 3)) + 0.05 * (little.detach() if self.cut else little).mean((2, 3))


def test_global_masks_go_where_the_output_depends_least() -> None:
    torch.manual_seed(0)
    model, batches = TwoBranches().eval(), [torch.randn(64, 3, 8, 8)]
    manager = upscale.MaskingManager(copy.deepcopy(model), is_global=True, example_inputs=batches[0][:2])
    manager.importance(upscale.OBS(batches)).mask(amount=0.4)
    masked = {name: len(channels) for name, channels in manager.masked.items()}
    assert masked.get("much", 0) + masked["little"] == 6
    assert masked["little"] >= 5


def test_layers_without_a_derivative_are_scored_by_what_they_write() -> None:
    """A detached branch is read all the same: its channels must not look free."""
    torch.manual_seed(0)
    model, batches = TwoBranches(cut=True).eval(), [torch.randn(64, 3, 8, 8)]
    found = scored(model, batches, much=model.much, little=model.little)
    assert bool((found["little"] > 1e-4).all())
    assert 0.3 < float(found["little"].sum()) < 1.01  # of its own output's energy, all of which is gone in the end


def test_scores_are_the_same_for_the_same_seed_and_leave_the_model_alone() -> None:
    torch.manual_seed(0)
    model, batches = TwoBranches(), [torch.randn(20, 3, 8, 8), torch.randn(12, 3, 8, 8)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (scored(model, batches, much=model.much)["much"] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


class OneToken(nn.Module):
    """A layer that reads the same for every input, and one that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 6))
        self.constant, self.unused, self.layer = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        unused = self.unused(x)
        return self.layer(torch.relu(x)) * self.constant(self.token) + 0 * unused


def test_layers_that_change_nothing_are_free() -> None:
    torch.manual_seed(0)
    model = OneToken().double().eval()
    names = ("constant", "unused", "layer")
    found = scored(model, [normal(64, 6)], **{name: model.get_submodule(name) for name in names})
    assert float(found["constant"].sum()) < 1e-9 < 1e-2 < float(found["layer"].sum())


@pytest.mark.parametrize(("groups", "kind"), [*itertools.product((1, 2), (nn.Conv2d, nn.ConvTranspose2d))])
def test_every_channel_has_a_score(groups: int, kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(4, 6, 3, groups=groups)).double().eval()
    found = scored(model, [normal(40, 4, 7, 7)])["0"]
    assert found.shape == (4,) and bool((found > 0).all()) and 0.5 < float(found.sum()) < 1.5


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


class Tail(nn.Module):
    """A layer, an activation, and behind it another layer that changes nothing, or none."""

    def __init__(self, is_followed: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, 4, bias=False) if is_followed else nn.Identity()
        if is_followed:
            nn.init.eye_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_an_error_that_later_layers_can_make_up_for_counts_less() -> None:
    """Both networks compute the same, so that their derivatives are the same too."""
    torch.manual_seed(0)
    followed, alone = Tail(True).double().eval(), Tail(False).double().eval()
    alone.first.load_state_dict(followed.first.state_dict())
    x = [normal(64, 6)]
    less, more = (scored(model, x, first=model.first)["first"] for model in (followed, alone))
    assert 0.3 < float(less.sum() / more.sum()) < 0.9
    assert less.argsort().tolist() == more.argsort().tolist()

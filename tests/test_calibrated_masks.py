"""Masks by calibration data: a budget is spent where the outputs miss it least."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upscale
from upscale.errors import InputError
from upscale.measure import flops


class Uneven(nn.Module):
    """Two blocks alike; the first one's channels come in equal pairs, so that half of them can go for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.pairs, self.all = nn.Conv2d(12, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.end, self.head = nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pairs(torch.relu(self.stem(x))))
        x = torch.relu(self.end(torch.relu(self.all(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model() -> Uneven:
    torch.manual_seed(0)
    made = Uneven().eval()
    with torch.no_grad():
        made.pairs.weight[12:] = made.pairs.weight[:12]
        made.pairs.bias[12:] = made.pairs.bias[:12]
    return made


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def share(layer: Any) -> float:
    """Of its input channels those that are masked."""
    return float((layer.weight.flatten(2).abs().sum((0, 2)) == 0).double().mean())


def zeros(model: nn.Module) -> int:
    """Of all weights."""
    return sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_a_budget_is_spent_where_nothing_is_lost(model: Uneven, batches: list[Tensor]) -> None:
    masked = upscale.mask(model, batches[0], flops=0.62, calibration=batches)
    assert share(masked.all) == 0.5 and share(masked.pairs) == 0.0
    repaired = upscale.repair(masked, model, batches, progress=False)
    evenly = upscale.mask(model, batches[0], flops=0.62)
    other = upscale.repair(evenly, model, batches, progress=False)
    assert repaired.repair_report.outputs[1] < 0.1 * other.repair_report.outputs[1]
    left = flops(upscale.export(masked, (batches[0],)), batches[0]) / flops(model, batches[0])
    assert left == pytest.approx(0.62, rel=0.01)


@pytest.mark.parametrize("budget", [{"params": 0.7}, {"amount": 0.25}])
def test_other_requests_take_calibration_too(model: Uneven, batches: list[Tensor], budget: dict[str, float]) -> None:
    masked = upscale.mask(model, batches[0], calibration=batches, **budget)
    by_hand = upscale.mask(model, batches[0], importance=upscale.OBS(batches), is_global="params" in budget, **budget)
    for name, tensor in masked.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name])
    if "amount" in budget:
        assert share(masked.all) == share(masked.end) == share(masked.pairs) == 0.25


def test_the_name_obs_stands_for_the_calibration_data(model: Uneven, batches: list[Tensor]) -> None:
    named, default = (
        upscale.mask(model, batches[0], amount=0.25, calibration=iter(batches), **how)
        for how in ({"importance": "OBS"}, {})
    )
    assert torch.equal(named.all.weight, default.all.weight)


def test_pruning_uses_the_data_twice(model: Uneven, batches: list[Tensor]) -> None:
    """A generator too: for the masks and for the repair."""
    pruned = upscale.prune(model, batches[0], flops=0.62, calibration=iter(batches))
    by_hand = upscale.repair(upscale.mask(model, batches[0], flops=0.62, calibration=batches), model, batches)
    assert pruned.repair_report.outputs == pytest.approx(by_hand.repair_report.outputs)
    assert flops(pruned, batches[0]) / flops(model, batches[0]) == pytest.approx(0.62, rel=0.01)


def test_pruning_repairs_other_masks_too(model: Uneven, batches: list[Tensor]) -> None:
    pruned = upscale.prune(model, batches[0], amount=0.25, importance="l1", calibration=batches)
    by_hand = upscale.repair(upscale.mask(model, batches[0], amount=0.25, importance="l1"), model, batches)
    assert pruned.repair_report.outputs == pytest.approx(by_hand.repair_report.outputs)


def test_a_generator_lasts_for_several_steps(model: Uneven, batches: list[Tensor]) -> None:
    one, other = (
        upscale.mask(model, batches[0], amount=0.5, steps=2, calibration=data) for data in (iter(batches), batches)
    )
    assert torch.equal(one.all.weight, other.all.weight)


def test_names_of_importances_are_in_any_case(model: Uneven, batches: list[Tensor]) -> None:
    for name in ("OBS", "Auto"):
        pruned = upscale.prune(model, batches[0], amount=0.25, importance=name, calibration=batches)
        assert pruned.repair_report.outputs == pytest.approx(
            upscale.prune(model, batches[0], amount=0.25, calibration=batches).repair_report.outputs
        )


def test_messages_are_about_the_calibration_data(model: Uneven, batches: list[Tensor]) -> None:
    for data, message in (
        ([], "^OBS: there are no batches"),
        ([batches[0][:1]], "^OBS needs at least two examples"),
        ([torch.randn(4, 5, 8, 8)], "^batch 0: "),
    ):
        with pytest.raises(InputError, match=message):
            upscale.mask(model, batches[0], amount=0.25, calibration=data)


def test_what_does_not_fit_together_is_refused(model: Uneven, batches: list[Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r'calibration is for importance="obs".*upscale.repair'):
        upscale.mask(model, batches[0], importance="l1", calibration=batches)
    with pytest.raises(InputError, match=r"a single batch goes in a list: \[batch\]"):
        upscale.mask(model, batches[0], calibration=batches[0])
    with pytest.raises(InputError, match=r"calibration="):
        upscale.mask(model, batches[0], importance="obs")
    with pytest.raises(InputError, match="no batches"):
        upscale.mask(model, batches[0], flops=0.5, calibration=[])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_of_what_is_written_stay_those_of_the_weights(model: Uneven, batches: list[Tensor]) -> None:
    masked = upscale.mask(model, batches[0], amount=0.25, side="output", calibration=batches)
    assert torch.equal(masked.all.weight, upscale.mask(model, batches[0], amount=0.25, side="output").all.weight)


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ({"amount": 0.51}, {"amount": 0.3}),
        ({"amount": 0.5, "schedule": "linear", "is_global": True}, {"amount": 0.25}),
        ({"amount": {"all": 0.75, "end": 0.5}, "schedule": "linear"}, {"amount": {"all": 0.375, "end": 0.25}}),
        ({"flops": 0.62, "schedule": "linear"}, {"flops": 0.81}),
    ],
)
def test_weights_are_repaired_between_the_steps(
    model: Uneven,
    batches: list[Tensor],
    asked: dict[str, Any],
    first: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[nn.Module, dict[str, Any], nn.Module]] = []

    def spied(found: nn.Module, *args: Any, **options: Any) -> Any:
        masked = real(found, *args, **options)
        seen.append((found, {name: value for name, value in options.items() if name in ("amount", "flops")}, masked))
        return masked

    real = upscale.mask
    monkeypatch.setattr("upscale.one_call.mask", spied)
    pruned = upscale.prune(model, batches[0], calibration=batches, steps=2, ignore=[model.stem], **asked)
    (start, begun, once), (repaired, ended, twice) = seen
    assert start is model and begun == {name: pytest.approx(value) for name, value in first.items()}
    assert ended == {name: asked[name] for name in first}
    error = [(m(batches[0]) - model(batches[0])).square().mean() for m in (once, repaired)]
    assert error[1] < error[0], "the second step starts from repaired weights"
    for before, after in zip(once.parameters(), twice.parameters(), strict=True):
        assert not after[before == 0].any()
    assert zeros(once) < zeros(twice) and not (twice.stem.weight == 0).any()
    assert pruned.repair_report.outputs[1] < pruned.repair_report.outputs[0]

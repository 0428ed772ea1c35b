"""``upscale.recalibrate``: batch norms' statistics from data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import upscale
from support.oracle import relative_error
from support.subjects import SmallResNet, dense, image, masked

BATCHES = [image(6, seed=seed) for seed in range(3)]


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def by_torch(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """What torch itself averages: norms in train mode with ``momentum=None``, all else in eval mode."""
    reference = copy.deepcopy(model).eval()
    for norm in norms(reference).values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            reference(batch)
    return reference


@pytest.mark.parametrize("exported", [False, True], ids=["masked", "exported"])
def test_averages_are_those_of_torch(exported: bool) -> None:
    """Of a module of the user's and of an exported one; flags, momenta and everything else stay."""
    model: Any = masked()
    if exported:
        model = upscale.export(model, (image(),))
    model.train()
    model.layer1.eval()
    model.bn1.momentum = 0.3
    before, reference = copy.deepcopy(model), by_torch(model, BATCHES)
    random = torch.get_rng_state()
    assert upscale.recalibrate(model, ((batch, torch.zeros(6)) for batch in BATCHES)) is model
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for name, norm in norms(model).items():
        wanted = reference.get_submodule(name)
        assert relative_error(wanted.running_mean, norm.running_mean) <= 1e-12
        assert relative_error(wanted.running_var, norm.running_var) <= 1e-12
        assert norm.momentum == before.get_submodule(name).momentum
        assert norm.num_batches_tracked == len(BATCHES)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) and model.get_parameter(name).grad is None


def test_both_agree_after_export() -> None:
    """Masked and recalibrated, then exported; or exported, then recalibrated: the same function in eval mode."""
    model = masked()
    pruned = upscale.recalibrate(upscale.export(model, (image(),)), BATCHES)
    assert relative_error(upscale.recalibrate(model, BATCHES)(image(4)), pruned(image(4))) <= 1e-10


def test_the_average_over_batches_by_hand() -> None:
    """Means and unbiased variances of what the norm reads, each batch with the same weight, though sizes differ."""
    model = dense(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    batches = [image(2, seed=1), image(5, seed=2) * 3]
    read = [model[0](batch).detach().transpose(0, 1).flatten(1) for batch in batches]
    upscale.recalibrate(model, [{"input": batch, "label": 0} for batch in batches])
    torch.testing.assert_close(model[1].running_mean, sum(r.mean(1) for r in read) / 2)
    torch.testing.assert_close(model[1].running_var, sum(r.var(1) for r in read) / 2)


class Odd(nn.Module):
    """Norms of every kind that is left alone, and one that is not."""

    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Odd.Frozen:
            return super().train(False)

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.BatchNorm2d(3)
        self.live = nn.BatchNorm2d(3, track_running_stats=False)
        self.frozen = Odd.Frozen(3)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.unused = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.instance(self.frozen(self.live(self.free(self.free(x)))))


def test_only_norms_that_track_and_are_reached() -> None:
    """One that is called twice averages both calls; one without a counter is measured all the same."""
    model = dense(Odd())
    model.free.num_batches_tracked = None
    before, x = copy.deepcopy(model), image(4)
    upscale.recalibrate(model, [x])
    assert model.free.num_batches_tracked is None
    with torch.no_grad():
        calls = [x, nn.functional.batch_norm(x, None, None, model.free.weight, model.free.bias, True)]
    wanted = sum(call.transpose(0, 1).flatten(1).var(1) for call in calls) / 2
    torch.testing.assert_close(model.free.running_var, wanted)
    for name in ("frozen", "instance", "unused"):
        kept = before.get_submodule(name).state_dict()
        assert all(torch.equal(tensor, kept[key]) for key, tensor in model.get_submodule(name).state_dict().items())


def test_old_statistics_that_are_not_finite_do_not_matter() -> None:
    model = masked()
    model.bn1.running_var[0] = float("nan")
    upscale.recalibrate(model, BATCHES)
    assert all(bool(tensor.isfinite().all()) for tensor in model.buffers())


class Wide(nn.Module):
    """A norm over single values where the input is one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mean((2, 3)))


def huge() -> list[Tensor]:
    return [torch.full((4, 3, 12, 12), 1e200, dtype=torch.float64) * torch.linspace(-1, 1, 12, dtype=torch.float64)]


def bad(value: float) -> Tensor:
    x = image(2)
    x[0, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    "build, batches, error, message",
    [
        (masked, lambda: [], upscale.InputError, "there are no batches"),
        (masked, lambda: image(), upscale.InputError, r"goes in a list: \[batch\]"),
        (masked, lambda: [image(), bad(float("nan"))], upscale.NonFiniteError, "batch 1 holds NaN"),
        (masked, lambda: [image(), image()[:, :2]], upscale.InputError, "batch 1: the model does not accept it"),
        (masked, lambda: [image(), 3], upscale.InputError, "batch 1 must be a tensor"),
        (Wide, lambda: [image().float(), image(1).float()], upscale.InputError, "batch 1: .*more than 1 value"),
        (lambda: dense(nn.BatchNorm2d(3)), huge, upscale.NonFiniteError, "statistics of what it reads"),
        (lambda: nn.Conv2d(3, 4, 3).double(), lambda: [image()], upscale.InputError, "no batch norm with running"),
        (lambda: torch.jit.script(Wide()), lambda: [image()], upscale.UnsupportedModelError, "ScriptModule"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refusals_leave_the_model_as_it_was(
    build: Callable[[], Any], batches: Callable[[], Any], error: type[Exception], message: str
) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    with pytest.raises(error, match=message):
        upscale.recalibrate(model, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def test_through_wrappers_and_in_float32() -> None:
    model = dense(SmallResNet()).float()
    batches = [batch.float() for batch in BATCHES]
    reference = by_torch(model, batches)
    wrapped = torch.compile(model, backend="eager")
    assert upscale.recalibrate(wrapped, batches) is wrapped
    torch.testing.assert_close(model.bn1.running_var, reference.get_submodule("bn1").running_var)


class FixedBatch(nn.Module):
    """Takes four examples and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.offset = nn.Parameter(torch.zeros(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.norm(self.conv(x)) + self.offset)


def test_repair_takes_the_same_statistics_without_held_out_examples() -> None:
    """A batch of which one example is left has no variance and is skipped; counters stay."""
    model = dense(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 4)))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    upscale.recalibrate(model, [x])
    wrong = copy.deepcopy(model)
    wrong[1].running_var.mul_(9)
    wrong[1].num_batches_tracked.fill_(7)
    wrong[3].weight.data[:, 0] = 0
    parts = [x[:2], x[2:20], x[20:]]  # examples 1, 9, 17, ... are held out
    used = [torch.stack([x[i] for i in range(a, b) if i % 8 != 1]) for a, b in ((2, 20), (20, 50))]
    repaired = upscale.repair(wrong, model, parts, ridge=1e9, progress=False)
    assert repaired.repair_report.recalibrated == 1 and repaired[1].num_batches_tracked == 7
    wanted = upscale.recalibrate(copy.deepcopy(wrong), used)
    torch.testing.assert_close(repaired[1].running_var, wanted[1].running_var, rtol=1e-9, atol=0)
    assert upscale.repair(wrong, model, list(x.split(1)), progress=False).repair_report.recalibrated is None


def test_repair_leaves_statistics_where_the_batch_is_fixed() -> None:
    """Its examples that are not held out cannot be run by themselves."""
    model = dense(FixedBatch())
    wrong = copy.deepcopy(model)
    wrong.norm.running_var.mul_(9)
    wrong.conv.weight.data[0] = 0
    batches = [image(4, seed=seed) for seed in range(3)]
    repaired = upscale.repair(wrong, model, batches, ridge=1e9, progress=False)
    assert repaired.repair_report.recalibrated is None
    assert torch.equal(repaired.norm.running_var, wrong.norm.running_var)

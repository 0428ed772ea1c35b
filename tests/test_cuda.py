"""What must hold on a GPU as on the CPU; skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import upscale
from support import vision
from support.oracle import check_equal, parameter_count
from support.subjects import SmallResNet, dense, image, masked
from upscale import Target, measure, tuning
from upscale.repairing import run as repairing
from upscale.verification import TOLERANCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def batches(device: torch.device, count: int = 4, size: int = 8) -> list[torch.Tensor]:
    return [image(size, seed=seed).to(device) for seed in range(count)]


@pytest.mark.parametrize("reads", ["auto", "gather", "baseline"])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_export_computes_the_same(reads: str, memory_format: str) -> None:
    model, x = masked().to(CUDA), image().to(CUDA)
    if memory_format == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    target = Target(batch=8, memory_format=memory_format)  # type: ignore[arg-type]
    pruned = upscale.export(model, (x,), reads=reads, target=target)  # type: ignore[arg-type]
    check_equal(model, pruned, x)
    assert {tensor.device.type for tensor in pruned.state_dict().values()} == {"cuda"}
    assert parameter_count(pruned) < parameter_count(model)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0"])
def test_torchvision_in_float64(name: str) -> None:
    model, x = vision.build(name).double().eval().to(CUDA), torch.rand(2, 3, 64, 64, dtype=torch.float64).to(CUDA)
    upscale.MaskingManager(model, example_inputs=(x,)).importance().mask(amount=0.5)
    check_equal(model, upscale.export(model, (x,)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_types_are_verified(dtype: torch.dtype) -> None:
    """TF32, which torch's convolutions use unless told otherwise, is no reason to refuse an export."""
    model, x = vision.build("resnet18").to(CUDA, dtype), torch.rand(2, 3, 64, 64).to(CUDA, dtype)
    upscale.MaskingManager(model, example_inputs=(x,)).importance().mask(amount=0.25)
    pruned = upscale.export(model, (x,))
    assert pruned(x).dtype == dtype and pruned(x).device.type == "cuda"
    assert pruned.report.error is not None and pruned.report.error <= TOLERANCE[dtype]


def test_the_face_of_the_paper() -> None:
    model, x = vision.build("resnet18").to(CUDA), torch.rand((1, 3, 64, 64)).to(CUDA)
    before = parameter_count(model)
    upscale.MaskingManager(model).importance().mask(amount=0.25)
    expected = copy.deepcopy(model).double()(x.double())
    upscale.PruningManager(model).compute([x]).prune()
    assert parameter_count(model) < before
    assert (model.double()(x.double()) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("method", ["unconstrained", "constrained", "contiguous"])
def test_masks_are_those_of_the_cpu(method: str) -> None:
    masks = []
    for device in (CPU, CUDA):
        model = upscale.mask(dense(SmallResNet()).to(device), image().to(device), amount=0.5, method=method)
        masks.append({name: (p == 0).cpu() for name, p in model.named_parameters()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


@pytest.mark.parametrize("importance", ["fpgm", "lamp", "hrank", "taylor", "activation"])
def test_every_score(importance: str) -> None:
    model, x = dense(SmallResNet()).to(CUDA), batches(CUDA)
    how = {
        "hrank": lambda: upscale.HRank(x),
        "activation": lambda: upscale.ActivationMagnitude(x),
        "taylor": lambda: upscale.Taylor(x, lambda y, _: y.square().sum()),
    }
    score = how[importance]() if importance in how else importance
    pruned = upscale.prune(model, x[0], amount=0.5, importance=score)
    assert parameter_count(pruned) < parameter_count(model)
    assert pruned(x[0]).device.type == "cuda"


def test_repair_is_that_of_the_cpu() -> None:
    found = {}
    for device in (CPU, CUDA):
        model, x = dense(SmallResNet()).to(device), batches(device, 8)
        mask = upscale.mask(model, x[0], amount=0.5, calibration=x, is_global=True)
        found[device] = upscale.repair(mask, model, x), mask
    (here, mask), (there, mask_there) = found[CPU], found[CUDA]
    assert all(
        torch.equal(p == 0, q.cpu() == 0) for p, q in zip(mask.parameters(), mask_there.parameters(), strict=True)
    )
    x = image(16, seed=99)
    torch.testing.assert_close(there(x.to(CUDA)).cpu(), here(x), rtol=1e-6, atol=1e-6)
    assert there.repair_report.outputs[1] < there.repair_report.outputs[0]


def test_calibration_may_lie_on_the_host_and_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches on the CPU beside a model on the GPU, and no activations kept between layers."""
    model, x = dense(SmallResNet()).to(CUDA), batches(CPU, 8)
    mask = upscale.mask(model, x[0].to(CUDA), amount=0.5, calibration=x)
    kept = upscale.repair(mask, model, x)
    monkeypatch.setattr(repairing, "_KEPT", 0)
    again = upscale.repair(mask, model, [batch.to(CUDA) for batch in x])
    torch.testing.assert_close(again(image().to(CUDA)), kept(image().to(CUDA)))


def test_blocks_are_fitted() -> None:
    model, x = dense(SmallResNet()).to(CUDA), batches(CUDA, 8)
    mask = upscale.mask(model, x[0], amount=0.5, calibration=x)
    repaired = upscale.repair(mask, model, x, method="blockwise", steps=40)
    assert repaired.repair_report.outputs[1] < repaired.repair_report.outputs[0]
    assert all(
        torch.equal(p == 0, q == 0) for p, q in zip(mask.parameters(), repaired.parameters(), strict=True) if p.ndim > 1
    )


def test_budgets_and_recalibration() -> None:
    model, x = dense(SmallResNet()).to(CUDA), batches(CUDA, 8)
    pruned = upscale.prune(model, x[0], params=0.6, calibration=x)
    assert abs(parameter_count(pruned) / parameter_count(model) - 0.6) < 0.02
    upscale.recalibrate(pruned, x)
    assert bool(pruned(x[0]).isfinite().all())


def test_saved_on_the_gpu_loaded_on_the_cpu(tmp_path: Path) -> None:
    model, x = masked().to(CUDA), image().to(CUDA)
    pruned = upscale.export(model, (x,))
    upscale.save(pruned, tmp_path / "net.safetensors")
    loaded = upscale.load(tmp_path / "net.safetensors", SmallResNet().double())
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(loaded.eval()(image()), pruned(x).cpu(), rtol=1e-10, atol=1e-10)


def test_rates_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 0.01)
    model, x = masked().float().to(CUDA), image().float().to(CUDA)
    target = upscale.tune(model, (x,), cache=tmp_path / "rates.json")
    assert target.rates is not None and target.rates.call > 0
    check_equal(model.double(), upscale.export(model, (x.double(),), target=target), x.double())


def test_kernels_and_copies_are_counted() -> None:
    x = torch.rand(1, 8, 16, 16, device=CUDA)
    two = lambda x: torch.cat([x[:, :2], x[:, 5:]], 1).relu()  # noqa: E731
    assert measure.kernels(lambda x: x.relu(), (x,)) == 1
    assert measure.kernels(lambda x: x.relu().sin().exp(), (x,)) == 3
    assert measure.copies(two, (x,)).bytes == 5 * 256 * 4


def test_latency_waits_for_the_device() -> None:
    x = torch.rand(4096, 4096, device=CUDA)

    def long(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x @ x * 1e-3
        return x

    found = measure.latency({"short": lambda x: x @ x * 1e-3, "long": long}, (x,), runs=5)
    assert found["long"] > 5 * found["short"]


def test_a_model_with_the_example_elsewhere_is_refused() -> None:
    with pytest.raises(upscale.InputError, match="cuda"):
        upscale.export(masked().to(CUDA), (image(),))


def test_products_stay_convolutions() -> None:
    """A 1x1 convolution on a slice is not made a matrix product where nobody measured what that costs."""
    model = dense(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))).to(CUDA)
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
    x = image(8).to(CUDA)
    pruned = upscale.export(model, (x,), target=Target(batch=8))
    assert sum(isinstance(module, nn.Conv2d) for module in pruned.modules()) == 2
    check_equal(model, pruned, x)

"""Training after pruning: with masks on, after export, in mixed precision, in several processes; the examples."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upscale
from support import ddp
from support.oracle import check_equal, parameter_count, relative_error
from support.subjects import SmallResNet, dense, image

ROOT = Path(__file__).parent.parent


def without_dropout(model: Any) -> Any:
    model.dropout.p = 0.0
    return model


def steps(model: nn.Module, count: int = 4, seed: int = 0, **options: Any) -> list[float]:
    """Losses of a few SGD steps in train mode."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, **options)
    losses = []
    model.train()
    for _ in range(count):
        loss = nn.functional.cross_entropy(model(image(6, seed=seed)), torch.arange(6) % 5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_masks_on_and_exported_train_alike() -> None:
    """The same steps of SGD on the masked network, masks on, and on the exported one: one function at every step."""
    model = without_dropout(dense(SmallResNet()))
    manager = upscale.MaskingManager(model, example_inputs=image()).mask(0.5, permanent=False)
    pruned = upscale.export(model, (image(),))
    losses = steps(model)
    assert losses[-1] < losses[0]
    assert steps(pruned) == pytest.approx(losses, rel=1e-9)
    for name, channels in manager.masked.items():
        assert not model.get_submodule(name).weight[:, channels].any(), f"{name}: masked channels came back"
    check_equal(model.eval(), pruned.eval(), image(), tol=1e-9)
    again = upscale.export(model, (image(),))  # trained with masks on, then exported
    assert [(n, p.shape) for n, p in again.named_parameters()] == [(n, p.shape) for n, p in pruned.named_parameters()]
    check_equal(model, again, image())


def test_every_parameter_gets_its_gradient_in_train_mode() -> None:
    """Those of the masked model, at the places that are left; running statistics move alike."""
    model = without_dropout(dense(SmallResNet()))
    upscale.MaskingManager(model, example_inputs=image()).mask(0.5)
    pruned = upscale.export(model, (image(),))
    for network in (model.train(), pruned.train()):
        nn.functional.cross_entropy(network(image(6)), torch.arange(6) % 5).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in pruned.parameters())
    assert relative_error(model.fc.bias.grad, pruned.fc.bias.grad) <= 1e-9
    kept = pruned.fc.weight.shape[1]
    columns = model.fc.weight.detach().any(0)
    assert kept == int(columns.sum())
    torch.testing.assert_close(
        pruned.fc.weight.grad.sort(1).values, model.fc.weight.grad[:, columns].sort(1).values, rtol=1e-8, atol=1e-12
    )
    total = [sum(n.running_mean.sum() for n in m.modules() if isinstance(n, nn.BatchNorm2d)) for m in (model, pruned)]
    assert total[0].isfinite() and pruned.bn1.num_batches_tracked == model.bn1.num_batches_tracked


@pytest.mark.parametrize("named", [False, True], ids=["zeros", "names"])
def test_a_mock_model_with_masks_on_keeps_its_structure(named: bool) -> None:
    """Zeros of both sides; trained with momentum and weight decay, then exported."""
    model = without_dropout(dense(SmallResNet()))
    rows, columns = [("layer1.0.conv1.weight", 3)], [("layer1.1.conv1.weight", 5), ("layer2.0.conv1.weight", 0)]
    if not named:
        with torch.no_grad():
            model.layer1[0].conv1.weight[3] = 0
            model.layer1[0].bn1.weight[3] = model.layer1[0].bn1.bias[3] = 0
            model.layer1[1].conv1.weight[:, 5] = 0
            model.layer2[0].conv1.weight[:, 0] = 0
    names = {"pruned_inputs": columns, "pruned_outputs": rows} if named else {}
    before = copy.deepcopy(model.state_dict())
    manager = upscale.PruningManager(model).compute([image()], **names)
    mock, plain = manager.get_mock_model(masks_on=True), manager.get_mock_model()
    check_equal(plain, mock, image(), tol=0.0)
    losses = steps(mock, weight_decay=1e-2)
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for weight in (mock.layer1[0].conv1.weight[3], mock.layer1[1].conv1.weight[:, 5], mock.layer1[0].bn1.bias[3]):
        assert not weight.any()
    mock.eval()
    pruned = upscale.export(mock, (image(),))
    check_equal(mock, pruned, image())
    assert parameter_count(pruned) < parameter_count(plain)
    steps(plain)
    assert plain.layer1[1].conv1.weight[:, 5].any(), "without masks an optimiser moves the zeros"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_mixed_precision(device: str) -> None:
    """Autocast to bfloat16 on the CPU; to float16 with a gradient scaler where there is a GPU. Weights stay float32."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dtype = torch.bfloat16 if device == "cpu" else torch.float16
    model = dense(SmallResNet()).float()
    upscale.MaskingManager(model, example_inputs=image().float()).mask(0.5)
    pruned = without_dropout(upscale.export(model, (image().float(),))).to(device).train()
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.02, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    x, labels = image(6).float().to(device), (torch.arange(6) % 5).to(device)
    seen: list[tuple[torch.dtype, float]] = []
    for _ in range(6):
        with torch.autocast(device, dtype):
            output = pruned(x)
            loss = nn.functional.cross_entropy(output, labels)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        seen.append((output.dtype, loss.item()))
    assert {kind for kind, _ in seen} == {dtype} and seen[-1][1] < seen[0][1]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in pruned.parameters())


def test_two_processes(tmp_path: Path) -> None:
    """``DistributedDataParallel`` over gloo: equal parameters in both, and, with fixed statistics, those of one process
    that sees all examples."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    torch.multiprocessing.spawn(ddp.run, (str(tmp_path),), nprocs=2)
    alone = ddp.pruned()
    start = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    optimiser = torch.optim.SGD(alone.parameters(), lr=0.02, momentum=0.9)
    for step in range(ddp.STEPS):
        (x, labels), (y, others) = ddp.batch(step, 0), ddp.batch(step, 1)
        optimiser.zero_grad()
        nn.functional.cross_entropy(alone(torch.cat([x, y])), torch.cat([labels, others])).backward()
        optimiser.step()
    for stage in ("fixed", "trained"):
        states: list[dict[str, Tensor]] = [torch.load(tmp_path / f"{stage}-{rank}.pt") for rank in (0, 1)]
        for name in start:
            assert torch.equal(states[0][name], states[1][name]), f"{name} differs between the processes"
            assert not torch.equal(states[0][name], start[name]), f"{name} was not trained"
            if stage == "fixed":
                torch.testing.assert_close(states[0][name], alone.get_parameter(name).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["masked", "exported"])
def test_examples(way: str) -> None:
    """The loss goes down, and most of the accuracy that masking took comes back."""
    pytest.importorskip("sklearn")
    from examples import finetune_exported, finetune_masked

    figures = (finetune_masked if way == "masked" else finetune_exported).main(epochs=2)
    assert figures["last loss"] < 0.7 * figures["first loss"]
    pruned = figures["masked" if way == "masked" else "pruned"]
    assert figures["fine-tuned"] > pruned + 0.8 * (figures["dense"] - pruned)
    assert figures["parameters kept"] < 60
    if way == "masked":
        assert figures["exported"] == figures["fine-tuned"]
    else:
        assert figures["recalibrated"] > pruned


def test_the_documented_examples_run() -> None:
    names: dict[str, Any] = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "finetuning.md").read_text(), flags=re.DOTALL):
        exec(compile(code, "docs/finetuning.md", "exec"), names)
    assert not names["mock"].get_submodule("0").training

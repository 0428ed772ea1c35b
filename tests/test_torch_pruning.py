"""Torch-Pruning's scores and choices, against the installed package: its pruned model is what masks must reproduce."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, fingerprint, randomise, relative_error
from support.subjects import SmallResNet, dense, image
from upscale import InputError, MaskingManager, NonFiniteError, UnsupportedModelError
from upscale.interop.torch_pruning import masks_from_groups, masks_from_history

IMAGE = image(size=8)


class Joined(nn.Module):
    """A concatenation, a depthwise convolution and a flattened image of 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.c, self.depthwise = nn.Conv2d(14, 10, 3, padding=1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.norm = nn.BatchNorm2d(10)  # without it Torch-Pruning 1.6 prunes channels that are not there
        self.hidden, self.fc = nn.Linear(40, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.na(self.a(x)).relu(), self.nb(self.b(x)).relu()], 1)
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.depthwise(self.c(x).relu())).relu(), 2)
        return self.fc(self.hidden(x.flatten(1)).relu())


NETS: dict[str, Callable[[], nn.Module]] = {"residual": SmallResNet, "joined": Joined}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pruner(model: nn.Module, importance: Any = None, **options: Any) -> Any:
    """Half of the channels of every group but the output's, or half of all."""
    return tp.pruner.BasePruner(
        model,
        IMAGE,
        importance=importance or tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.fc],
        **options,
    )


def with_gradients(model: nn.Module) -> nn.Module:
    model.zero_grad()
    model(IMAGE).square().sum().backward()
    return model


# -- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("steps", "is_global"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("net", NETS)
def test_masks_of_a_history_are_the_pruned_model(net: str, steps: int, is_global: bool, side: Any) -> None:
    model = dense(NETS[net]())
    theirs = copy.deepcopy(model)
    found = pruner(theirs, iterative_steps=steps, global_pruning=is_global)
    for _ in range(steps):
        found.step()
    before = fingerprint(model)
    masks = masks_from_history(model, found.pruning_history(), IMAGE, side)
    assert fingerprint(model) == before and masks.side == side
    MaskingManager(model, side=side, example_inputs=IMAGE).masks.update(masks)
    assert relative_error(theirs(IMAGE), model(IMAGE)) <= 1e-10
    ours = upscale.export(model, (IMAGE,))
    check_equal(model, ours, IMAGE, batches=(1, 3))
    assert size(ours) <= size(theirs) < size(model)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("net", NETS)
def test_masks_of_proposed_groups_are_those_of_the_history(net: str, side: Any) -> None:
    model = dense(NETS[net]())
    theirs = copy.deepcopy(model)
    done = pruner(theirs)
    done.step()
    masks = masks_from_groups(model, pruner(model).step(interactive=True), side)
    expected = masks_from_history(model, done.pruning_history(), IMAGE, side)
    assert masks.keys() == expected.keys() and masks
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


def test_masks_of_one_group_by_hand() -> None:
    model = dense(Joined())
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = graph.get_pruning_group(model.b, tp.prune_conv_out_channels, [0, 4])
    masks = masks_from_groups(model, group)
    assert list(masks) == ["c"] and (~masks["c"]).nonzero().flatten().tolist() == [8, 12]  # behind the eight of a
    masks = masks_from_groups(model, group, side="output")
    assert list(masks) == ["b"] and (~masks["b"]).nonzero().flatten().tolist() == [0, 4]
    group = graph.get_pruning_group(model.c, tp.prune_conv_out_channels, [3])
    assert (~masks_from_groups(model, group)["hidden"]).nonzero().flatten().tolist() == [12, 13, 14, 15]


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("kind", ["MagnitudeImportance", "LAMPImportance", "FPGMImportance", "TaylorImportance"])
def test_constrained_masks_are_the_choice_of_torch_prunings_pruner(kind: str, is_global: bool, side: Any) -> None:
    model = with_gradients(dense(SmallResNet()))
    importance = getattr(tp.importance, kind)()
    theirs = pruner(copy.deepcopy(model) if kind != "TaylorImportance" else model, importance, global_pruning=is_global)
    expected = masks_from_groups(theirs.model, theirs.step(interactive=True), side)
    manager = MaskingManager(model, side, "constrained", is_global, IMAGE).importance(importance).mask(0.5)
    assert expected.keys() == manager.masked.keys()
    assert all(torch.equal(manager.masks[name], mask) for name, mask in expected.items())


def test_scores_of_single_layers_by_their_formulas() -> None:
    model = with_gradients(dense(SmallResNet()))
    norm, layer = model.layer1[0].bn1, model.layer1[0].conv1
    weight, gradient = layer.weight.detach(), layer.weight.grad
    assert gradient is not None

    def scores(importance: Any, side: Any) -> Tensor:
        found = MaskingManager(model, side=side, example_inputs=IMAGE).importance(importance)._scores
        assert found is not None
        return found["layer1.0.conv1"]

    squares = weight.square().sum((0, 2, 3))
    torch.testing.assert_close(scores(tp.importance.MagnitudeImportance(p=2), "input"), squares / squares.mean())
    plain = tp.importance.MagnitudeImportance(p=1, normalizer=None)
    rows = (weight.abs().sum((1, 2, 3)) + norm.weight.detach().abs()) / 2  # the layer and the norm behind it
    torch.testing.assert_close(scores(plain, "output"), rows)
    taylor = (weight * gradient).sum((0, 2, 3)).abs()
    each = (weight * gradient).abs().sum((0, 2, 3))
    found = scores(tp.importance.TaylorImportance(normalizer=None), "input")
    assert any(torch.allclose(found, other.double()) for other in (taylor, each))  # it has both forms


ALL = ("Magnitude", "LAMP", "FPGM", "Random", "BNScale", "Taylor", "Hessian")
WAYS = [("input", "contiguous"), ("input", "constrained"), ("output", "unconstrained"), ("output", "constrained")]


@pytest.mark.parametrize(("side", "method"), WAYS)
@pytest.mark.parametrize("kind", ALL)
def test_every_importance_masks_and_exports_and_leaves_no_trace(kind: str, side: Any, method: Any) -> None:
    model = with_gradients(dense(Joined()))
    model.na.train()
    model.a.weight.requires_grad_(False)
    importance = getattr(tp.importance, f"{kind}Importance")()
    if kind == "Hessian":
        importance.accumulate_grad(model)
    before = fingerprint(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    options = {"side": side, "method": method, "amount": 0.4, "importance": importance}
    if kind == "BNScale":
        if method != "constrained" and side == "input":
            with pytest.raises(InputError, match="BNScaleImportance gives no score to c, "):
                upscale.mask(model, IMAGE, **options)
            return
        # Layers that are on no tensor with a batch norm, and single ones that no batch norm follows.
        options["ignore"] = ["hidden", "c"] if method == "unconstrained" else ["hidden" if side == "output" else "fc"]
    masked = upscale.mask(model, IMAGE, **options)
    again = upscale.mask(model, IMAGE, **options) if kind != "Random" else masked
    assert all(map(torch.equal, masked.parameters(), again.parameters()))
    assert all(p.grad is None for p in masked.parameters())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert fingerprint(model) == before[0] and all(map(torch.equal, gradients, before[1]))
    assert model.na.training and not model.a.weight.requires_grad
    ours = upscale.export(masked.eval(), (IMAGE,))
    assert size(ours) < size(model)
    check_equal(masked, ours, IMAGE, batches=(1, 3))


def test_gradients_gathered_by_the_hessian_last() -> None:
    """It forgets them once it is asked, and puts them over the gradients: the second answer would be another one."""
    model = with_gradients(dense(SmallResNet()))
    importance = tp.importance.HessianImportance()
    importance.accumulate_grad(model)
    manager = MaskingManager(model, example_inputs=IMAGE)
    first = manager.importance(importance)._scores
    second = manager.importance(importance)._scores
    assert first is not None and second is not None
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_subclass_and_a_class_are_taken_too() -> None:
    class Last(tp.importance.Importance):
        def __call__(self, group: Any) -> Tensor:
            return torch.arange(len(group[0].idxs), 0, -1.0)

    manager = MaskingManager(dense(SmallResNet()), example_inputs=IMAGE)
    assert manager.importance(Last).mask(0.25).masked["layer1.0.conv1"].tolist() == [6, 7]  # type: ignore[arg-type]
    manager.importance(tp.importance.MagnitudeImportance).importance("l2")


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_bad_histories_change_nothing() -> None:
    model = dense(SmallResNet())
    theirs = copy.deepcopy(model)
    done = pruner(theirs)
    done.step()
    history = done.pruning_history()
    cases: list[tuple[nn.Module, Any, str]] = [
        (theirs, history, "is the model pruned already"),
        (model, [["layer1.0.conv3", True, [1]]], "'layer1.0.conv3'.*nearest are layer1.0.conv"),
        (model, [["layer1", True, [1]]], "no such layer"),
        (model, [["conv1", True, [8]]], "channel 8 of conv1 where 8 are left"),
        (model, [["conv1", True, [-1]]], "channel -1 of conv1"),
        (model, [["conv1", True, ["x"]]], "no integers"),
        (model, [["conv1", True, 3]], "no integers"),
        (model, [["conv1", [1]]], "entry 0 of the history"),
        (model, [[model.conv1, True, [1]]], "entry 0 of the history"),
        (model, 5, r"pruning_history\(\) returns, not 5"),
        (model, [["fc", True, [1]]], "the group of fc takes channels from no layer's input side"),
    ]
    for target, entries, message in cases:
        before = fingerprint(target)
        with pytest.raises(InputError, match=message):
            masks_from_history(target, entries, IMAGE)
        assert fingerprint(target) == before
    with pytest.raises(InputError, match="cannot trace"):
        masks_from_history(model, history, torch.rand(2, 5, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())


def test_groups_that_are_pruned_or_of_another_model_are_refused() -> None:
    model = dense(SmallResNet())
    with pytest.raises(InputError, match="no module of this SmallResNet.*masks_from_history"):
        masks_from_groups(copy.deepcopy(model), pruner(model).step(interactive=True))
    groups = list(pruner(model).step(interactive=True))
    groups[0].prune()
    with pytest.raises(InputError, match="pruned by Torch-Pruning already"):
        masks_from_groups(model, groups[0])
    with pytest.raises(InputError, match="side"):
        masks_from_groups(model, [], side="left")  # type: ignore[arg-type]


def test_a_step_that_has_pruned_gives_no_groups() -> None:
    model = dense(SmallResNet())
    with pytest.raises(InputError, match=r"interactive=True.*masks_from_history"):
        masks_from_groups(model, pruner(copy.deepcopy(model)).step())


def test_modules_without_masks_are_named() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.grouped, self.fc = nn.Conv1d(8, 8, 1, groups=2), nn.Linear(8, 3)

        def forward(self, x: Tensor, attend: bool = True) -> Tensor:
            x = self.first(x)
            if attend:
                x = x + self.attention(x, x, x)[0]
            else:
                x = self.grouped(x.transpose(1, 2)).transpose(1, 2)
            return self.fc(x.mean(1))

    model, x = randomise(Attends().double().eval()), torch.rand(2, 5, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="attention, and masks are not made for MultiheadAttention.*ignored_layers"):
        masks_from_history(model, [["first", True, [0, 4]]], x)
    with pytest.raises(InputError, match="grouped is a grouped convolution.*side='output'"):
        masks_from_history(model, [["first", True, [0, 4]]], (x, False))


def test_scores_that_are_missing_or_bad_are_told() -> None:
    model = dense(SmallResNet())
    before = fingerprint(model)
    manager = MaskingManager(model, example_inputs=IMAGE)
    with pytest.raises(InputError, match=r"TaylorImportance cannot score .*loss.backward\(\)"):
        manager.importance(tp.importance.TaylorImportance())

    class Broken(tp.importance.Importance):
        def __init__(self, result: Any) -> None:
            self.result = result

        def __call__(self, group: Any) -> Any:
            return self.result(len(group[0].idxs))

    def fails(count: int) -> Tensor:
        raise ZeroDivisionError("my own trouble")

    for method in ("unconstrained", "constrained"):
        manager = MaskingManager(model, method=method, example_inputs=IMAGE)  # type: ignore[arg-type]
        for result, kind, message in [
            (fails, InputError, "Broken cannot score .*my own trouble"),
            (lambda n: [1.0] * n, InputError, "must return a tensor"),
            (lambda n: torch.ones(n + 1), InputError, "shape"),
            (lambda n: torch.full((n,), torch.nan), NonFiniteError, "NaN"),
            (lambda n: torch.ones(n, dtype=torch.complex64), InputError, "complex"),
        ]:
            with pytest.raises(kind, match=message):
                manager.importance(Broken(result))
    assert fingerprint(model) == before


def test_layers_left_alone_as_the_message_says() -> None:
    """The batch norm of the shortcut is gone: the advice names its layer, and following it works."""
    model = dense(SmallResNet())
    model.layer2[0].downsample[1] = nn.Identity()
    with pytest.raises(InputError, match="ignore=") as caught:
        MaskingManager(model, side="output", example_inputs=IMAGE).importance(tp.importance.BNScaleImportance())
    advice = str(caught.value).split("ignore=")[1].split(", given")[0]
    assert eval(advice) == ["layer2.0.downsample.0"]
    upscale.mask(model, IMAGE, side="output", importance=tp.importance.BNScaleImportance(), ignore=eval(advice))


def test_a_model_that_cannot_be_copied() -> None:
    model = dense(SmallResNet())
    model.lock = (n for n in ())
    with pytest.raises(UnsupportedModelError, match="cannot be copied"):
        masks_from_history(model, [], IMAGE)


def test_torch_pruning_is_not_imported_without_need() -> None:
    code = "import sys, upscale, torch; m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), "
    code += "torch.nn.Linear(4, 2)); upscale.mask(m, torch.rand(2, 3)); assert 'torch_pruning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

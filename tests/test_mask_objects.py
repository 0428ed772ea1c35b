"""Masks looked at, set by hand, saved and loaded; masks that survive training; the one-call functions."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import upscale
from support.oracle import check_equal, fingerprint, randomise
from upscale import InputError, MaskingManager, NonFiniteError, UnsupportedModelError

IMAGE = torch.rand(4, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.bn1 = nn.Conv2d(12, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.two, self.head = nn.Conv2d(10, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.two(torch.relu(self.bn1(self.one(x))))
        return self.head(torch.relu(x).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    return randomise(Net().double().eval())  # type: ignore[return-value]


def zero_columns(layer: nn.Module) -> list[int]:
    return (layer.weight.detach().transpose(0, 1).flatten(1) == 0).all(1).nonzero().flatten().tolist()


def zero_rows(layer: nn.Module) -> list[int]:
    return (layer.weight.detach().flatten(1) == 0).all(1).nonzero().flatten().tolist()


def kept(size: int, *masked: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(masked)] = False
    return mask


# -- masks by hand ----------------------------------------------------------------------------------------------------


def test_masks_show_which_channels_are_kept(model: Net) -> None:
    manager = MaskingManager(model, example_inputs=IMAGE)
    assert list(manager.masks) == ["one", "two", "head"] and all(bool(m.all()) for m in manager.masks.values())
    manager.mask(0.5)
    for name, mask in manager.masks.items():
        assert (~mask).nonzero().flatten().tolist() == zero_columns(getattr(model, name))
    manager.masks["one"][:] = True  # a copy
    assert int(manager.masks["one"].sum()) == 6
    assert "one: 6 of 12 kept" in repr(manager.masks)
    with pytest.raises(KeyError):
        manager.masks["stem"]


@pytest.mark.parametrize("side", ["input", "output"])
def test_masks_by_hand_zero_channels_and_export(model: Net, side: Any) -> None:
    before = copy.deepcopy(model)
    manager = MaskingManager(model, side=side, example_inputs=IMAGE)
    manager.masks["one"] = kept(len(manager.masks["one"]), 1, 4, 7)
    assert (zero_columns if side == "input" else zero_rows)(model.one) == [1, 4, 7]
    if side == "output":
        for row in (model.one.bias, model.bn1.weight, model.bn1.bias):
            assert (row == 0).nonzero().flatten().tolist() == [1, 4, 7]
    assert torch.equal(model.two.weight, before.two.weight)
    pruned = upscale.export(model, (IMAGE,))
    check_equal(model, pruned, IMAGE)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("one", kept(11), r"shape \(12,\)"),
        ("one", kept(12).view(3, 4), r"shape \(12,\)"),
        ("one", torch.ones(12), "bool tensor.*float32"),
        ("one", [True] * 12, "bool tensor.*list"),
        ("one", kept(12, *range(12)), "keeps no channel"),
        ("stem", kept(3, 1), "reads a model input"),
        ("there", kept(3, 1), "no such layer"),
    ],
)
def test_wrong_masks_are_refused_and_change_nothing(model: Net, name: str, mask: Any, message: str) -> None:
    manager, before = MaskingManager(model, example_inputs=IMAGE), fingerprint(model)
    with pytest.raises(InputError, match=message):
        manager.masks.update({"two": kept(10, 0), name: mask})
    assert fingerprint(model) == before and not manager.masked


def test_what_is_zeroed_for_good_cannot_be_kept_again(model: Net) -> None:
    manager = MaskingManager(model, example_inputs=IMAGE)
    manager.masks["one"] = kept(12, 3, 5)
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"zeroed for good before \(5\).*permanent=False"):
        manager.masks["one"] = kept(12, 3)
    assert fingerprint(model) == before and manager.masked["one"].tolist() == [3, 5]
    manager.masks["one"] = kept(12, 3, 5, 6)
    assert zero_columns(model.one) == [3, 5, 6]


# -- files ------------------------------------------------------------------------------------------------------------


def test_saved_masks_are_those_that_are_loaded(model: Net, tmp_path: Path) -> None:
    fresh = copy.deepcopy(model)
    manager = MaskingManager(model, example_inputs=IMAGE).mask(0.4)
    path = tmp_path / "deep" / "masks.safetensors"
    upscale.save_masks(path, manager.masks)
    loaded = upscale.load_masks(str(path))
    assert loaded.side == "input" and loaded.keys() == manager.masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in manager.masks.items())
    MaskingManager(fresh, example_inputs=IMAGE).masks.update(loaded)
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in model.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == ["masks.safetensors"]  # nothing temporary is left


def test_masks_of_the_other_side_are_refused(tmp_path: Path) -> None:
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), torch.rand(2, 6)
    upscale.save_masks(tmp_path / "masks", MaskingManager(model, example_inputs=x).masks)
    other = MaskingManager(model, side="output", example_inputs=x)
    with pytest.raises(InputError, match="masks of the input side"):
        other.masks.update(upscale.load_masks(tmp_path / "masks"))
    upscale.save_masks(tmp_path / "plain", {"1": kept(6, 2)})  # a dict does not say its side
    other.masks.update(upscale.load_masks(tmp_path / "plain"))
    assert zero_rows(model[1]) == [2]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    upscale.save_masks(path, {"one": kept(40, 1, 2)})
    content = path.read_bytes()
    for broken in (content[:-7], content[:30], b"", b"not a file of tensors", content[:-1] + b"\x00"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read|damaged"):
            upscale.load_masks(path)
    path.write_bytes(content.replace(b'"one"', b'"two"'))
    with pytest.raises(InputError, match="damaged"):
        upscale.load_masks(path)
    save_file({"one": kept(4)}, path)
    with pytest.raises(InputError, match="holds no masks"):
        upscale.load_masks(path)
    for version in ("2", "99", "", "x"):
        save_file({"one": kept(4)}, path, {"format": "upscale masks", "version": version, "side": ""})
        with pytest.raises(InputError, match="version"):
            upscale.load_masks(path)
    with pytest.raises(InputError, match="cannot be read"):
        upscale.load_masks(tmp_path / "nowhere")


def test_masks_that_cannot_be_written_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "masks"
    upscale.save_masks(path, {"one": kept(4, 1)})
    before = path.read_bytes()
    with pytest.raises(InputError, match="bool tensor"):
        upscale.save_masks(path, {"one": torch.ones(4)})

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upscale.save_masks(path, {"one": kept(4)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["masks"]
    with pytest.raises(InputError, match="cannot be written"):
        upscale.save_masks(path / "below", {"one": kept(4)})


# -- masks that survive training --------------------------------------------------------------------------------------


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 25) -> list[float]:
    torch.manual_seed(0)
    target, losses = torch.randint(0, 5, (4,)), []
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(IMAGE), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("side", ["input", "output"])
def test_temporary_masks_survive_an_optimiser(model: Net, side: Any) -> None:
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)  # made before the masks
    manager = MaskingManager(model, side=side, example_inputs=IMAGE).mask(0.4, permanent=False)
    zeros = zero_columns if side == "input" else zero_rows
    before = {name: zeros(getattr(model, name)) for name in manager.masked}
    assert before == {name: channels.tolist() for name, channels in manager.masked.items()}
    start = model.one.weight.detach().clone()
    losses = train(model, optimiser)
    assert losses[-1] < losses[0] / 2 and not torch.equal(start, model.one.weight)
    assert {name: zeros(getattr(model, name)) for name in manager.masked} == before
    if side == "output":
        for row in (model.one.bias, model.bn1.weight, model.bn1.bias):
            assert not row.detach()[before["one"]].any()
    pruned = upscale.export(model, (IMAGE,))
    check_equal(model, pruned, IMAGE)
    assert set(pruned.state_dict()) <= set(Net().state_dict())  # folded, under the original names

    expected = model(IMAGE)
    assert manager.make_permanent() is manager
    assert torch.equal(model(IMAGE), expected) and not any(map(parametrize.is_parametrized, model.modules()))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert {name: zeros(getattr(model, name)) for name in manager.masked} == before
    again = upscale.export(model, (IMAGE,))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in pruned.state_dict().items()}


def test_temporary_masks_can_be_changed_and_taken_back(model: Net) -> None:
    before = copy.deepcopy(model)
    manager = MaskingManager(model, example_inputs=IMAGE).mask({"one": 0.5, "two": 0.5}, permanent=False)
    manager.masks["one"] = kept(12, 3)
    assert zero_columns(model.one) == [3] and len(zero_columns(model.two)) == 5
    assert torch.equal(model.one.weight[:, :3], before.one.weight[:, :3])
    manager.mask(params=0.7, permanent=False)  # takes the place of both
    assert len(zero_columns(model.head)) > 0
    copied = copy.deepcopy(model)
    assert zero_columns(copied.one) == zero_columns(model.one) and copied.one.weight is not model.one.weight
    manager.mask(0.0)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.state_dict().items())


def test_an_error_leaves_temporary_masks_on(model: Net) -> None:
    manager = MaskingManager(model, example_inputs=IMAGE).mask(0.5, permanent=False)
    before, masks = model(IMAGE), dict(manager.masks)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match="cannot be met"):
        manager.mask(params=0.001)
    with pytest.raises(InputError, match="keeps no channel"):
        manager.masks["one"] = torch.zeros(12, dtype=torch.bool)
    assert torch.equal(model(IMAGE), before)
    assert all(torch.equal(mask, manager.masks[name]) for name, mask in masks.items())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_a_tied_weight_is_masked_wherever_it_is_used() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.rand(2, 6)
    model[4].weight = model[2].weight
    manager = MaskingManager(model, example_inputs=x).mask(0.5, permanent=False)
    assert zero_columns(model[4]) == zero_columns(model[2]) == manager.masked["2"].tolist()
    manager.make_permanent()
    assert model[4].weight is model[2].weight and zero_columns(model[4]) == manager.masked["2"].tolist()


def test_other_parametrisations_are_not_disturbed(model: Net) -> None:
    manager = MaskingManager(model, example_inputs=IMAGE).mask(0.5, permanent=False)
    parametrizations.weight_norm(model.stem)  # on a layer without a mask
    manager.make_permanent()
    assert parametrize.is_parametrized(model.stem) and len(zero_columns(model.one)) == 6
    manager.mask(0.5, permanent=False)
    parametrize.register_parametrization(model.one, "weight", nn.Identity())
    for call in (manager.make_permanent, manager.mask):
        with pytest.raises(UnsupportedModelError, match=r"one\.weight has another parametrisation"):
            call()
    assert len(model.one.parametrizations.weight) == 2


# -- one call ---------------------------------------------------------------------------------------------------------


def test_mask_returns_a_masked_copy(model: Net) -> None:
    before = fingerprint(model)
    masked = upscale.mask(model, IMAGE, amount=0.25, importance="l1", side="output", ignore=[model.two])
    assert fingerprint(model) == before and type(masked) is Net
    lowest = model.one.weight.detach().abs().sum((1, 2, 3)).argsort()[:2].tolist()
    assert zero_rows(masked.one) == sorted(lowest) and not zero_rows(masked.two)
    temporary = upscale.mask(model, (IMAGE,), amount=0.5, permanent=False)
    assert parametrize.is_parametrized(temporary.one, "weight")


def test_prune_masks_and_exports(model: Net, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint(model)
    pruned = upscale.prune(model, IMAGE, amount=0.5, method="contiguous")
    assert capsys.readouterr() == ("", "") and fingerprint(model) == before
    assert pruned.report.parameters[1] < pruned.report.parameters[0] == sum(p.numel() for p in model.parameters())
    check_equal(upscale.mask(model, IMAGE, amount=0.5, method="contiguous"), pruned, IMAGE)
    upscale.prune(model, IMAGE, verbose=True)
    assert "channels before -> after" in capsys.readouterr().out


def test_examples_may_have_keywords() -> None:
    class Keyword(Net):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return super().forward(x) * scale

    model = randomise(Keyword().double().eval())
    scale = torch.tensor([2.0], dtype=torch.float64)
    pruned = upscale.prune(model, IMAGE, {"scale": scale}, amount=0.5)
    assert pruned(IMAGE, scale=scale).shape == (4, 5)


def test_a_model_that_cannot_be_copied_is_refused(model: Net) -> None:
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="cannot be copied.*MaskingManager"):
        upscale.mask(model, IMAGE)


@pytest.mark.parametrize("call", [{"flops": 0.0001}, {"amount": 2}, {"importance": "l3"}, {"ignore": "nothing"}])
def test_errors_of_one_call_leave_the_model(model: Net, call: dict[str, Any]) -> None:
    before = fingerprint(model)
    with pytest.raises(InputError):
        upscale.prune(model, IMAGE, **call)
    assert fingerprint(model) == before


# -- masks of torch.nn.utils.prune ------------------------------------------------------------------------------------


def test_structured_masks_of_torch_are_taken_as_they_are(model: Net) -> None:
    prune.ln_structured(model.one, "weight", amount=0.5, n=2, dim=1)
    prune.ln_structured(model.two, "weight", amount=3, n=1, dim=1)
    prune.random_unstructured(model.two, "bias", amount=2)
    prune.ln_structured(model.stem, "weight", amount=0.25, n=2, dim=0)
    prune.ln_structured(model.head, "weight", amount=0.5, n=2, dim=1)
    pruned = upscale.export(model, (IMAGE,))
    check_equal(model, pruned, IMAGE)
    assert pruned.one.in_channels <= 6 and pruned.two.in_channels == 7 == pruned.one.out_channels
    assert pruned.head.in_features == 6
    assert all(hasattr(layer, "weight_mask") for layer in (model.one, model.two, model.head))  # still there
    with pytest.raises(UnsupportedModelError, match=r"prune\.remove"):
        MaskingManager(model, example_inputs=IMAGE)


# -- the guide --------------------------------------------------------------------------------------------------------


def test_the_documented_examples_run() -> None:
    text = (Path(__file__).parent.parent / "docs" / "masking.md").read_text()
    names: dict[str, Any] = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, "docs/masking.md", "exec"), names)
    check_equal(names["masked"].double(), names["smaller"].double(), names["x"].double())
    check_equal(names["model"].double(), names["small"].double(), names["x"].double())
    check_equal(names["other"].double(), names["ours"].double(), names["x"].double())
    left = sum(p.numel() for p in names["smaller"].parameters()) / sum(p.numel() for p in names["model"].parameters())
    assert left == pytest.approx(0.3, rel=0.01)


# -- bad scores through every face ------------------------------------------------------------------------------------


def fails(weight: Tensor) -> Tensor:
    raise ZeroDivisionError("my own trouble")


@pytest.mark.parametrize(
    ("score", "kind", "message"),
    [
        (lambda w: w.abs() * torch.nan, NonFiniteError, "NaN"),
        (lambda w: w.abs() + torch.inf, NonFiniteError, "infinite"),
        (lambda w: w.to(torch.complex128), InputError, "complex"),
        (lambda w: torch.ones(w.shape[1], dtype=torch.complex64), InputError, "complex"),
        (lambda w: torch.ones(w.shape[1] + 1), InputError, r"not one of shape \(\d+,\)"),
        (lambda w: w.abs().sum().item(), InputError, "not float"),
        (fails, InputError, "the heuristic failed on a weight of shape .*my own trouble"),
    ],
)
def test_scores_without_an_order_are_refused_by_layer(
    model: Net, score: Any, kind: type[Exception], message: str
) -> None:
    before = fingerprint(model)
    calls = [
        lambda: MaskingManager(model, example_inputs=IMAGE).importance(score),
        lambda: upscale.mask(model, IMAGE, importance=score),
        lambda: upscale.prune(model, IMAGE, importance=score),
    ]
    for call in calls:
        with pytest.raises(kind, match=f"^(one|two|head): .*{message}"):
            call()
    assert fingerprint(model) == before


def test_a_model_under_masks_of_torch_is_told_what_to_do_first() -> None:
    """After a call such a model cannot be copied; what it says is the same before and after."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    torch.nn.utils.prune.ln_structured(model[2], "weight", 0.5, n=2, dim=1)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"2.weight is not a parameter.*torch.nn.utils.prune.remove"):
            upscale.mask(model, torch.rand(2, 4), amount=0.5)
        model(torch.rand(2, 4))


def test_steps_may_follow_masks_that_are_not_permanent() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    manager = MaskingManager(model, example_inputs=torch.rand(2, 4))
    manager.mask(0.25, permanent=False)
    manager.mask(0.5, steps=2)
    assert {name: len(channels) for name, channels in manager.masked.items()} == {"2": 4, "4": 4}
    assert not parametrize.is_parametrized(model[2]) and int((model[2].weight.abs().sum(0) == 0).sum()) == 4

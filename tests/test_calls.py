"""Call signatures, guards, dynamic sizes, export in place, and the paper's two classes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.masks import Mask
from support.oracle import check_equal, fingerprint, parameter_count, rebatch, relative_error
from support.subjects import SmallResNet, dense, image, masked

Guarded = (AssertionError, RuntimeError, TypeError, ValueError, upscale.errors.UpscaleError)


class Two(nn.Module):
    """Two inputs, an optional third, a flag, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.c, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor, z: Tensor | None = None, *, flag: bool = False, scale: float = 1.0) -> Any:
        """Add what is there."""
        t = F.relu(self.a(x) + self.b(y)) * scale
        if z is not None:
            t = t + z
        if flag:
            t = -t
        t = self.c(t)
        return {"logits": self.fc(t.mean((2, 3))), "parts": (t, [x, 3]), "none": None}


def two() -> Any:
    """A masked :class:`Two`."""
    return masked(Two(), "input", 0.5, seed=4)


def test_positional_and_keyword_inputs() -> None:
    """Arguments go in by position or name as before; the nested result has the same structure."""
    model = two()
    x, y = image(seed=1), image(seed=2)
    pruned = upscale.export(model, (x,), {"y": y, "scale": 2.0})
    check_equal(model, pruned, x, kwargs={"y": y, "scale": 2.0})
    assert relative_error(model(y=y, x=x, scale=2.0), pruned(y=y, x=x, scale=2.0)) <= 1e-10
    assert list(pruned(x, y=y, scale=2.0)) == ["logits", "parts", "none"]


def test_defaults_stay_defaults() -> None:
    """What was left out may still be left out, and by position or keyword for the others."""
    model = two()
    x, y = image(seed=1), image(seed=2)
    pruned = upscale.export(model, (x, y))
    check_equal(model, pruned, x, y)
    check_equal(model, pruned, x, kwargs={"y": y})


@pytest.mark.parametrize("change", [{"flag": True}, {"scale": 3.0}, {"z": torch.zeros(2, 6, 10, 10).double()}])
def test_specialised_arguments_are_guarded(change: dict[str, Any]) -> None:
    """Another flag, number or optional tensor than at capture raises; it never gives the captured result."""
    pruned = upscale.export(two(), (image(seed=1), image(seed=2)))
    with pytest.raises(Guarded):
        pruned(image(seed=1), image(seed=2), **change)


def test_missing_or_additional_inputs_raise() -> None:
    """Wrong number of inputs, wrong rank, inputs that disagree in batch."""
    pruned = upscale.export(two(), (image(seed=1), image(seed=2)))
    for args in [(image(),), (image(), image(), None, 1), (image()[0], image()[0]), (image(3), image(2))]:
        with pytest.raises(Guarded):
            pruned(*args)


class Pair(NamedTuple):
    """A named tuple result."""

    first: Tensor
    second: Tensor


@dataclass
class Result:
    """A dataclass result."""

    logits: Tensor
    extra: Any = None


torch.utils._pytree.register_dataclass(Result, serialized_type_name="tests.Result")

OUTPUTS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, (b,)],
    "dict": lambda a, b: {"x": a, "y": {"z": b}},
    "ordered": lambda a, b: OrderedDict([("out", a), ("aux", b)]),
    "namedtuple": Pair,
    "dataclass": Result,
    "none": lambda a, b: (a, None, b, 7, "text"),
    "same": lambda a, b: (a, a),
    "single": lambda a, b: (b,),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_structures(name: str) -> None:
    """Tuples, dicts, ordered dicts, named tuples, dataclasses and constants come back as what they were."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.stem(x))
            return OUTPUTS[name](self.a(x), self.b(x).mean((2, 3)))

    model = masked(Model())
    pruned = upscale.export(model, (image(),))
    check_equal(model, pruned, image())
    assert type(pruned(image())) is type(model(image()))
    check_equal(model, copy.deepcopy(pruned), image())


class Measured(nn.Module):
    """Returns sizes of its input beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.a(x))
        return {"size": (x.shape, 2 * y.shape[2]), "batch": x.shape[0], "y": y}


@pytest.mark.parametrize("shapes", [None, "spatial"])
def test_sizes_may_be_returned(shapes: Any) -> None:
    model = masked(Measured())
    smaller = upscale.export(model, (image(),), dynamic_shapes=shapes)
    for batch in (1, 5):
        expected, found = model(image(batch)), smaller(image(batch))
        assert relative_error(expected.pop("y"), found.pop("y")) <= 1e-10
        assert found == expected and list(found) == ["size", "batch"]


def test_inputs_in_containers() -> None:
    """Dicts, lists and tuples of tensors as inputs; other lengths or keys raise."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, batch: dict[str, Tensor], more: list[Tensor]) -> dict[str, Tensor]:
            return {"out": self.c(self.a(batch["image"]) * batch["mask"] + self.b(more[0]))}

    model = masked(Model())
    args = ({"image": image(seed=1), "mask": image(seed=2)[:, :1]}, [image(seed=3)])
    pruned = upscale.export(model, args)
    check_equal(model, pruned, *args)
    for bad in [({"image": image()}, [image()]), (args[0], []), (args[0], [image(), image()])]:
        with pytest.raises((*Guarded, KeyError, IndexError)):
            pruned(*bad)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_is_dynamic_whatever_the_example(batch: int) -> None:
    """Also where the example has batch 1, which torch would specialise."""
    model = masked()
    pruned = upscale.export(model, (image(batch),))
    check_equal(model, pruned, image(batch), batches=(1, 2, 3, 7))


def test_other_sizes_raise_unless_asked_for() -> None:
    """A model that depends on the size it was captured at must not answer for another."""

    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.head(F.relu(self.down(x))), size=x.shape[-2:], mode="bilinear")

    model = masked(Segment())
    pruned = upscale.export(model, (image(size=12),))
    with pytest.raises(Guarded):
        pruned(image(size=16))
    free = upscale.export(model, (image(size=12),), dynamic_shapes="spatial")
    check_equal(model, free, image(size=12))
    for size in (9, 16, 20):
        check_equal(model, free, image(size=size))


def test_spatial_size_on_request() -> None:
    """A residual network captured with free height and width works at others, not square ones too."""
    model = masked()
    free = upscale.export(model, (image(size=12),), dynamic_shapes="spatial")
    for shape in [(1, 3, 16, 16), (3, 3, 12, 20), (2, 3, 9, 11)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        check_equal(model, free, x)


def test_in_place_keeps_the_object() -> None:
    """The same object, pruned; hooks run once; copies, modes and training work."""
    model = masked()
    reference = copy.deepcopy(model)
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    before = id(model)
    result = upscale.export(model, (image(),), inplace=True)
    assert result is model and id(model) == before
    check_equal(reference, model, image())
    calls.clear()
    model(image())
    assert len(calls) <= 1
    assert isinstance(model.layer1[0].conv1, nn.Conv2d)
    assert parameter_count(model) < parameter_count(reference)
    assert str(model.report)
    twin = copy.deepcopy(model)
    check_equal(reference, twin, image())
    twin.train()
    twin(image()).sum().backward()
    assert twin.fc.weight.grad is not None
    assert relative_error(reference(image()), torch.export.export(model, (image(),)).module()(image())) <= 1e-10


def test_hooks_that_change_the_output_act_once() -> None:
    """A hook on a layer and one on the whole model, in place and not."""
    for inplace in (False, True):
        model = masked()
        model.layer1[0].register_forward_hook(lambda module, args, output: output * 2)
        model.register_forward_hook(lambda module, args, output: output + 1)
        expected = model(image(3))
        pruned = upscale.export(model, (image(),), inplace=inplace)
        assert relative_error(expected, pruned(image(3))) <= 1e-10


def test_in_place_on_a_submodule() -> None:
    """A model that cannot be captured whole is pruned where it can be."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = SmallResNet(8, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.backbone(x)
            return [self.head(row) for row in y if row.sum().item() > -1e9]

    model = masked(Detector())
    reference = copy.deepcopy(model)
    with pytest.raises(upscale.errors.CaptureError):
        upscale.export(model, (image(),))
    backbone = model.backbone
    upscale.export(model.backbone, (image(),), inplace=True)
    assert model.backbone is backbone
    check_equal(reference, model, image())
    assert parameter_count(model) < parameter_count(reference)
    check_equal(reference, copy.deepcopy(model), image())
    model.train(), model.eval()
    check_equal(reference, model, image())


def test_training_mode_is_kept() -> None:
    """A model given in train mode is exported with eval semantics and comes back in train mode, as the user's stays."""
    model = masked().train()
    before = fingerprint(model)
    pruned = upscale.export(model, (image(),))
    assert fingerprint(model) == before
    check_equal(model.eval(), pruned.eval(), image())


def manager(model: nn.Module) -> Any:
    """The paper's class on a model."""
    return upscale.PruningManager(model)


def test_manager_prunes_in_place() -> None:
    """``compute().prune()`` changes the caller's object; zeros are found where no channel is named."""
    model = masked()
    reference = copy.deepcopy(model)
    manager(model).compute(image()).prune()
    check_equal(reference, model, image())
    assert parameter_count(model) < parameter_count(reference)


@pytest.mark.parametrize("baseline", [False, True])
def test_manager_with_named_channels(baseline: bool) -> None:
    """Channels named, no weight zero: the result is that of the mock model."""
    model = dense(SmallResNet())
    before = fingerprint(model)
    named = [("layer1.1.conv1.weight", 5), ("layer1.1.conv1.weight", 2), ("layer2.0.conv1.weight", 0)]
    computed = manager(model).compute(image(), pruned_inputs=named, pruned_outputs=[("layer1.0.conv1.weight", 3)])
    mock = computed.get_mock_model()
    assert fingerprint(model) == before, "compute or get_mock_model touched the model"
    assert parameter_count(mock) == parameter_count(model)
    assert bool((mock.layer1[1].conv1.weight[:, [2, 5]] == 0).all())
    assert relative_error(model(image()), mock(image())) > 1e-6
    expected = copy.deepcopy(mock)
    computed.prune(baseline=baseline)
    check_equal(expected, model, image())
    assert parameter_count(model) < parameter_count(expected)


def test_manager_ignores_zeros_where_channels_are_named() -> None:
    """Zeros are looked for only where both lists are None."""
    model = masked()
    computed = manager(model).compute(image(), pruned_inputs=[("fc.weight", 1)])
    check_equal(computed.get_mock_model(), copy.deepcopy(model).eval(), image(), tol=float("inf"))
    mock = copy.deepcopy(computed.get_mock_model())
    computed.prune()
    check_equal(mock, model, image())
    assert model.fc.in_features == 15 and model.layer1[0].conv1.in_channels == 8


def test_manager_mock_model_is_trainable() -> None:
    """Unpruned in shape, and gradients flow through a step of training."""
    model = dense(SmallResNet())
    mock = manager(model).compute(image(), pruned_inputs=[("fc.weight", 1)]).get_mock_model()
    mock.train()
    optimiser = torch.optim.SGD(mock.parameters(), lr=0.1)
    mock(image(4)).square().mean().backward()
    optimiser.step()
    assert mock.fc.weight.shape == (5, 16)
    assert mock.fc.weight.grad is not None


def test_manager_constrained_needs_all_pixels_of_a_flattened_channel_unread() -> None:
    """Some columns of a channel are zero: the layer still reads it."""
    model = dense(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2)))
    with torch.no_grad():
        model[3].weight[:, [0, 10, 20]] = 0  # a pixel of channels 0, 1 and 2
        model[3].weight[:, 27:] = 0  # all of channel 3
    x = image(size=3)
    computed = manager(model).compute(x, constrained=True)
    pruned = computed.prune()
    assert (pruned.get_submodule("0").out_channels, pruned.get_submodule("3").in_features) == (3, 27)


def test_manager_constrained_grows_until_all_agree() -> None:
    """No read is a copy, and the mock model of the grown masks is the oracle."""
    model = dense(SmallResNet())
    Mask("input", 0.25).apply(nn.ModuleList([model.layer1, model.layer2, model.fc]))
    computed = manager(model).compute(image(), constrained=True)
    mock = copy.deepcopy(computed.get_mock_model())
    computed.prune()
    check_equal(mock, model, image())
    assert not {"gather", "concat", "channelwise", "collect"} & set(model.report.reads)


@pytest.mark.parametrize("producer", [True, False])
@pytest.mark.parametrize("consumer", [True, False])
def test_manager_reorder_flags(producer: bool, consumer: bool) -> None:
    """Channels change their order only where both may; either way the numbers stay."""
    model = masked(kind="both")
    reference = copy.deepcopy(model)
    manager(model).compute(image(), reorder_producer=producer, reorder_consumer=consumer).prune()
    check_equal(reference, model, image())
    layouts = [layout.positions for layout in model.report.plan.layouts.values()]
    assert all(positions == tuple(sorted(positions)) for positions in layouts) is not (producer and consumer)


def test_manager_trace() -> None:
    """``trace()`` does not change the model and gives something to look at."""
    model = masked()
    before = fingerprint(model)
    assert manager(model).compute(image()).trace() is not None
    assert fingerprint(model) == before


def test_masks_of_torch_prune_and_parametrize() -> None:
    """Masks of ``torch.nn.utils.prune`` and of parametrisations are read as the masks they are."""
    from torch.nn.utils import parametrize, prune

    class Drop(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            keep = torch.ones(weight.shape[1], dtype=weight.dtype)
            keep[::2] = 0
            return weight * keep.view(1, -1, 1, 1)

    model = dense(SmallResNet())
    prune.ln_structured(model.layer1[0].conv2, "weight", 0.5, n=2, dim=1)
    prune.random_structured(model.layer2[0].conv1, "weight", 0.5, dim=0)
    parametrize.register_parametrization(model.layer2[1].conv2, "weight", Drop())
    model(image())
    before = fingerprint(model)
    pruned = upscale.export(model, (image(),))
    assert fingerprint(model) == before
    check_equal(model, pruned, image())
    assert pruned.layer1[0].conv2.in_channels == 4 and pruned.layer2[1].conv2.in_channels == 8
    assert isinstance(pruned.layer2[1].conv2.weight, nn.Parameter)


@pytest.mark.parametrize("kind", ["input", "output_bn", "both", "layer", "single_input"])
def test_verification_runs_at_another_batch(kind: str) -> None:
    """With ``verify=True`` (the default) the report says what was compared."""
    model = dense(SmallResNet())
    Mask(kind, 0.5, 1).apply(model, (image(),))
    pruned = upscale.export(model, (image(),))
    assert pruned.report.error is not None and pruned.report.error <= 1e-10
    assert len(set(pruned.report.batches)) >= 2
    assert relative_error(model(rebatch(image(), 4, 3)), pruned(rebatch(image(), 4, 3))) <= 1e-10

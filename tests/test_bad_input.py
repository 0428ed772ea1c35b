"""Bad input gets a clear error of this library, and the user's model stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, fingerprint, relative_error
from support.subjects import SmallResNet, dense, image, masked
from upscale import errors


def refuses(kind: type[Exception], call: Callable[[], Any], model: nn.Module, *names: str) -> str:
    """``call`` raises ``kind``, its message holds all ``names``, ``model`` is untouched; the message."""
    before = fingerprint(model)
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, errors.UpscaleError)
    assert fingerprint(model) == before, "the user's model was touched"
    message = str(caught.value)
    for name in names:
        assert name in message, f"{name!r} is not in the message: {message}"
    return message


def named(model: nn.Module, **channels: list[tuple[str, int]]) -> Callable[[], Any]:
    """A call of ``compute`` with named channels."""
    return lambda: upscale.PruningManager(model).compute(image(), **channels)


def test_all_errors_are_of_one_family() -> None:
    """One ``except`` catches everything."""
    kinds = [getattr(errors, name) for name in dir(errors) if name.endswith("Error") and name != "UpscaleError"]
    assert len(kinds) >= 9 and all(issubclass(kind, errors.UpscaleError) for kind in kinds)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_prune(inplace: bool) -> None:
    """No zero channel: said, with what would be."""
    model = dense(SmallResNet())
    call = lambda: upscale.export(model, (image(),), inplace=inplace)  # noqa: E731
    refuses(errors.NothingToPruneError, call, model, "nothing to prune", "MaskingManager")


def test_unstructured_zeros_are_no_channels() -> None:
    """Nine in ten weights are zero, but no whole channel is."""
    model = dense(SmallResNet())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter[:, :, 1:] = 0
    refuses(errors.NothingToPruneError, lambda: upscale.export(model, (image(),)), model)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 12, 12), (2, 12, 12), (2, 3, 12), (0, 3, 12, 12), ()],
    ids=["channels", "rank3", "rank", "empty", "0d"],
)
def test_wrong_example_shape(shape: tuple[int, ...]) -> None:
    """An example that the model does not accept."""
    model = masked()
    refuses(errors.InputError, lambda: upscale.export(model, (torch.zeros(shape).double(),)), model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "args, kwargs",
    [((), None), ((None,), None), (("image",), None), ((image(), image()), None), ((image(),), {"colour": 1})],
    ids=["none", "None", "text", "two", "unknown keyword"],
)
def test_wrong_arguments(args: tuple[Any, ...], kwargs: dict[str, Any] | None, inplace: bool) -> None:
    """Missing, superfluous and unknown arguments."""
    model = masked()
    refuses(errors.InputError, lambda: upscale.export(model, args, kwargs, inplace=inplace), model)


def test_keyword_inputs_given_as_positional_ones() -> None:
    """The message says where they belong."""
    model = masked()
    refuses(errors.InputError, lambda: upscale.export(model, {"x": image()}), model, "dict", "kwargs")


def test_wrong_dtype_of_the_example() -> None:
    """A float32 image for a float64 model."""
    model = masked()
    refuses(errors.InputError, lambda: upscale.export(model, (image().float(),)), model)


def test_unknown_options() -> None:
    """Misspelt modes are named together with the right ones."""
    model = masked()
    refuses(errors.InputError, lambda: upscale.export(model, (image(),), reads="fast"), model, "fast", "gather")  # type: ignore
    call = lambda: upscale.export(model, (image(),), dynamic_shapes="spacial")  # noqa: E731
    refuses(errors.InputError, call, model, "spacial")


@pytest.mark.parametrize("what", [lambda: SmallResNet, lambda: "resnet18", lambda: torch.zeros(1), lambda: None])
def test_not_a_model(what: Callable[[], Any]) -> None:
    """A class, a name, a tensor."""
    with pytest.raises(errors.UpscaleError):
        upscale.export(what(), (image(),))


def test_channel_out_of_range() -> None:
    """The message names the parameter, the index and how many channels there are."""
    model = dense(SmallResNet())
    for index in (16, 99, -17):
        call = named(model, pruned_inputs=[("layer2.1.conv1.weight", index)])
        refuses(errors.UnknownChannelError, call, model, "layer2.1.conv1.weight", str(index), "16")
    call = named(model, pruned_outputs=[("fc.weight", 5)])
    refuses(errors.UnknownChannelError, call, model, "fc.weight", "5")


def test_unknown_parameter_names_the_nearest() -> None:
    """A misspelt parameter name."""
    model = dense(SmallResNet())
    call = named(model, pruned_inputs=[("layer2.1.conv3.weight", 1)])
    refuses(errors.UnknownChannelError, call, model, "layer2.1.conv3.weight", "layer2.1.conv1.weight")
    refuses(errors.UnknownChannelError, named(model, pruned_outputs=[("layr1.0.conv1.weight", 1)]), model, "layer1.0")


@pytest.mark.parametrize(
    "bad", [[("fc.weight",)], ["fc.weight"], [("fc.weight", 1.5)], [("fc.weight", "1")], [(3, 3)], 7]
)
def test_malformed_channels(bad: Any) -> None:
    """Something else than a list of (name, index)."""
    model = dense(SmallResNet())
    refuses(errors.UpscaleError, named(model, pruned_inputs=bad), model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "bn1.weight", "fc.bias", "layer1.0.bn2.running_var"])
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    """The parameter or statistic is named."""
    model = masked()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[-1] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.NonFiniteError, match=name.replace(".", r"\.")):
        upscale.export(model, (image(),))
    after = model.state_dict()
    assert all(torch.equal(torch.nan_to_num(before[key]), torch.nan_to_num(after[key])) for key in before)


def test_output_that_became_constant() -> None:
    """A layer that is wholly zero on the only path: refused, and the layer is named."""
    model = masked()
    with torch.no_grad():
        model.fc.weight.zero_()
    refuses(errors.ConstantOutputError, lambda: upscale.export(model, (image(),)), model, "fc")
    model = dense(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with torch.no_grad():
        model.get_submodule("0").weight.zero_()
    refuses(errors.ConstantOutputError, lambda: upscale.export(model, (image(),)), model, "0.weight")


def test_output_that_is_partly_constant_is_no_refusal() -> None:
    """One of two outputs does not depend on the input any more."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            return self.a(x), self.b(x)

    model = dense(Heads())
    with torch.no_grad():
        model.a.weight.zero_()
    check_equal(model, upscale.export(model, (image(),)), image())


class Branching(nn.Module):
    """Looks at values: cannot become one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallResNet()

    def forward(self, x: Tensor) -> Tensor:
        """Data-dependent control flow."""
        y = self.net(x)
        if y.sum() > 0:  # THE LINE
            return y
        return -y


@pytest.mark.parametrize("inplace", [False, True])
def test_model_that_cannot_be_captured(inplace: bool) -> None:
    """torch's own message, the user's source line, and what to do."""
    model = masked(Branching())
    call = lambda: upscale.export(model, (image(),), inplace=inplace)  # noqa: E731
    message = refuses(errors.CaptureError, call, model, "test_bad_input.py", "submodule")
    assert "THE LINE" in message or "y.sum() > 0" in message


def test_model_that_raises_its_own_error() -> None:
    """An error of the user's ``forward`` is passed on inside ours, and modes are put back."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallResNet()

        def forward(self, x: Tensor) -> Tensor:
            self.net(x)
            raise ArithmeticError("my own trouble")

    model = masked(Broken()).train()
    refuses(errors.UpscaleError, lambda: upscale.export(model, (image(),)), model, "my own trouble")


def test_script_modules_and_slots_are_refused() -> None:
    """What cannot be captured or changed in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        script = torch.jit.trace(masked(), image())
    with pytest.raises(errors.UnsupportedModelError):
        upscale.export(script, (image(),))

    class Slotted(SmallResNet):
        __slots__ = ("extra",)

    model = masked(Slotted())
    refuses(errors.UnsupportedModelError, lambda: upscale.export(model, (image(),), inplace=True), model, "Slotted")


def test_compiled_wrapper_is_unwrapped_or_refused() -> None:
    """``torch.compile`` around the model."""
    model = masked()
    compiled = torch.compile(model, backend="eager")
    try:
        pruned = upscale.export(compiled, (image(),))  # type: ignore[arg-type]
    except errors.UnsupportedModelError:
        return
    check_equal(model, pruned, image())


@pytest.mark.parametrize("name", ["graph", "code", "meta", "report", "class", "a-b", "0", "module", "constants"])
def test_awkward_child_names(name: str) -> None:
    """Names of children that a GraphModule cannot hold are refused by name; all others work."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict() if name not in dir(nn.ModuleDict) else nn.Module()
            self.parts.add_module("first", nn.Conv2d(3, 6, 3))
            self.parts._modules[name] = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts._modules[name](self.parts._modules["first"](x).relu())  # type: ignore[misc]

    model = masked(Holder())
    before = fingerprint(model)
    try:
        pruned = upscale.export(model, (image(),))
    except errors.UnsupportedModelError as error:
        assert name in str(error)
    else:
        check_equal(model, pruned, image())
        check_equal(model, copy.deepcopy(pruned), image())
        assert set(pruned.state_dict()) <= set(model.state_dict())
    assert fingerprint(model) == before


@pytest.mark.parametrize("inplace", [False, True])
def test_verification_failure_names_the_first_layer(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    """A compiler that breaks a layer is caught, by name, and nothing was done in place."""
    import upscale.exporting as exporting

    real = exporting.lower

    def broken(*args: Any, **kwargs: Any) -> Any:
        program = real(*args, **kwargs)
        tensors = dict(program.tensors)
        tensors["layer2.0.conv2.weight"] = nn.Parameter(tensors["layer2.0.conv2.weight"] * 1.001)
        return dataclasses.replace(program, tensors=tensors)

    model = masked()
    expected = model(image())
    monkeypatch.setattr(exporting, "lower", broken)
    call = lambda: upscale.export(model, (image(),), inplace=inplace)  # noqa: E731
    refuses(errors.VerificationError, call, model, "layer2.0.conv2")
    assert relative_error(expected, model(image())) == 0
    assert isinstance(model, SmallResNet)


def test_masking_manager_refusals() -> None:
    """Sides, methods, amounts."""
    model = dense(SmallResNet())
    for options in ({"side": "left"}, {"method": "strict"}, {"is_global": 3}):
        refuses(errors.InputError, lambda o=options: upscale.MaskingManager(model, **o), model)
    manager = upscale.MaskingManager(model, example_inputs=image())
    for amount in (-0.1, 1.0, 7, float("nan"), "half"):
        refuses(errors.InputError, lambda a=amount: manager.mask(a), model)
    refuses(errors.InputError, lambda: manager.importance("l7"), model)  # type: ignore[arg-type]


def test_manager_order_of_calls() -> None:
    """``prune`` before ``compute`` is an error that says so."""
    model = masked()
    refuses(errors.UpscaleError, lambda: upscale.PruningManager(model).prune(), model, "compute")
    refuses(errors.UpscaleError, lambda: upscale.PruningManager(model).get_mock_model(), model, "compute")

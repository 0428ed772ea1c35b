"""The identity round trip: with nothing pruned, capture and emit give back every network of the list."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from upscale.capture import capture
from upscale.program import Program
from upscale.raising import raise_program

vision = pytest.importorskip("support.vision", reason="needs torchvision", exc_type=ImportError)
NETWORKS, build, input_shape = vision.NETWORKS, vision.build, vision.input_shape
_OPTIONS: dict[str, dict[str, Any]] = {"vit_b_16": {"image_size": 64}}
#: Children that eval mode never runs: their keys are not exported, and a note says so.
_TRAINING_ONLY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def shape(name: str, batch: int) -> tuple[int, ...]:
    """Small images, whatever the network was made for."""
    return (batch, 3, 64, 64) if name == "vit_b_16" else input_shape(name, batch)


def tensors(value: Any) -> list[Tensor]:
    """The results of a network in order."""
    if isinstance(value, Tensor):
        return [value]
    return list(value.values()) if isinstance(value, dict) else [item for item in value if item is not None]


def error(expected: Any, found: Any) -> float:
    """Largest difference relative to the largest value; the structures must be the same."""
    assert type(expected) is type(found)
    if isinstance(expected, dict):
        assert list(expected) == list(found)
    pairs = zip(tensors(expected), tensors(found), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def printed_layers(model: nn.Module) -> dict[str, str]:
    """What ``print`` shows of each layer of torch's own, or derived from one, by path."""
    shown = {}
    for path, module in model.named_modules():
        kind = next((k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.modules")), nn.Module)
        if kind is not nn.Module and not any(True for _ in module.children()):
            shown[path] = repr(module).replace(type(module).__name__, kind.__name__, 1)
    return shown


def kept(name: str, path: str) -> bool:
    return path.split(".")[0] not in _TRAINING_ONLY.get(name, ())


@pytest.fixture(scope="module", params=NETWORKS)
def trip(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Program, torch.fx.GraphModule]:
    """One network, its capture, and what was emitted."""
    name = request.param
    model = build(name, **_OPTIONS.get(name, {}))
    if name == "vit_b_16":  # three of twelve blocks do; in double, as the fused eager attention rounds differently
        model.encoder.layers = model.encoder.layers[:3]
        model = model.double()
    x = torch.randn(shape(name, 2), dtype=next(model.parameters()).dtype)
    program = capture(model, (x,))
    return name, model, program, raise_program(program)


def test_round_trip(trip: tuple[str, nn.Module, Program, torch.fx.GraphModule]) -> None:
    """Same outputs at three batch sizes, same keys, same printed layers, real containers."""
    name, model, program, emitted = trip
    dtype = next(model.parameters()).dtype
    for batch in (2, 1, 3):
        x = torch.randn(shape(name, batch), dtype=dtype)
        with torch.no_grad():
            assert error(model(x), emitted(x)) <= 1e-6
    assert list(emitted.state_dict()) == [key for key in model.state_dict() if kept(name, key)]
    assert printed_layers(emitted) == {k: v for k, v in printed_layers(model).items() if kept(name, k)}
    for path, module in model.named_modules():
        for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            if isinstance(module, kind) and kept(name, path):
                assert type(emitted.get_submodule(path)) is kind
    children = [child for child, _ in model.named_children() if kept(name, child)]
    assert [child for child, _ in emitted.named_children() if child != "constants"] == children
    for child in _TRAINING_ONLY.get(name, ()):
        assert any(child in note for note in program.notes)
    for key, value in emitted.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in emitted.state_dict().values()}
    assert type(emitted).__name__ == type(model).__name__ and not emitted.training


def test_copies(trip: tuple[str, nn.Module, Program, torch.fx.GraphModule]) -> None:
    """Deep copies and pickles compute the same and have the same modules; nothing of upscale is in the pickle."""
    name, model, _, emitted = trip
    heavy = sum(parameter.numel() for parameter in model.parameters()) > 30_000_000
    # Pickling hundreds of megabytes shows nothing more: the large ones are copied without their numbers.
    subject = copy.deepcopy(emitted).to("meta") if heavy else emitted
    x = torch.randn(shape(name, 1), dtype=next(model.parameters()).dtype).to("meta" if heavy else "cpu")
    data = pickle.dumps(subject)
    assert b"upscale." not in data
    with torch.no_grad():
        expected = subject(x)
        for module in (copy.deepcopy(subject), pickle.loads(data)):
            found = module(x)
            if heavy:
                assert [t.shape for t in tensors(found)] == [t.shape for t in tensors(expected)]
            else:
                assert error(expected, found) == 0
            assert list(module.state_dict()) == list(emitted.state_dict())
            assert [type(m) for m in module.modules()][1:] == [type(m) for m in emitted.modules()][1:]


def test_other_sizes_raise(trip: tuple[str, nn.Module, Program, torch.fx.GraphModule]) -> None:
    """The size of the image was fixed at capture: another one raises and says what to do."""
    name, model, _, emitted = trip
    x = torch.randn(shape(name, 2), dtype=next(model.parameters()).dtype)
    with pytest.raises(AssertionError, match="upscale: input .* size .* in dimension .*spatial"):
        emitted(torch.cat([x, x], -1))
    with pytest.raises(AssertionError, match="dimensions"):
        emitted(x[0])


def small() -> tuple[nn.Module, torch.fx.GraphModule, Tensor]:
    model = build("resnet18")
    x = torch.randn(2, 3, 64, 64)
    return model, raise_program(capture(model, (x,))), x


def test_train_mode() -> None:
    """After ``train()`` batch norm uses and updates statistics exactly as the original; gradients are the same."""
    model, emitted, x = small()
    model.train(), emitted.train()
    for module in (model, emitted):
        module(x).square().mean().backward()
    ours, theirs = emitted.state_dict(), model.state_dict()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key])
    for (name, a), b in zip(emitted.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert int(emitted.bn1.num_batches_tracked) == 1


class Drops(nn.Module):
    """Dropout as a layer and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
        self.dropout = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.body(x), 0.25, self.training)
        return nn.functional.dropout2d(self.dropout(x)[:, :, None, None], 0.5, self.training).flatten(1)


def test_dropout_works_again() -> None:
    """Layers and functions alike drop after ``train()``, and stop after ``eval()``."""
    model = Drops()
    emitted = raise_program(capture(model, (torch.randn(2, 4),)))
    x = torch.randn(64, 4)
    torch.testing.assert_close(emitted(x), model.eval()(x))
    for module in (emitted, copy.deepcopy(emitted), pickle.loads(pickle.dumps(emitted))):
        module.train()
        share = float((module(x) == 0).double().mean())
        assert 0.45 < share < 0.55
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))
    assert [type(m) for m in emitted.modules()].count(nn.Dropout) == 2
    assert list(emitted.state_dict()) == list(model.state_dict())


def test_export_and_compile_again() -> None:
    """The emitted module goes through torch.export with a free batch, through torch.compile, and through us."""
    _, emitted, x = small()
    with torch.no_grad():
        expected = emitted(torch.cat([x, x]))
        batch = torch.export.Dim.AUTO
        again = torch.export.export(emitted, (x,), dynamic_shapes=({0: batch},), strict=False)
        assert error(expected, again.module()(torch.cat([x, x]))) <= 1e-6
        compiled = torch.compile(emitted, backend="eager", dynamic=True, fullgraph=True)
        assert error(emitted(x), compiled(x)) <= 1e-6
        second = raise_program(capture(emitted, (x,)))
        assert error(expected, second(torch.cat([x, x]))) == 0
    assert list(second.state_dict()) == list(emitted.state_dict())
    assert printed_layers(second) == printed_layers(emitted)


def test_code_is_readable() -> None:
    """The generated code calls layers by their names, and plain functions between."""
    _, emitted, _ = small()
    for line in ('self.layer1, "0").conv1(', "self.maxpool(", "torch.flatten(", "self.fc("):
        assert line in emitted.code, emitted.code
    assert "torch.ops" not in emitted.code
    assert isinstance(emitted.layer1[0].conv1, nn.Conv2d)


def test_spatial_sizes_on_request() -> None:
    """With free height and width the network takes other images, and its conditions do not bite."""
    model = build("mobilenet_v2").features[:8]
    emitted = raise_program(capture(model, (torch.randn(1, 3, 64, 64),), dynamic_shapes="spatial"))
    for size in ((3, 3, 64, 64), (1, 3, 96, 80), (2, 3, 33, 224)):
        x = torch.randn(size)
        with torch.no_grad():
            assert error(model(x), emitted(x)) <= 1e-6

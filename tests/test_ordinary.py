"""What comes out is an ordinary PyTorch module: its layers, modes, training, copies, and further compilation."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import upscale
from support.oracle import check_equal, parameter_count, relative_error
from support.subjects import SmallResNet, dense, image, masked


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, torch.fx.GraphModule]:
    """A masked network and its export; tests that change either copy it first."""
    model = masked()
    return model, upscale.export(model, (image(),))


def test_layers_keep_type_name_and_place(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """Layers are reachable as before: attributes, indices, iteration."""
    model, pruned = pair
    assert isinstance(pruned, torch.fx.GraphModule)
    kinds = {name: type(module) for name, module in pruned.named_modules() if name and not list(module.children())}
    original = {name: type(module) for name, module in model.named_modules()}
    kinds.pop("constants", None)  # index tensors, where there are any, live in a plain module
    for name, kind in kinds.items():
        assert name in original, f"{name} is no layer of the original"
        assert kind is original[name], f"{name}: {original[name].__name__} became {kind.__name__}"
    assert isinstance(pruned.layer1[0].conv1, nn.Conv2d)
    assert isinstance(pruned.layer1, nn.Sequential) and len(pruned.layer1) == 2
    assert [type(block.conv2) for block in pruned.layer2] == [nn.Conv2d, nn.Conv2d]
    assert isinstance(pruned.layer2[0].downsample[1], nn.BatchNorm2d)
    assert isinstance(pruned.fc, nn.Linear) and isinstance(pruned.dropout, nn.Dropout)
    for name, layer in pruned.named_modules():
        if isinstance(layer, nn.Conv2d):  # printed sizes are the real ones
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups), name
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.shape == (layer.num_features,) == layer.running_mean.shape, name
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features), name


def test_state_dict_is_a_subset(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """No key is new, those gone are in the report, and no tensor is shared with the user's model."""
    model, pruned = pair
    before, after = model.state_dict(), pruned.state_dict()
    assert set(after) <= set(before)
    assert set(before) - set(after) == set(pruned.report.removed)
    assert [name for name in before if name in after] == list(after), "the order of the keys changed"
    storages = {tensor.untyped_storage().data_ptr() for tensor in before.values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in after.values() if tensor.numel()}
    assert all(parameter.requires_grad for parameter in pruned.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    """``requires_grad=False`` is kept, parameter by parameter."""
    model = masked()
    model.conv1.weight.requires_grad_(False)
    model.layer2[0].bn1.bias.requires_grad_(False)
    pruned = upscale.export(model, (image(),))
    frozen = {name for name, parameter in pruned.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1.weight", "layer2.0.bn1.bias"}


def test_code_and_report_are_readable(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """``print(pruned)``, ``pruned.code`` and ``pruned.report`` name the layers."""
    _, pruned = pair
    assert "(conv1): Conv2d(" in repr(pruned) and "(layer1): Sequential(" in repr(pruned)
    assert "self.conv1" in pruned.code or "self.L__self___conv1" not in pruned.code
    assert "layer1" in pruned.code and "def forward(self, x" in pruned.code
    report = str(pruned.report)
    assert "layer1.0.conv1" in report and "parameters" in report and "whole (the tensor as it is)" in report
    assert parameter_count(pruned) < parameter_count(SmallResNet())
    rows = tuple(dataclasses.replace(r, name=f"a.very.long.path.to.{r.name}") for r in pruned.report.layers)
    barrier = ("x (Y, y.py:1: z)", "aten.view.default", "because")
    longer = dataclasses.replace(pruned.report, layers=rows, barriers=(barrier, barrier), notes=("word " * 60,))
    text = str(longer)
    assert all(row.name in text for row in rows), "a name was broken over two lines"
    assert text.count("because") == 1 and "because (2 times)" in text and "word " * 59 in text
    assert max(map(len, longer.render(width=90).splitlines())) <= 90


def test_train_and_eval_switch_norm_and_dropout(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """Train mode uses batch statistics and dropout as the masked model does; eval mode gives the old result back."""
    model, pruned = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    x = image(8)
    expected = model(x)
    model.train(), pruned.train()
    assert pruned.layer1[0].bn1.training and pruned.dropout.training
    twin = copy.deepcopy(pruned)  # a call in train mode moves the running statistics
    assert relative_error(twin(x), twin(x)) > 1e-3, "dropout does nothing in train mode"
    model.dropout.p = pruned.dropout.p = 0.0
    before = pruned.layer1[0].bn1.running_mean.clone()
    assert relative_error(model(x), pruned(x)) <= 1e-10
    assert not torch.equal(before, pruned.layer1[0].bn1.running_mean), "running statistics were not updated"
    model.eval(), pruned.eval()
    assert relative_error(model(x), pruned(x)) <= 1e-10, "running statistics were updated differently"
    assert relative_error(expected, model(x)) > 1e-6
    assert not pruned.layer1[0].bn1.training


def test_gradients_and_training(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """All parameters get gradients, equal to the masked model's; SGD reduces a loss; the original is not trained."""
    model, pruned = pair[0], copy.deepcopy(pair[1])
    x, target = image(6), torch.arange(6) % 5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = nn.functional.cross_entropy(pruned(x), target)
    loss.backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin(x), target).backward()
    assert relative_error(twin.fc.bias.grad, pruned.fc.bias.grad) <= 1e-9
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.02)
    for _ in range(10):
        optimiser.zero_grad()
        step = nn.functional.cross_entropy(pruned(x), target)
        step.backward()
        optimiser.step()
    assert step < loss
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_deepcopy_and_pickle(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """Copies compute the same, are independent, and keep their report."""
    _, pruned = pair
    twin = copy.deepcopy(pruned)
    assert str(twin.report) == str(pruned.report)
    loaded = pickle.loads(pickle.dumps(pruned))
    assert str(loaded.report) == str(pruned.report)
    buffer = io.BytesIO()
    torch.save(pruned, buffer)
    buffer.seek(0)
    for other in (twin, loaded, torch.load(buffer, weights_only=False)):
        check_equal(pruned, other, image(), tol=0.0)
    with torch.no_grad():
        twin.fc.bias.add_(1.0)
    assert relative_error(pruned(image()), twin(image())) > 1e-6
    assert isinstance(loaded.layer1[0].conv1, nn.Conv2d)


def test_usable_without_this_library(pair: tuple[nn.Module, torch.fx.GraphModule], tmp_path: Path) -> None:
    """A pickled model loads and runs in a process that cannot import upscale, nor the original's class."""
    _, pruned = pair
    torch.save({"model": pruned, "x": image(3), "y": pruned(image(3)).detach()}, tmp_path / "pruned.pt")
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('upscale', 'support'):\n"
        "            raise ImportError('not installed here: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch\n"
        f"d = torch.load({str(tmp_path / 'pruned.pt')!r}, weights_only=False)\n"
        "assert torch.equal(d['model'](d['x']), d['y'])\n"
        "assert isinstance(d['model'].layer1[0].conv1, torch.nn.Conv2d)\n"
        "import copy; copy.deepcopy(d['model']).train()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_exports_again(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """``torch.export``, also with a dynamic batch, and saving of it."""
    model, pruned = pair
    batch = torch.export.Dim("batch", min=2, max=64)
    again = torch.export.export(copy.deepcopy(pruned), (image(),), dynamic_shapes=({0: batch},))
    check_equal(model, again.module(), image(), batches=(3, 5))
    buffer = io.BytesIO()
    torch.export.save(again, buffer)
    strict = torch.export.export(copy.deepcopy(pruned), (image(),), strict=True)
    assert relative_error(model(image()), strict.module()(image())) <= 1e-10


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles(pair: tuple[nn.Module, torch.fx.GraphModule], backend: str) -> None:
    """``torch.compile`` without a graph break."""
    torch._dynamo.reset()
    model, pruned = pair
    compiled = torch.compile(copy.deepcopy(pruned), backend=backend, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3):
            assert relative_error(model(image(batch)), compiled(image(batch))) <= 1e-10


def test_traces_and_scripts(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """``torch.fx`` and ``torch.jit.trace`` take it as any other module."""
    model, pruned = pair
    traced = torch.fx.symbolic_trace(copy.deepcopy(pruned))
    assert relative_error(model(image(3)), traced(image(3))) <= 1e-10


def test_export_of_an_export(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """Pruned again after a second mask; without one there is nothing to prune."""
    _, pruned = pair
    again = copy.deepcopy(pruned)
    with torch.no_grad():
        again.layer2[1].conv2.weight[:, 0] = 0
        again.layer2[1].conv1.weight[:, 1] = 0
    smaller = upscale.export(again, (image(),))
    check_equal(again, smaller, image())
    assert parameter_count(smaller) < parameter_count(again)


def test_channels_last_and_float32() -> None:
    """Another memory format and dtype."""
    model = masked().float().to(memory_format=torch.channels_last)
    x = image(dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    pruned = upscale.export(model, (x,))
    check_equal(model, pruned, x, tol=1e-5)


def test_custom_modules_of_the_user_need_not_exist(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """No submodule is of a class from the user's code or from this library."""
    for name, module in pair[1].named_modules():
        assert type(module).__module__.startswith("torch"), f"{name} is a {type(module)}"


def test_no_hooks_left_behind(pair: tuple[nn.Module, torch.fx.GraphModule]) -> None:
    """Neither on the original nor on the result."""
    for model in pair:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dense_model_round_trip() -> None:
    """A single zero channel: everything else is as it was, bit for bit in the state dict."""
    model = dense(SmallResNet())
    with torch.no_grad():
        model.layer2[1].conv2.weight[:, 3] = 0
    pruned = upscale.export(model, (image(),))
    check_equal(model, pruned, image())
    changed = {name for name, tensor in pruned.state_dict().items() if tensor.shape != model.state_dict()[name].shape}
    prefix = "layer2.1."
    names = {"conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv2.weight"}
    assert changed == {prefix + name for name in names}
    same = set(pruned.state_dict()) - changed
    assert all(torch.equal(pruned.state_dict()[name], model.state_dict()[name]) for name in same)

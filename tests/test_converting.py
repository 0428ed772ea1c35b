"""ONNX files of pruned models, run in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upscale
from support.oracle import fingerprint, relative_error
from support.subjects import SmallResNet, dense, image, masked
from test_saving import Tied
from test_saving_program import Beside
from upscale import converting

pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def pruned() -> torch.fx.GraphModule:
    """An exported network in float32; tests that change it copy it first."""
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 64, 5)
    return upscale.export(masked(nn.Sequential(*layers)).float(), (image(dtype=torch.float32),))


def answers(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What ONNX Runtime makes of a file."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})]


def test_any_batch_in_train_mode_or_not(pruned: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = copy.deepcopy(pruned).train()
    before = fingerprint(model)
    upscale.to_onnx(model, tmp_path / "a.onnx", opset=18)
    assert fingerprint(model) == before and [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    for batch in (1, 5):
        x = image(batch, dtype=torch.float32)
        (y,) = answers(tmp_path / "a.onnx", x)
        assert relative_error(pruned(x), y) <= 1e-4


def test_nested_arguments(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = dense(Tied())
    with torch.no_grad():
        model.last.weight[:, [1, 4]] = 0
    tokens, shift = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(2, 1, 6).double()
    smaller = upscale.export(model, (tokens,), {"extra": {"shift": shift}})
    upscale.to_onnx(smaller, tmp_path / "tied.onnx")
    found = answers(tmp_path / "tied.onnx", tokens, shift)
    for expected, actual in zip(model(tokens, extra={"shift": shift}).values(), found, strict=True):
        assert relative_error(expected, actual) <= 1e-10


def words(dtype: torch.dtype) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    layers = nn.Embedding(9, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 30)
    return upscale.prune(nn.Sequential(*layers).eval().to(dtype), torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_the_tolerance_is_that_of_the_weights(tmp_path: Path) -> None:
    """Also where all inputs are whole numbers."""
    pytest.importorskip("onnxruntime")
    upscale.to_onnx(words(torch.float16), tmp_path / "a.onnx")
    with pytest.raises(upscale.InputError, match="bfloat16.*check=False"):
        upscale.to_onnx(words(torch.bfloat16), tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_a_type_that_the_runtime_lacks_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
    double = upscale.export(masked(nn.Sequential(*layers)).double(), (image(),))
    with pytest.raises(upscale.ConversionError, match=r"in its type of numbers \(call float\(\).*check=False"):
        upscale.to_onnx(double, tmp_path / "a.onnx")
    upscale.to_onnx(double.float(), tmp_path / "a.onnx")


def test_sizes_may_be_returned_and_other_values_may_not(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = torch.rand(2, 8)
    upscale.to_onnx(upscale.prune(Beside("batch"), x), tmp_path / "a.onnx")
    assert int(answers(tmp_path / "a.onnx", torch.rand(5, 8))[1]) == 5
    upscale.to_onnx(upscale.prune(Beside(None), x), tmp_path / "b.onnx")
    for value in (3, "text", 2.5):
        with pytest.raises(upscale.ConversionError, match=f"the model returns {value!r}"):
            upscale.to_onnx(upscale.prune(Beside(value), x), tmp_path / "c.onnx")


def test_weights_in_a_second_file(pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch writes them above 2 GB."""
    pytest.importorskip("onnxruntime")
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    upscale.to_onnx(pruned, tmp_path / "a.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    x = image(3, dtype=torch.float32)
    assert relative_error(pruned(x), answers(tmp_path / "a.onnx", x)[0]) <= 1e-4


def test_a_file_that_computes_something_else_is_not_kept(
    pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "a.onnx").write_bytes(b"old")
    converted = converting._converted

    def wrong(program: Any, opset: int | None) -> Any:
        with torch.no_grad():
            program.state_dict["5.bias"] = nn.Parameter(program.state_dict["5.bias"] + 0.1)
        return converted(program, opset)

    monkeypatch.setattr(converting, "_converted", wrong)
    with pytest.raises(upscale.VerificationError, match="the ONNX file differs from the pruned model"):
        upscale.to_onnx(pruned, tmp_path / "a.onnx")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.onnx", b"old")]


def test_refusals(pruned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(upscale.InputError, match="must end in .onnx"):
        upscale.to_onnx(pruned, tmp_path / "a.pb")
    with pytest.raises(upscale.MismatchError, match="no pruned model"):
        upscale.to_onnx(SmallResNet(), tmp_path / "a.onnx", check=False)
    with pytest.raises(upscale.ConversionError, match="in opset 11.*leave opset out"):
        upscale.to_onnx(pruned, tmp_path / "a.onnx", opset=11, check=False)
    (tmp_path / "file").touch()
    with pytest.raises(upscale.FileError, match="cannot be written"):
        upscale.to_onnx(pruned, tmp_path / "file" / "a.onnx", check=False)
    monkeypatch.setattr(converting, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(upscale.InputError, match=r"onnxruntime missing: pip install .*\[onnx\].* check=False"):
        upscale.to_onnx(pruned, tmp_path / "a.onnx")
    monkeypatch.setattr(converting, "find_spec", lambda name: None)
    with pytest.raises(upscale.InputError, match="onnx, onnxscript missing"):
        upscale.to_onnx(pruned, tmp_path / "a.onnx", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]

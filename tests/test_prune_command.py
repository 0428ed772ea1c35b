"""``upscale prune``: from a name to files, and mistakes that write nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("typer")
pytest.importorskip("psutil")

import upscale
from support.classifiers import Residual, write_files
from support.command import in_process
from upscale.cli.prune import HELP

TESTS = Path(__file__).resolve().parent
NAME = "support.classifiers:residual"
Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``upscale prune`` in a folder that has weights of a small network and images."""
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, 40)
    return functools.partial(in_process, "prune")


COMMON = (NAME, "--weights", "w.safetensors", "--inputs", "2x3x16x16")


def original(path: Path) -> Residual:
    from safetensors.torch import load_file

    model = Residual().eval()
    model.load_state_dict(load_file(path / "w.safetensors"))
    return model


def test_the_file_is_the_masked_model(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    assert command(*COMMON, "--amount", 0.25, "--out", "m.safetensors") == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown and "written     m.safetensors" in shown
    masked = upscale.mask(original(tmp_path), (torch.rand(2, 3, 16, 16),), amount=0.25)
    loaded = upscale.load(out, Residual())
    x = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(loaded.eval()(x), masked(x), rtol=1e-4, atol=1e-5)
    assert loaded.report.parameters[1] < loaded.report.parameters[0]


def test_sides_methods_and_names_reach_the_library(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--side", "output", "--method", "constrained", "--importance", "l1", "--ignore", "last")
    assert command(*COMMON, "--amount", 0.25, *more, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    outputs = {row["name"]: row["outputs"] for row in found["report"]["layers"]}
    assert outputs["stem"] == outputs["inner"] == [16, 12]
    assert outputs["last"] == [24, 24] and found["written"] == []


def test_a_budget_is_met(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*COMMON, "--flops", 0.7, "--global", "--json") == 0
    before, after = json.loads(capsys.readouterr().out)["report"]["flops"]
    assert after / before == pytest.approx(0.7, abs=0.01)


def test_zeros_that_are_there_are_taken(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = original(tmp_path)
    with torch.no_grad():
        model.last.weight[:, :5] = 0
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert command(*COMMON, "--masked", "--json") == 0
    rows = {row["name"]: row["inputs"] for row in json.loads(capsys.readouterr().out)["report"]["layers"]}
    assert rows["last"] == [16, 11]


@pytest.mark.skipif(find_spec("PIL") is None, reason="pillow is not installed")
def test_images_are_evaluated_and_scored_with(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", "d.npz", "--mean", "0.5,0.5,0.5", "--std", "1,1,1")
    assert command(*COMMON, "--amount", 0.25, *data, "--eval", "--importance", "activation", "--json") == 0
    top1 = json.loads(capsys.readouterr().out)["top1"]
    arrays = np.load(tmp_path / "d.npz")
    x = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255 - 0.5
    with torch.no_grad():
        right = original(tmp_path)(x).argmax(1) == torch.from_numpy(arrays["labels"])
    assert 0 <= top1["after"] <= 100
    assert command(*COMMON, "--amount", 0.25, *data, "--eval", "--json") == 0  # nothing held out: all 40
    assert json.loads(capsys.readouterr().out)["top1"]["before"] == pytest.approx(100 * right.double().mean().item())


def test_a_program_needs_no_architecture(command: Command, tmp_path: Path) -> None:
    assert command(*COMMON, "--amount", 0.25, "--out", "m.pt2", "--quiet") == 0
    masked = upscale.mask(original(tmp_path), (torch.rand(2, 3, 16, 16),), amount=0.25)
    x = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(upscale.load(tmp_path / "m.pt2")(x), masked(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
def test_onnx_computes_the_same(command: Command, tmp_path: Path) -> None:
    import onnxruntime

    assert command(*COMMON, "--amount", 0.25, "--onnx", "m.onnx", "--quiet") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    masked = upscale.mask(original(tmp_path), (torch.rand(2, 3, 16, 16),), amount=0.25)
    x = torch.rand(3, 3, 16, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), masked(x).detach(), rtol=1e-4, atol=1e-5)


def test_quiet_prints_nothing(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*COMMON, "--amount", 0.25, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


MISTAKES = [
    (COMMON, "give one of --amount, --flops, --params, --latency, not none"),
    ((*COMMON, "--amount", "0.5", "--flops", "0.5"), "not --amount and --flops"),
    ((*COMMON, "--amount", "0.5", "--masked"), "--masked takes the zeros that are there: leave out --amount"),
    ((*COMMON, "--masked"), "nothing to prune"),
    ((*COMMON, "--amount", "1.5"), "amount must be at least 0 and less than 1"),
    ((*COMMON, "--flops", "0.001"), "flops"),
    ((*COMMON, "--amount", "0.5", "--ignore", "nowhere"), "'nowhere' matches no convolution or linear layer"),
    ((*COMMON, "--amount", "0.5", "--importance", "l3"), "--importance: 'l3' is none of l1, l2"),
    ((*COMMON, "--amount", "0.5", "--importance", "hrank"), "--importance hrank needs images: say where with --data"),
    ((*COMMON, "--amount", "0.5", "--eval"), "--eval needs images: say where with --data"),
    ((*COMMON, "--amount", "0.5", "--out", "m.bin"), "--out: m.bin must end in .safetensors or .pt2"),
    ((*COMMON, "--amount", "0.5", "--out", "w.safetensors"), "w.safetensors is there already; replace it with --force"),
    ((*COMMON, "--amount", "0.5", "--out", "no/m.pt2"), "--out: there is no folder no"),
    ((*COMMON, "--amount", "0.5", "--data", "nowhere", "--eval"), "nowhere is no folder and no .npz file"),
    ((NAME, "--amount", "0.5", "--weights", "d.npz"), "cannot read d.npz"),
    (
        ("support.classifiers:features", *COMMON[3:], "--amount", "0.5", "--data", "d.npz", "--eval"),
        "must return one tensor of (images, classes)",
    ),
    ((*COMMON, "--amount", "0.5", "--data", "many.npz", "--eval"), "the data has 10 classes, Residual only 4"),
    (("support.classifiers:nothing", "--amount", "0.5"), "cannot build support.classifiers:nothing"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:28] for _, message in MISTAKES])
def test_a_mistake_is_one_message_and_nothing_is_written(
    command: Command, arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "many.npz", images=np.zeros((40, 16, 16, 3), np.uint8), labels=np.arange(40) % 10)
    assert command(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "many.npz", "w.safetensors"]


def test_force_replaces(command: Command, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"old")
    assert command(*COMMON, "--amount", 0.25, "--out", "m.safetensors", "--force", "--quiet") == 0
    upscale.load(tmp_path / "m.safetensors", Residual())


def test_help_shows_its_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from upscale.cli.app import run

    monkeypatch.setenv("COLUMNS", "200")
    assert run(["prune", "--help"]) == 0
    shown = capsys.readouterr().out
    for example in (text.strip() for text in HELP.splitlines() if text.startswith("  upscale ")):
        assert example in shown

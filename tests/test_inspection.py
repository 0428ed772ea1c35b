"""``upscale.inspect`` and ``upscale inspect``: what layers share, before anything is masked."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.command import in_process
from support.oracle import fingerprint
from upscale import InputError
from upscale.inspection import Space

IMAGE = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    """A stream with two readers, a depthwise and a grouped convolution, and an operator that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depth, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1)
        self.parts = nn.Conv2d(12, 12, 1, groups=2)
        self.lost, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.mix(self.depth(x + self.inner(x)))
        x = self.lost(self.parts(x)).mean((2, 3))
        return self.head(torch.cumsum(x, 1))


def test_spaces_layers_and_barriers_are_found_and_the_model_is_left() -> None:
    model = Net()
    before = fingerprint(model)
    found = upscale.inspect(model, IMAGE)
    assert fingerprint(model) == before
    assert found.spaces[0] == Space(8, ("stem", "inner"), ("inner", "mix"))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.layers["mix"] == ("Conv2d", 8, 12) and len(found.layers) == 7
    assert {"parts", "lost", "head"} <= set(found.apart) and "depth" not in found.apart
    assert [operator for _, operator, _ in found.barriers] == ["aten.cumsum.default"]
    where = found.barriers[0][0]
    assert "test_inspection.py" in where and "cumsum" in where


def test_names_are_printed_as_they_are() -> None:
    layers = {"[red]": nn.Conv2d(3, 4, 1), "a:x:b": nn.Conv2d(4, 4, 1), "[last]": nn.Conv2d(4, 2, 1)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    text = str(upscale.inspect(model, IMAGE))
    assert "│ [red]      │ a:x:b   │" in text and "│ a:x:b      │ [last]  │" in text


def test_findings_print_and_are_plain_data() -> None:
    found = upscale.inspect(Net(), (IMAGE,))
    text = str(found)
    assert "stem, inner" in text and "7 layers" in text and "barrier     aten.cumsum.default at " in text
    assert max(map(len, found.render(60).splitlines())) <= 60
    data = json.loads(json.dumps(found.to_dict()))
    assert data["layers"]["stem"] == {"kind": "Conv2d", "inputs": 3, "outputs": 8}
    assert data["spaces"][0] == {"channels": 8, "producers": ["stem", "inner"], "readers": ["inner", "mix"]}


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError):
        upscale.inspect("resnet18", IMAGE)  # type: ignore[arg-type]


# -- the command ------------------------------------------------------------------------------------------------------

pytest.importorskip("typer")
pytest.importorskip("psutil")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynets.py").write_text(
        "import torch\n"
        "def small():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))\n"
        "def broken():\n"
        "    raise RuntimeError('no such thing')\n"
        "def number():\n"
        "    return 3\n"
    )
    return functools.partial(in_process, "inspect")


def test_ones_own_model_in_text_and_json(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("mynets:small", "--inputs", "1x3x9x9") == 0  # type: ignore[operator]
    assert "1 spaces" in capsys.readouterr().out
    assert command("mynets:small", "--json") == 0  # type: ignore[operator]
    data = json.loads(capsys.readouterr().out)
    assert data["spaces"] == [{"channels": 8, "producers": ["0"], "readers": ["2"]}]


def test_weights_and_a_program_of_torch_export(
    command: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert command("mynets:small", "--weights", "w.pt") == 0  # type: ignore[operator]
    capsys.readouterr()
    torch.export.save(torch.export.export(model, (IMAGE,)), tmp_path / "m.pt2")
    assert command("m.pt2", "--json") == 0  # type: ignore[operator]
    assert json.loads(capsys.readouterr().out)["spaces"][0]["channels"] == 8


MISTAKES = [
    (("mynets:broken",), "cannot build mynets:broken: no such thing"),
    (("mynets:number",), "returned int, not an nn.Module"),
    (("mynets:large",), "cannot build mynets:large"),
    (("mynets:small", "--inputs", "1x4x9x9"), "does not take these inputs"),
    (("mynets:small", "--inputs", "1x3xx"), "cannot read the input '1x3xx'"),
    (("mynets:small", "--weights", "bad.pt"), "cannot read bad.pt"),
    (("nothing.pt2",), "there is no file nothing.pt2"),
    (("hf:.",), "there is no config.json; give a folder of save_pretrained()"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_a_mistake_is_one_message_and_status_2(
    command: object, arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert command(*arguments) == 2  # type: ignore[operator]
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_names_of_libraries_have_near_matches(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("timm") is None:  # not imported here: it wants torchvision's operators first
        pytest.skip("timm is not installed")
    assert command("resnet19") == 2  # type: ignore[operator]
    assert "did you mean resnet18" in capsys.readouterr().err
    assert command("torchvision:resnet19") == 2  # type: ignore[operator]
    assert "torchvision has no model 'resnet19': did you mean" in capsys.readouterr().err

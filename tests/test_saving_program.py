"""``.pt2`` files: a whole program, for inference, without pickled parts. And the documented examples."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import upscale
from support.oracle import check_equal, fingerprint
from support.saved import same_bits
from support.subjects import SmallResNet, dense, image, masked
from test_saving import Tied
from test_saving_refusals import FUZZ

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pruned() -> torch.fx.GraphModule:
    """An exported network; tests that change it copy it first."""
    return upscale.export(masked(), (image(),))


@pytest.fixture(scope="module")
def content(pruned: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("program") / "pruned.pt2"
    upscale.save(pruned, path)
    return path.read_bytes()


@pytest.fixture
def saved(content: bytes, tmp_path: Path) -> Path:
    (tmp_path / "pruned.pt2").write_bytes(content)
    return tmp_path / "pruned.pt2"


def test_a_program_needs_no_architecture(pruned: Any, saved: Path) -> None:
    """Another process, without the class; batches from one on; what was specialised is guarded."""
    loaded = upscale.load(saved)
    check_equal(pruned, loaded, image(), batches=(1, 2, 3, 5))
    assert loaded.report == pruned.report
    with pytest.raises((RuntimeError, AssertionError)):
        loaded(image(2, size=13))
    torch.save({"x": image(3), "y": pruned(image(3)).detach()}, saved.with_suffix(".pt"))
    program = (
        f"import torch, upscale\nmodel, seen = upscale.load({str(saved)!r}), torch.load({str(saved)[:-1]!r})\n"
        "assert torch.equal(model(seen['x']), seen['y'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_saving_leaves_the_model_as_it_is(pruned: Any, tmp_path: Path) -> None:
    """In train mode, on converted weights: saved in eval mode, and nothing is changed."""
    model = copy.deepcopy(pruned).half().train()
    before = fingerprint(model)
    upscale.save(model, tmp_path / "half.pt2")
    assert fingerprint(model) == before
    x = image(3, dtype=torch.float16)
    assert same_bits(model.eval()(x), upscale.load(tmp_path / "half.pt2")(x))


def test_nested_arguments_and_free_sizes(tmp_path: Path) -> None:
    model = dense(Tied())
    with torch.no_grad():
        model.last.weight[:, [1, 4]] = 0
    tokens, kwargs = torch.tensor([[1, 2, 3], [4, 5, 6]]), {"extra": {"shift": torch.zeros(2, 1, 6).double()}}
    upscale.save(upscale.export(model, (tokens,), kwargs), tmp_path / "tied.pt2")
    loaded = upscale.load(tmp_path / "tied.pt2")
    kwargs = {"extra": {"shift": torch.rand(3, 1, 6).double()}}
    torch.testing.assert_close(loaded(tokens[[0, 1, 0]], **kwargs), model(tokens[[0, 1, 0]], **kwargs))
    wide = upscale.export(masked(), (image(),), dynamic_shapes="spatial")
    upscale.save(wide, tmp_path / "wide.pt2")
    check_equal(wide, upscale.load(tmp_path / "wide.pt2"), image(1, size=17))


def test_what_makes_no_sense(pruned: Any, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(upscale.InputError, match="by its path alone"):
        upscale.load(saved, SmallResNet())
    torch.export.save(torch.export.export(SmallResNet().eval(), (torch.rand(2, 3, 12, 12),)), tmp_path / "own.pt2")
    with pytest.raises(upscale.FileError, match="not written by upscale.save: load it with torch.export.load"):
        upscale.load(tmp_path / "own.pt2")
    for content in (b"", b"text", b"PK\x03\x04"):
        (tmp_path / "bad.pt2").write_bytes(content)
        with pytest.raises(upscale.FileError, match="bad.pt2"):
            upscale.load(tmp_path / "bad.pt2")


def _rewritten(path: Path, change: dict[str, bytes]) -> None:
    """The archive with entries replaced or added, and the checksum made to fit."""
    from upscale.saving import archive

    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()} | {f"archive/{k}": v for k, v in change.items()}
    head = json.loads(entries.pop("archive/extra/upscale.json"))
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data)
        head["sha256"] = archive._digest(new, head["body"])
        new.writestr("archive/extra/upscale.json", json.dumps(head))


def test_pickled_parts_are_refused(saved: Path, content: bytes) -> None:
    """Torch would unpickle them; a file with a fitting checksum is refused before it is handed to torch."""
    with zipfile.ZipFile(saved) as archive:
        config = json.loads(archive.read("archive/data/weights/model_weights_config.json"))
    assert not any(entry["use_pickle"] for entry in config["config"].values()), "we write none"
    next(iter(config["config"].values()))["use_pickle"] = True
    for change in (
        {"data/weights/model_weights_config.json": json.dumps(config).encode()},
        {"data/sample_inputs/model.pt": b"\x80\x04."},
        {"data/weights/model.pt": b"\x80\x04."},
        {"data/constants/opaque_obj_0": b"\x80\x04."},
        {"data/aotinductor/model/code.so": b"\x7fELF"},
    ):
        saved.write_bytes(content)
        _rewritten(saved, change)
        with pytest.raises(upscale.FileError, match="holds (a )?pickled"):
            upscale.load(saved)
    saved.write_bytes(content)
    _rewritten(saved, {})
    upscale.load(saved)  # the same, with nothing changed, is read: the refusals above have one cause


def test_damage(saved: Path, content: bytes) -> None:
    """Cut or changed anywhere: refused, or nothing of what is read has changed (dates, padding)."""
    expected = upscale.load(saved)(image(3))
    refused = 0

    @FUZZ
    @given(st.integers(0, len(content) - 1), st.integers(0, 255))
    def prove(place: int, change: int) -> None:
        nonlocal refused
        changed = bytearray(content)
        changed[place] ^= change
        saved.write_bytes(bytes(changed) if change else content[:place])
        try:
            loaded = upscale.load(saved)
        except upscale.FileError:
            refused += 1
            return
        assert torch.equal(expected, loaded(image(3)))

    prove()
    assert refused > 30


class Beside(nn.Sequential):
    """Returns something beside a tensor."""

    def __init__(self, what: Any) -> None:
        super().__init__(nn.Linear(8, 6), nn.Linear(6, 3))
        self.what = what

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x.shape[0] if self.what == "batch" else self.what


def test_a_program_that_torch_does_not_read_is_not_kept(tmp_path: Path) -> None:
    texts = upscale.prune(Beside("text"), torch.rand(2, 8))
    with pytest.raises(upscale.FileError, match=r"does it return a text.*\.safetensors"):
        upscale.save(texts, tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
    upscale.save(upscale.prune(Beside("batch"), torch.rand(2, 8)), tmp_path / "a.pt2")
    assert upscale.load(tmp_path / "a.pt2")(torch.rand(5, 8))[1] == 5


def test_the_documented_examples_run() -> None:
    text = (ROOT / "docs" / "saving.md").read_text()
    names: dict[str, Any] = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(code, "docs/saving.md", "exec"), names)
    with torch.no_grad():
        assert torch.equal(names["program"](names["x"]), names["pruned"](names["x"]))
    assert names["pruned"].get_submodule("0").out_channels < 32

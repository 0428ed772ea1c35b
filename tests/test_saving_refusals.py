"""What save and load refuse: other architectures, changed models, damaged files; nothing is half-written."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import upscale
from support.oracle import fingerprint
from support.saved import same_bits
from support.subjects import SmallResNet, image, masked
from upscale.saving import store

GOLDEN = Path(__file__).parent / "data" / "model-v1.safetensors"


@pytest.fixture(scope="module")
def pruned() -> torch.fx.GraphModule:
    """An exported network; tests that change it copy it first."""
    return upscale.export(masked(), (image(),))


@pytest.fixture
def saved(pruned: torch.fx.GraphModule, tmp_path: Path) -> Path:
    upscale.save(pruned, tmp_path / "pruned.safetensors")
    return tmp_path / "pruned.safetensors"


# -- another architecture ---------------------------------------------------------------------------------------------


def _with_layer(path: str, layer: nn.Module) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = SmallResNet()
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, layer)
        return model

    return make


class Rearranged(SmallResNet):
    """The same tensors, other computations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(torch.flatten(self.avgpool(self.features(x).neg()), 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmallResNet(width=9), r"conv1.weight has shape \(8, 3, 3, 3\) there and \(9, 3, 3, 3\) here"),
        (lambda: SmallResNet(classes=6), r"fc.weight has shape \(5, 16\) there and \(6, 16\) here"),
        (_with_layer("conv1", nn.Conv2d(4, 8, 3, padding=1, bias=False)), r"conv1.weight has shape \(8, 3, 3, 3\)"),
        (_with_layer("fc", nn.Linear(16, 5, bias=False)), r"has no fc.bias of shape \(5,\)"),
        (_with_layer("conv1", nn.Conv2d(3, 8, 3, padding=1)), r"conv1.bias of shape \(8,\), which the saved one lacks"),
        (_with_layer("bn1", nn.BatchNorm2d(8, eps=1e-2)), r"computes `.*batch_norm.*0\.01.* in bn1` where"),
        (_with_layer("conv1", nn.Conv2d(3, 8, 3, padding=2, bias=False)), r"conv2d.*in conv1`"),
        (_with_layer("relu", nn.ReLU6(inplace=True)), "in relu`"),
        (_with_layer("layer1.0.relu", nn.GELU()), "gelu.*in layer1.0.relu`"),
        (_with_layer("dropout", nn.Identity()), "dropout"),
        (Rearranged, "neg"),
        (lambda: nn.Linear(3, 3), "conv1.weight of shape"),
    ],
)
def test_another_architecture(make: Callable[[], nn.Module], message: str, saved: Path) -> None:
    model = make()
    before = fingerprint(model)
    with pytest.raises(upscale.MismatchError, match=message) as caught:
        upscale.load(saved, model)
    assert "pruned.safetensors" in str(caught.value)
    assert fingerprint(model) == before


def test_what_is_no_model(saved: Path) -> None:
    with pytest.raises(upscale.InputError, match=r"load\(path, model\)"):
        upscale.load(saved)
    with pytest.raises(upscale.UnsupportedModelError):
        upscale.load(saved, "resnet18")  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = SmallResNet()
    with pytest.raises(upscale.InputError, match="meta"):
        upscale.load(saved, empty)


# -- a changed model --------------------------------------------------------------------------------------------------


def _replace_layer(model: Any) -> None:
    model.layer1[0].conv1 = nn.Conv2d(*model.layer1[0].conv1.weight.shape[1::-1], 3, padding=1)


def _replace_weight(model: Any) -> None:
    model.fc.bias = nn.Parameter(torch.zeros(1))


def _edit_graph(model: Any) -> None:
    node = next(n for n in model.graph.nodes if n.target == "layer1.0.conv1")
    node.replace_all_uses_with(node.args[0])
    model.graph.erase_node(node)
    model.recompile()


def _mask(model: Any) -> None:
    prune.l1_unstructured(model.fc, "weight", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace_layer, "layer1.0.conv1.bias is new"),
        (lambda m: setattr(m, "fc", nn.Identity()), "fc is now a linear.Identity"),
        (lambda m: m.add_module("more", nn.ReLU()), "more is new"),
        (lambda m: delattr(m.layer1[0], "bn1"), "layer1.0.bn1 .* is missing"),
        (lambda m: setattr(m.bn1, "eps", 0.1), "eps of bn1 is now 0.1"),
        (_replace_weight, r"fc.bias of shape \(5,\) has shape \(1,\)"),
        (_edit_graph, "graph was edited"),
        (_mask, "fc.weight .* is gone"),
        (lambda m: m.register_buffer("counts", torch.zeros(1)), "counts is new"),
    ],
)
def test_a_model_that_was_changed(change: Any, message: str, pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned)
    change(model)
    with pytest.raises(upscale.MismatchError, match=message):
        upscale.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_was_never_pruned(pruned: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(upscale.MismatchError, match="SmallResNet is no pruned model: save takes"):
        upscale.save(SmallResNet(), tmp_path / "a.safetensors")
    with pytest.raises(upscale.MismatchError, match="its part 'backbone' is"):
        upscale.save(nn.ModuleDict({"backbone": copy.deepcopy(pruned)}), tmp_path / "a.safetensors")


# -- files ------------------------------------------------------------------------------------------------------------


def test_paths(pruned: nn.Module, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(upscale.InputError, match="must end in .safetensors or .pt2"):
        upscale.save(pruned, tmp_path / "model.bin")
    with pytest.raises(upscale.FileError, match="there is no file"):
        upscale.load(tmp_path / "missing.safetensors", SmallResNet())
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(upscale.FileError, match="cannot be written"):
        upscale.save(pruned, tmp_path / "folder.safetensors")
    with pytest.raises(upscale.FileError, match="cannot be written"):
        upscale.save(pruned, saved / "below-a-file.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", "pruned.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_an_interrupted_save_leaves_the_old_file(
    error: Any, pruned: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(store, "save_file", interrupted)
    with pytest.raises((KeyboardInterrupt, upscale.FileError)):
        upscale.save(pruned, saved)
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_types_that_the_format_lacks(tmp_path: Path) -> None:
    model = upscale.export(masked(), (image(),))
    model.constants.upscale_index_0 = torch.zeros(1, dtype=torch.complex128)
    with pytest.raises(upscale.UpscaleError):
        upscale.save(model, tmp_path / "a.safetensors")


def test_other_kinds_of_files(saved: Path, tmp_path: Path) -> None:
    upscale.save_masks(tmp_path / "masks.safetensors", {"fc": torch.ones(3, dtype=torch.bool)})
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({"a": 1}, tmp_path / "pickle.safetensors")
    for name in ("masks", "text", "empty", "pickle"):
        with pytest.raises(upscale.FileError, match=f"{name}.safetensors"):
            upscale.load(tmp_path / f"{name}.safetensors", SmallResNet())


def _head(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The safetensors header, the JSON in it, and the tensors' bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["upscale"]), content[8 + size :]


def _joined(header: dict[str, Any], head: Any, data: bytes) -> bytes:
    text = json.dumps({**header, "__metadata__": {"upscale": json.dumps(head)}}).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_versions(saved: Path) -> None:
    header, head, data = _head(saved.read_bytes())
    assert head["version"] == store.VERSION and head["format"] == store.FORMAT
    for version, message in ((2, "version 2 .* reads up to 1: upgrade"), (0, "no version"), ("1", "no version")):
        saved.write_bytes(_joined(header, {**head, "version": version, "news": 1}, data))
        with pytest.raises(upscale.FileError, match=message):
            upscale.load(saved, SmallResNet())


def test_a_file_of_another_torch_says_so(saved: Path) -> None:
    header, head, data = _head(saved.read_bytes())
    head["body"]["writer"] = {"upscale": "0.0.1", "torch": "1.2.3"}
    head["body"]["recipe"]["steps"][0]["emitted"] = "0" * 64
    head["sha256"] = store.digest(head["body"], load_file(saved))
    saved.write_bytes(_joined(header, head, data))
    with pytest.raises(upscale.MismatchError, match="another graph.*written with upscale 0.0.1, torch 1.2.3"):
        upscale.load(saved, SmallResNet())


def test_an_old_file_is_still_read() -> None:
    """Written when version 1 of the format was new; it must load for as long as there is a version 1."""
    loaded = upscale.load(GOLDEN, _by_formula())
    x = torch.arange(2 * 3 * 5 * 5, dtype=torch.float32).view(2, 3, 5, 5) / 100
    model = _by_formula().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 7 / 6 + name.endswith("var"))
        model[3].weight[:, [1, 4]] = 0
    torch.testing.assert_close(loaded(x), model(x))
    # of six channels two are not read, and the norm's first scale is zero: that channel is a folded constant
    assert loaded.get_submodule("0").weight.shape == (3, 3, 3, 3)


def _by_formula() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))


# -- damage -----------------------------------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def fuzzed(pruned: torch.fx.GraphModule, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "pruned.safetensors"
    upscale.save(pruned, path)
    return path, path.read_bytes()


def test_bytes_that_changed(fuzzed: tuple[Path, bytes]) -> None:
    """Any byte anywhere: refused. (Blank space at the end of the header is all that may differ.)"""
    path, content = fuzzed

    @FUZZ
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def prove(place: int, change: int) -> None:
        changed = bytearray(content)
        changed[place] ^= change
        path.write_bytes(bytes(changed))
        with pytest.raises(upscale.FileError):
            upscale.load(path, SmallResNet())

    prove()


def test_files_that_were_cut(fuzzed: tuple[Path, bytes]) -> None:
    path, content = fuzzed

    @FUZZ
    @given(st.one_of(st.integers(0, 64), st.integers(0, len(content) - 1)))
    def prove(length: int) -> None:
        path.write_bytes(content[:length])
        with pytest.raises(upscale.FileError):
            upscale.load(path, SmallResNet())

    prove()
    path.write_bytes(content + b"more")
    with pytest.raises(upscale.FileError):
        upscale.load(path, SmallResNet())


ODD = st.sampled_from(
    [None, True, -1, 0, 1, 3, 1 << 40, 10**30, 1.5, "", "x", "0:99999999999", "7 3", "torch.load", [], [1], {}]
    + [{"tensor": 9}, {"dtype": "load"}, [[[]]], "%999", "=fc.weight", "nan", "e9"]
)


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def test_descriptions_that_were_edited(tmp_path: Path) -> None:
    """Any entry of the description replaced or removed, and the checksum made to fit: refused, or harmless."""
    path, model, x = tmp_path / "edited.safetensors", _by_formula().eval(), torch.rand(2, 3, 5, 5)
    with torch.no_grad():
        model[3].weight[:, [1, 4]] = 0
    pruned = upscale.export(model, (x,), reads="gather")
    upscale.save(pruned, path)
    header, head, data = _head(path.read_bytes())
    tensors = {name: t.clone() for name, t in load_file(path).items()}  # what is loaded is a window on the file
    places = list(_places(head["body"]))
    sections = sorted({place[:3] for place in places}, key=str)
    outcomes = {"refused": 0, "harmless": 0}

    @settings(FUZZ, max_examples=60)
    @given(st.integers(0, 1 << 30), ODD, st.booleans())
    def prove(seed: int, value: Any, remove: bool) -> None:
        # a section first, then a place in it: nearly all places are in the plan
        chooser = random.Random(seed)
        section = chooser.choice(sections)
        *owner, key = chooser.choice([place for place in places if place[:3] == section])
        body = copy.deepcopy(head["body"])
        inside = body
        for step in owner:
            inside = inside[step]
        if remove:
            del inside[key]
        else:
            inside[key] = value
        path.write_bytes(_joined(header, {**head, "body": body, "sha256": store.digest(body, tensors)}, data))
        try:
            loaded = upscale.load(path, _by_formula())
        except upscale.UpscaleError:
            outcomes["refused"] += 1
            return
        with torch.no_grad():
            assert same_bits(pruned(x), loaded.eval()(x)), (owner, key, value)
        outcomes["harmless"] += 1

    prove()
    assert outcomes["refused"] > 25, outcomes

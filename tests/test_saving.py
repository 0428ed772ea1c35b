"""Round trips: a pruned model is saved, and rebuilt from the original architecture's code with other weights."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import upscale
from support.networks import Spec, build, masks, specs
from support.oracle import fingerprint, parameter_count, relative_error
from support.saved import round_trip, same_bits, scrambled
from support.subjects import SmallResNet, dense, image, masked
from test_heads import EMBED, WIDTH, Attention, attention, tokens
from test_random_networks import STEADY
from test_target import Readers
from test_twins import Pyramid
from upscale.files import replacing
from upscale.raising import raise_program

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pruned() -> torch.fx.GraphModule:
    """An exported network; tests that change it copy it first."""
    return upscale.export(masked(), (image(),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pruned.safetensors"


@pytest.mark.parametrize(
    ("reads", "kind"),
    [("auto", "input"), ("auto", "output"), ("auto", "both"), ("gather", "input"), ("baseline", "both")],
)
def test_every_way_to_read(reads: Any, kind: str, path: Path) -> None:
    model = masked(kind=kind)
    fresh = scrambled(SmallResNet())
    before = fingerprint(fresh)
    loaded = round_trip(upscale.export(model, (image(),), reads=reads), fresh, path, image(5))
    assert relative_error(model(image(3)), loaded(image(3))) <= 1e-10
    assert fingerprint(fresh) == before, "the model given to load was changed"


@pytest.mark.parametrize(
    "family",
    [
        specs("Residual", "Dense", "Inception", "ShuffleUnit", "Grouped", "SqueezeExcite", "Inverted", "UNet"),
        specs("TokenMixer", "ConvNeXt", "Attention", "Glu", "Slices", "Space", "Sharing", "Padding", "Context"),
    ],
)
def test_random_networks(family: Any, path: Path) -> None:
    """Whatever the network, the zeros and the reads: folded constants, sums in part, groups, shared layers, heads."""
    trips = 0

    @settings(STEADY, max_examples=4)
    @given(family, masks())
    def prove(spec: Spec, mask: Any) -> None:
        nonlocal trips
        model, inputs = build(spec)
        mask.apply(model, inputs)
        try:
            smaller = upscale.export(model, inputs, reads=("auto", "gather", "baseline")[spec.seed % 3], verify=False)
        except (upscale.NothingToPruneError, upscale.ConstantOutputError):
            return
        round_trip(smaller, scrambled(build(spec)[0]), path, *inputs)
        trips += 1

    prove()
    assert trips >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"target": upscale.Target(batch=8, memory_format="channels_last", round_to=8)},
        {"target": upscale.Target(backend="compile")},
        {"dynamic_shapes": "spatial"},
    ],
    ids=["channels-last", "compile", "spatial"],
)
def test_targets_and_free_sizes(options: dict[str, Any], path: Path) -> None:
    model = dense(Readers())
    upscale.MaskingManager(model, example_inputs=image()).importance().mask(amount=0.4)
    round_trip(upscale.export(model, (image(),), **options), scrambled(Readers()), path, image(3))


def test_contiguous_masks_and_pruning_in_place(path: Path) -> None:
    model = dense(Readers())
    upscale.MaskingManager(model, method="contiguous", example_inputs=image()).importance().mask(amount=0.5)
    upscale.PruningManager(model).compute([image()]).prune()
    loaded = round_trip(model, scrambled(Readers()), path, image(3))
    assert type(loaded).__name__ == "Readers"


def test_heads_and_layers_called_twice(path: Path) -> None:
    model, x = attention("unbind"), tokens(2, 5, EMBED)
    with torch.no_grad():
        model.proj.weight[:, WIDTH : 2 * WIDTH] = 0
    loaded = round_trip(upscale.export(model, (x,)), scrambled(Attention("unbind")), path, x)
    assert loaded.qkv.out_features == 3 * (EMBED - WIDTH)
    twice = dense(Pyramid(True))
    upscale.MaskingManager(twice, example_inputs=image()).importance().mask(amount=0.5)
    round_trip(upscale.export(twice, (image(),)), scrambled(Pyramid(True)), path, image())


def test_masks_of_torch_need_not_be_there(path: Path) -> None:
    """Masks that are parametrised or hooked in when the model is captured: the code that loads has plain layers."""
    model = dense(SmallResNet())
    prune.ln_structured(model.layer1[0].conv2, "weight", 0.5, 2, dim=1)

    class Zeros(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(weight.shape[1]) % 2).view(1, -1, 1, 1)

    parametrize.register_parametrization(model.layer2[1].conv1, "weight", Zeros())
    round_trip(upscale.export(model, (image(),)), scrambled(SmallResNet()), path, image())


def test_a_new_process_without_the_weights(pruned: torch.fx.GraphModule, path: Path) -> None:
    upscale.save(pruned, path)
    torch.save({"x": image(3), "y": pruned(image(3)).detach()}, path.with_suffix(".pt"))
    program = (
        "import torch, upscale\n"
        "from support.subjects import SmallResNet\n"
        f"model = upscale.load({str(path)!r}, SmallResNet())\n"
        f"seen = torch.load({str(path.with_suffix('.pt'))!r})\n"
        "assert torch.equal(model(seen['x']), seen['y'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_fine_tuned_weights_are_saved_and_training_goes_on(pruned: torch.fx.GraphModule, path: Path) -> None:
    """Weights, statistics, frozen parameters and modes are those of the moment of saving."""
    model = copy.deepcopy(pruned).train()
    model.layer1[0].conv1.weight.requires_grad_(False)
    model.layer2.eval()
    model.dropout.p, model.bn1.momentum = 0.25, None
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        model(image(4)).square().mean().backward()
        optimiser.step()
    upscale.save(model, path)
    loaded = upscale.load(path, SmallResNet())
    assert {n: m.training for n, m in loaded.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert (loaded.dropout.p, loaded.bn1.momentum) == (0.25, None)
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    assert not same_bits(pruned.state_dict(), loaded.state_dict())
    loaded(image(4)).square().mean().backward()
    assert loaded.layer1[0].conv1.weight.grad is None and loaded.fc.weight.grad is not None


@pytest.mark.parametrize(
    ("dtype", "when"),
    [(torch.float16, "after"), (torch.bfloat16, "before"), (torch.bfloat16, "after"), (torch.float64, "before")],
)
def test_other_dtypes(dtype: torch.dtype, when: str, path: Path) -> None:
    """The type at export or a later conversion; the architecture is built in float32."""
    model, x = masked(), image()
    if when == "before":
        model, x = model.to(dtype), x.to(dtype)
    smaller = upscale.export(model, (x,)).to(dtype)
    loaded = round_trip(smaller, SmallResNet(), path, image(3, dtype=dtype))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_how_tensors_lie_in_memory(path: Path) -> None:
    model = masked().to(memory_format=torch.channels_last)
    smaller = upscale.export(model, (image().contiguous(memory_format=torch.channels_last),))
    loaded = round_trip(smaller, SmallResNet(), path, image(3).contiguous(memory_format=torch.channels_last))
    strides = {name: p.stride() for name, p in smaller.named_parameters()}
    assert strides == {name: p.stride() for name, p in loaded.named_parameters()}
    assert not loaded.layer1[0].conv1.weight.is_contiguous()


class Tied(nn.Module):
    """Two names for one weight, a buffer that is not in the state dict, keyword arguments."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.last = nn.Linear(6, 6)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((6,), scale), persistent=False)

    def forward(
        self, tokens: Tensor, *, extra: dict[str, Tensor] | None = None, flag: bool = True
    ) -> dict[str, Tensor]:
        x = self.last(torch.relu(self.inner(self.embed(tokens)))) * self.scale
        if flag and extra is not None:
            x = x + extra["shift"]
        return {"logits": self.head(x), "hidden": x}


def test_tied_weights_and_hidden_buffers(path: Path) -> None:
    model = dense(Tied(3.0))
    with torch.no_grad():
        model.last.weight[:, [1, 4]] = 0
    inputs = (torch.tensor([[1, 2, 3], [4, 5, 6]]),)
    kwargs = {"extra": OrderedDict(shift=torch.randn(2, 1, 6, dtype=torch.float64)), "flag": True}
    loaded = round_trip(upscale.export(model, inputs, kwargs), Tied(), path, *inputs, **kwargs)
    assert loaded.head.weight is loaded.embed.weight and loaded.inner.out_features == 4
    assert "scale" not in loaded.state_dict()
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.randn(11, 6))
    with pytest.raises(upscale.MismatchError, match="head.weight"):
        upscale.load(path, untied)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
        self.phase = nn.Parameter(torch.randn(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.phase).abs())


def test_complex_parameters_are_trained_on(path: Path) -> None:
    model = Turned().eval()
    model.b.bias.requires_grad_(False)
    x = torch.rand(2, 8)
    loaded = round_trip(upscale.prune(model, x), Turned(), path, x)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == {"b.bias"}


def test_the_file_has_the_usual_permissions(pruned: torch.fx.GraphModule, path: Path) -> None:
    other = path.with_name("other")
    other.touch()
    upscale.save(pruned, path)
    assert path.stat().st_mode == other.stat().st_mode


def test_threads_may_write_one_path(tmp_path: Path) -> None:
    both_write = threading.Barrier(2)

    def write(text: str) -> None:
        with replacing(tmp_path / "a") as draft:
            draft.write_text(text)
            both_write.wait(10)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, ("1", "2")))
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() in ("1", "2")


def test_pruned_again_and_again(path: Path) -> None:
    """A pruned model that was trained, masked and exported again loads from the first architecture."""
    second = upscale.export(masked(), (image(),)).float()
    second.dropout.p = 0.1
    upscale.MaskingManager(second, example_inputs=image(dtype=torch.float32)).importance().mask(amount=0.3)
    third = upscale.export(second, (image(dtype=torch.float32),))
    assert parameter_count(third) < parameter_count(second)
    loaded = round_trip(third, scrambled(SmallResNet()), path, image(3, dtype=torch.float32))
    with torch.no_grad():
        loaded.layer2[1].conv1.weight[:, :3] = 0
    round_trip(upscale.export(loaded, (image(dtype=torch.float32),)), SmallResNet(), path, image(dtype=torch.float32))


def test_copies_and_pickles_can_be_saved(pruned: torch.fx.GraphModule, path: Path) -> None:
    upscale.save(pruned, path)
    content = path.read_bytes()
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), torch.compile(pruned, backend="eager")):
        upscale.save(other, path)
        assert path.read_bytes() == content
    upscale.save(upscale.load(path, SmallResNet()), path)
    assert path.read_bytes() == content, "a loaded model is saved as it was"


def test_the_file_is_hardly_larger_than_the_weights(path: Path) -> None:
    model = masked(SmallResNet(width=96)).float()
    smaller = upscale.export(model, (image(dtype=torch.float32),))
    upscale.save(smaller, path)
    weights = sum(t.nbytes for t in smaller.state_dict().values())
    assert weights <= path.stat().st_size <= 1.05 * weights


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Box:
    tensor: Tensor


class Takes(nn.Module):
    """Two images in one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, images: Any) -> Any:
        left, right = images if not isinstance(images, Box) else (images.tensor, images.tensor)
        return Pair(self.b(self.a(left).relu()), self.b(self.a(right).relu()))


@pytest.mark.parametrize("container", [Pair, lambda a, b: Box(a)], ids=["namedtuple", "dataclass"])
def test_arguments_of_ones_own_classes_are_given_again(container: Any, path: Path) -> None:
    model = dense(Takes())
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    pair = container(image(), image(seed=2))
    upscale.save(smaller := upscale.export(model, (pair,)), path)
    with pytest.raises(upscale.InputError, match="an argument is a (Pair|Box).*args="):
        upscale.load(path, Takes())
    loaded = upscale.load(path, Takes(), args=(pair,))
    assert same_bits(smaller(pair), loaded(pair)) and type(loaded(pair)) is Pair


def test_named_sizes(path: Path) -> None:
    """Sizes that the user freed by name are the same again: bounds, one name twice, a multiple of another."""
    half, batch = torch.export.Dim("half", min=4, max=40), torch.export.Dim("batch", min=1, max=64)
    shapes = {"images": [{0: batch, 2: 2 * half, 3: 2 * half}, {0: batch, 2: torch.export.Dim.AUTO}]}
    model = dense(Takes())
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    pair = [image(), image(seed=2)]
    smaller = upscale.export(model, (pair,), dynamic_shapes=shapes)
    loaded = round_trip(smaller, Takes(), path, [image(3, 16), image(3, 12)])
    for wrong in ([image(3, 15), image(3)], [image(65), image(65)]):
        with pytest.raises(AssertionError, match="upscale: "):
            loaded(wrong)


@pytest.mark.parametrize("size", [64, 1])
def test_a_graph_that_was_not_pruned_here_carries_no_plan(size: int, path: Path) -> None:
    program = upscale.capture.capture(dense(SmallResNet(size)), (image(),))
    with pytest.raises(upscale.MismatchError, match="is no pruned model"):
        upscale.save(raise_program(program), path)
    assert not path.exists()

"""Call signatures, sizes, errors: what capture accepts, guards and refuses, and that it leaves the model alone."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.captures import Calls, assert_same, check, fingerprint, images, pruned_conv
from upscale.capture import capture
from upscale.errors import CaptureError, InputError, UnsupportedModelError
from upscale.guards import size_guards, text_guards
from upscale.program import is_users_file, run, where
from upscale.raising import raise_program


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(
        self, x: Tensor, scale: float = 2.0, *, batch: dict[str, Any], flag: bool = True, extra: Tensor | None = None
    ) -> dict[str, Any]:
        y = self.fc(x) * scale + batch["pair"][0]
        if flag:
            y = y + batch["pair"][1]
        return {"y": y, "parts": [y.relu(), (y, None, 3)]}


def test_keywords_defaults_and_nested_inputs() -> None:
    """Names, defaults and nesting are the original's; what was fixed at capture is checked."""

    def row(batch: int) -> Tensor:
        return torch.randn(batch, 4, dtype=torch.float64)

    model = Keyword().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    batch = {"pair": (row(2), row(2))}
    program = check(model, x, batch=batch)
    emitted = raise_program(program)
    three = {"pair": (row(3), row(3))}
    x3 = torch.randn(3, 3, dtype=torch.float64)
    assert_same(model(x3, batch=three), emitted(batch=three, x=x3))
    for wrong in (
        {"batch": three, "flag": False},
        {"batch": three, "scale": 3.0},
        {"batch": three, "extra": x3},
        {"batch": {"pair": (row(3), row(3), row(3))}},
        {"batch": {**three, "more": row(3)}},
        {"batch": batch},
    ):
        with pytest.raises(AssertionError, match="upscale"):
            emitted(x3, **wrong)


class Variadic(nn.Module):
    def forward(self, first: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        return first + sum(rest) + named["last"]


def test_variadic_arguments() -> None:
    """``*args`` and ``**kwargs`` work, with the number fixed."""
    x = [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    emitted = raise_program(check(Variadic(), *x[:3], last=x[3]))
    with pytest.raises(AssertionError, match="entries"):
        emitted(*x, last=x[3])


@dataclasses.dataclass
class Result:
    """A result type that torch does not know."""

    hidden: Tensor
    parts: list[Tensor]
    name: str = "result"


class Named(NamedTuple):
    a: Tensor
    b: Tensor


class Structured(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        if self.kind == "dataclass":
            return Result(y, [y + 1, x])
        if self.kind == "namedtuple":
            return Named(y, x)
        return OrderedDict(out=y, inner=OrderedDict(again=y, number=1))


@pytest.mark.parametrize("kind", ["dataclass", "namedtuple", "ordered"])
def test_structured_outputs_survive_copies(kind: str) -> None:
    """Dataclasses, named tuples and ordered dicts come back as what they were, from pickles too."""
    check(Structured(kind), torch.randn(2, 3, dtype=torch.float64))


class Takes(nn.Module):
    def forward(self, item: Result) -> Tensor:
        return item.hidden + item.parts[0]


def test_dataclass_input() -> None:
    """Inputs may be dataclasses; their fixed fields are checked."""
    x = torch.randn(2, 3, dtype=torch.float64)
    emitted = raise_program(check(Takes(), Result(x, [x])))
    with pytest.raises(AssertionError, match=r"item\.name"):
        emitted(Result(x, [x], "other"))


def test_batch_of_one_stays_free() -> None:
    """torch fixes a size of one: the example is repeated."""
    program = capture(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),))
    assert program.inputs[0].shape[0] == 2 and not program.notes
    assert raise_program(program)(torch.randn(5, 3, 8, 8)).shape[0] == 5


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = x[0] * 0
        for item in x:
            total = total + item
        return total


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_that_the_model_counts_is_fixed_and_guarded(batch: int) -> None:
    """A loop over the batch fixes its size: a note says so and the guard raises."""
    model = Fixed()
    x = torch.randn(batch, 4)
    program = capture(model, (x,))
    assert any("batch size specialised" in note for note in program.notes)
    emitted = raise_program(program)
    torch.testing.assert_close(emitted(x), model(x))
    with pytest.raises(AssertionError, match="dimension 0"):
        emitted(torch.randn(batch + 1, 4))


class Sized(nn.Module):
    """Decisions on sizes."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + (1 if x.shape[2] % 3 == 0 else 2)
        x = x * (2 if x.shape[3] > 7 else 3)
        return x + torch.cat([y, y], 2)


@pytest.mark.parametrize("most", [65535, 880801, 4096])
def test_what_cudnn_takes_is_no_guard(most: int) -> None:
    """On a GPU torch notes up to how many examples cuDNN's batch norm would be taken: on a CPU it is the same model."""
    program = capture(nn.Linear(4, 4).double(), (images(4).flatten(1)[:, :4],))
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    found, unread = text_guards([f"L['args'][0].size()[0] <= {most}"], values, ["x"], "args")
    assert (len(found), unread) == (int(most == 4096), [])
    (symbol,) = (value.shape[0].node.expr for value in values)
    ranges = {symbol: SimpleNamespace(lower=2, upper=most)}
    assert len(size_guards(values, ["x"], ranges)[0]) - len(size_guards(values, ["x"], {})[0]) == int(most == 4096)


def test_spatial_sizes_free_and_guarded() -> None:
    """Free sizes work; relations and decisions the capture relied on raise where they fail."""
    model = Sized()
    a, b = torch.randn(2, 3, 6, 9), torch.randn(2, 3, 3, 9)
    emitted = raise_program(capture(model, (a, b), dynamic_shapes="spatial"))
    for rows, columns in ((6, 9), (12, 8), (18, 20)):
        x, y = torch.randn(3, 3, rows, columns), torch.randn(3, 3, rows // 2, columns)
        torch.testing.assert_close(emitted(x, y), model(x, y))
    for rows, columns in ((8, 9), (6, 5)):
        with pytest.raises((AssertionError, RuntimeError)):
            emitted(torch.randn(2, 3, rows, columns), torch.randn(2, 3, rows // 2, columns))
    with pytest.raises(AssertionError, match="upscale"):
        emitted(torch.randn(2, 3, 6, 9), torch.randn(2, 3, 6, 9))
    fixed = raise_program(capture(model, (a, b)))
    with pytest.raises(AssertionError, match="size 6 in dimension 2.*spatial"):
        fixed(torch.randn(2, 3, 12, 9), torch.randn(2, 3, 6, 9))


def test_dynamic_shapes_given_by_the_user() -> None:
    """A dict or tuple goes to torch.export; one that does not fit is refused."""
    model, x = nn.Linear(3, 4), torch.randn(2, 5, 3)
    dim = torch.export.Dim("rows", min=2, max=64)
    for spec in ({"input": {1: dim}}, ({1: dim},)):
        emitted = raise_program(capture(model, (x,), dynamic_shapes=spec))
        assert emitted(torch.randn(2, 9, 3)).shape == (2, 9, 4)
        with pytest.raises(AssertionError):
            emitted(torch.randn(3, 9, 3))
        with pytest.raises(AssertionError):
            emitted(torch.randn(2, 65, 3))
    for wrong in ({"nothing": None}, (None, None), "space"):
        with pytest.raises(InputError):
            capture(model, (x,), dynamic_shapes=wrong)


class Fails(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
        self.body[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if y.sum() > 0:
            return y
        return -y


def test_capture_error_says_where_and_what_to_do() -> None:
    """torch's message, the user's line, the way out; and the model is as before, flags of each layer included."""
    model = Fails().train()
    model.body[1].eval()
    before = fingerprint(model)
    with pytest.raises(CaptureError, match=r"test_capture.py:\d+: if y.sum") as caught:
        capture(model, (torch.randn(2, 3),))
    assert "upscale.export(model.body, (x,), inplace=True)" in str(caught.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "missing a required argument"),
        ((3,), "no tensor"),
        ((torch.randn(2, 4),), "fails on the example"),
        ((torch.randn(2, 3), torch.randn(1)), "too many"),
        ((torch.randn(2, 3, 5), object()), "does not fit|only tensors"),
        ("text", "must be a tuple"),
    ],
)
def test_wrong_examples(args: Any, message: str) -> None:
    """A wrong example is an InputError with the model's own message; the model stays as it was."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        capture(model, args)
    assert fingerprint(model) == before


class Reserved(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.children()))(x)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "class", "lambda", 'a"b'])
def test_names_that_cannot_be_emitted(name: str) -> None:
    """Names that generated code cannot spell are refused by name."""
    with pytest.raises(UnsupportedModelError, match="cannot be exported"):
        capture(Reserved(name), (torch.randn(2, 3),))


@pytest.mark.parametrize("name", ["block1-0", "0", "input", "x"])
def test_odd_names_that_can(name: str) -> None:
    """Digits, dashes and names of arguments are fine."""
    check(Reserved(name), torch.randn(2, 3, dtype=torch.float64))


def test_wrappers() -> None:
    """ScriptModules are refused; compiled and data-parallel wrappers are looked through."""
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(model)
    with pytest.raises(UnsupportedModelError, match="ScriptModule"):
        capture(script, (x,))
    with pytest.raises(UnsupportedModelError, match="nn.Module"):
        capture(lambda value: value, (x,))  # type: ignore[arg-type]
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert set(capture(wrapped, (x,)).tensors) == {"0.weight", "0.bias"}


def test_capture_is_silent_and_leaves_no_fakes() -> None:
    """No warning of torch's reaches the user; attributes set by hooks and recurrent layers are put back."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = pruned_conv()
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0]

    model = Recurrent()
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emitted = raise_program(capture(model, (torch.randn(2, 3, 6, 6),)))
    assert fingerprint(model) == before
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(emitted(x), model(x))
    assert type(model.conv.weight) is Tensor


def test_hooks_run_once() -> None:
    """Forward hooks are part of the captured computation; the emitted layers have none."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    emitted = raise_program(check(model, torch.randn(2, 3, dtype=torch.float64)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in emitted.modules())


def test_attention_is_not_fused() -> None:
    """nn.TransformerEncoderLayer is captured op by op, not as the fused inference kernel, whose setting is kept."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    program = check(layer, torch.randn(2, 5, 8, dtype=torch.float64))
    assert not any("_transformer" in str(node.target) or "_native" in str(node.target) for node in program.graph.nodes)
    assert torch.backends.mha.get_fastpath_enabled()


def test_where_names_module_class_and_line() -> None:
    """Messages can say where a node comes from."""
    program = capture(Calls(torch.relu), (images().float(),))
    texts = [where(node) for node in program.graph.nodes if node.op == "call_function"]
    assert any(text.startswith("conv (Conv2d") for text in texts)
    assert any("return self.function(self.conv(x))" in text for text in texts)


def test_where_at_root_level_names_the_users_line() -> None:
    """The frames of this package and of torch around the model are nobody's concern."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.body(x), 1)

    program = capture(Root(), (torch.randn(2, 4),))
    texts = {str(node.target): where(node) for node in program.graph.nodes if node.op == "call_function"}
    assert re.fullmatch(
        r"model \(Root, \S+test_capture.py:\d+: return torch.cumsum\(.*\)\)", texts["aten.cumsum.default"]
    )
    assert re.fullmatch(
        r"body.0 \(Linear, \S+test_capture.py:\d+: return torch.cumsum\(.*\)\)", texts["aten.linear.default"]
    )


def test_where_without_a_line_of_the_users() -> None:
    """A container of torch's own as the root: no line of ours stands in for one."""
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.randn(2, 4),))
    assert [where(n) for n in program.graph.nodes if n.op == "call_function"] == ["0 (Linear)", "1 (ReLU)"]


def test_whose_file_is_it() -> None:
    """Folders of similar names are the user's."""
    own, torchs = Path(upscale.__file__).parent, Path(torch.__file__).parent
    assert is_users_file("/home/me/torch/net.py") and is_users_file(f"{torchs}vision/models/resnet.py")
    assert is_users_file(f"{own}_experiments/net.py") and is_users_file(__file__)
    for file in (own / "capture.py", torchs / "nn" / "functional.py", contextlib.__file__, "<eval_with_key>.1"):
        assert not is_users_file(str(file))


def test_run_needs_no_gradient_and_frees_values() -> None:
    """The interpreter gives the flat outputs."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    program = capture(model, (torch.randn(2, 3),))
    (out,) = run(program, (torch.randn(4, 3),))
    assert out.shape == (4, 3) and not out.requires_grad

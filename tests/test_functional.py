"""Models that write in place, share weights or compute them: the graph is functional and gives the same numbers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from support.captures import Calls, assert_same, check, fingerprint, images, pruned_conv
from upscale.capture import capture
from upscale.errors import CaptureError
from upscale.raising import raise_program


def write_slice(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3] += 1
    return y


def write_slice_read_base(x: Tensor) -> tuple[Tensor, Tensor]:
    view = x[:, :2]
    view.mul_(3)
    return x + 1, view


def write_base_read_view(x: Tensor) -> tuple[Tensor, Tensor]:
    view = x.permute(0, 2, 3, 1)[..., 1]
    x.add_(5)
    return view, x


def write_deep_view(x: Tensor) -> Tensor:
    view = x.transpose(1, 2).unsqueeze(0)[0].select(2, 1).squeeze(-1)
    view.zero_()
    return x


def shared_relu(x: Tensor) -> Tensor:
    kept = x * 1.5
    out = kept.relu_()
    return out + kept


def read_before_and_after(x: Tensor) -> Tensor:
    before = x * 2
    x.clamp_(min=0)
    return before + x


def chunk_write(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    a.add_(1)
    b.mul_(2)
    return x


def split_and_unbind(x: Tensor) -> Tensor:
    x.split([1, 3], 1)[1].neg_()
    x.unbind(1)[2].fill_(7)
    return x


def reshape_write(x: Tensor) -> Tensor:
    y = x.view(x.shape[0], -1)
    y[:, ::2] = 0.5
    return x


def copy_into(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 4, x.shape[2], x.shape[3], dtype=x.dtype)
    y[:, :2].copy_(x[:, 2:])
    y[:, 2:] = x[:, :1]
    return y


def masked_writes(x: Tensor) -> Tensor:
    x.masked_fill_(x > 0.5, -1.0)
    x[x < -0.5] = 0.0
    x.index_put_((torch.tensor([0]),), torch.ones((), dtype=x.dtype))
    return x


def dropout_alias(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.dropout(x, 0.5, training=False)
    y.add_(1)
    return x, y


def inplace_dropout(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x[:, :2]
    return F.dropout(y, 0.5, training=False, inplace=True), x


def keeps_type(x: Tensor) -> Tensor:
    y = x.float()
    y.add_(x)
    z = y.clone().ge_(0)
    return y.double() + z


def metadata_writes(x: Tensor) -> Tensor:
    y = x * 2
    y.unsqueeze_(1)
    y.squeeze_(1).transpose_(1, 2)
    return y


def diagonal_write(x: Tensor) -> Tensor:
    x.diagonal(0, 2, 3).fill_(2.0)
    return x


def no_grad_block(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax((1, 2, 3), keepdim=True)
        scale.add_(1)
    return x / scale


def filled_constant(x: Tensor) -> Tensor:
    mask = x.new_zeros((6, 6))
    for count, rows in enumerate((slice(0, 2), slice(2, -1), slice(-1, None))):
        mask[rows] = count
    first = x + mask
    mask[0].fill_(9)
    return first * mask


def constant_that_varies(x: Tensor) -> Tensor:
    table = torch.zeros(4, 6, 6, dtype=x.dtype)
    table[0] = 3
    table += x.mean(0)
    return x + table


TRAPS = [
    write_slice,
    write_slice_read_base,
    write_base_read_view,
    write_deep_view,
    shared_relu,
    read_before_and_after,
    chunk_write,
    split_and_unbind,
    reshape_write,
    copy_into,
    masked_writes,
    dropout_alias,
    inplace_dropout,
    keeps_type,
    metadata_writes,
    diagonal_write,
    no_grad_block,
    filled_constant,
    constant_that_varies,
]


@pytest.mark.parametrize("function", TRAPS, ids=lambda f: f.__name__)
def test_writes_become_functional(function: Callable[..., Any]) -> None:
    """In-place code of every kind gives the same numbers, at the traced batch and at others."""
    check(Calls(function), images(2), other=(images(3),))
    check(Calls(function), images(1), other=(images(4),))


def test_constant_mask_is_one_tensor() -> None:
    """A mask filled slice by slice is evaluated once: no call that made it is left."""
    program = check(Calls(filled_constant), images())
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fill" in name or "zeros" in name for name in names)
    assert sorted(kind for kind in program.kinds.values()) == ["constant", "constant", "parameter", "parameter"]


def test_expand_write_is_refused_with_its_line() -> None:
    """A write that cannot be undone names the place."""

    class Strided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.as_strided((2,), (1,)).fill_(1.0)
            return y

    with pytest.raises(CaptureError, match=r"test_functional.py:\d+: y.as_strided"):
        capture(Strided().eval(), (images().float(),))


class Inputs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 1
        return x.relu_() + 1


def test_input_is_not_written_any_more() -> None:
    """A model that writes to its input keeps its results; the emitted one leaves the input alone (``check`` looks)."""
    program = check(Inputs(), images())
    assert any("input 'x' is written" in note for note in program.notes)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("history", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.history[1:] = self.history[:2] + 1
        return x * self.count + self.history.sum()


def test_buffer_writes_stay() -> None:
    """State kept in buffers goes on counting in the emitted model, in copies and in pickles of it."""
    model = Counter()
    x = torch.randn(2, 3)
    program = capture(model, (x,))
    assert float(model.count) == 0
    emitted = raise_program(program)
    unpickled = pickle.loads(pickle.dumps(emitted))
    for module in (emitted, unpickled, copy.deepcopy(unpickled)):
        reference = Counter()
        module.count.zero_()
        module.history.zero_()
        for _ in range(3):
            torch.testing.assert_close(module(x), reference(x))
        assert float(module.count) == 3
        assert sorted(module.state_dict()) == ["count", "history"]


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x + self.seen


def test_written_attribute_is_refused() -> None:
    """State in a plain attribute cannot be kept: the error says to make it a buffer."""
    model = Attribute()
    with pytest.raises(CaptureError, match="buffer"):
        capture(model, (torch.randn(2, 3),))
    assert model.seen.sum() == 0


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.Linear(8, 8)
        self.again = self.layer
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.embed(x)).relu()
        return self.head(self.drop(self.again(y)))


def test_tied_weights_and_a_layer_called_twice() -> None:
    """One layer under two names stays one object; tied weights stay tied under both names."""
    model = Twice()
    program = check(model, torch.randint(0, 11, (2, 5)), other=(torch.randint(0, 11, (3, 5)),))
    emitted = raise_program(program)
    for module in (emitted, copy.deepcopy(emitted), pickle.loads(pickle.dumps(emitted))):
        assert module.head.weight is module.embed.weight
        assert module.again.weight is module.layer.weight
        assert isinstance(module.head, nn.Linear) and isinstance(module.embed, nn.Embedding)
        assert sorted(module.state_dict()) == sorted(model.state_dict())
    assert emitted.head.weight.data_ptr() != model.head.weight.data_ptr()


def functional_tie() -> nn.Module:
    class Tie(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.embed(x), self.embed.weight)

    return Tie()


def test_embedding_read_by_a_function_too() -> None:
    """The layer stays a layer; the other reader takes its weight."""
    program = check(functional_tie(), torch.randint(0, 7, (2, 5)))
    assert isinstance(raise_program(program).embed, nn.Embedding)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized_conv() -> nn.Conv2d:
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", Doubled())
    return conv


def normed_conv() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Conv2d(3, 4, 3))


def new_normed_conv() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))


def spectral_conv() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("make", [pruned_conv, parametrized_conv, normed_conv, new_normed_conv, spectral_conv])
def test_computed_weights_become_parameters(make: Callable[[], nn.Module]) -> None:
    """Masks and parametrisations are read as the weights they give; the user's model keeps its own."""
    model = nn.Sequential(OrderedDict(conv=make(), norm=nn.BatchNorm2d(4))).double().train()
    model.conv.eval()
    before = fingerprint(model)
    program = capture(model, (images(),))
    assert fingerprint(model) == before
    assert set(program.tensors) >= {"conv.weight", "conv.bias"}
    assert any("conv.weight is computed" in note for note in program.notes)
    emitted = raise_program(program)
    assert type(emitted.conv) is nn.Conv2d and emitted.conv.weight.requires_grad
    assert not [name for name in emitted.state_dict() if "orig" in name or "weight_" in name]
    model.eval()
    x = images(3)
    assert_same(model(x), emitted(x))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def test_weight_standardisation_takes_the_name_of_the_weight() -> None:
    """The original weight is read by nothing else, so the computed one takes its name."""
    model = nn.Sequential(Standardised(3, 4, 3))
    program = check(model, images())
    assert sorted(program.tensors) == ["0.bias", "0.weight"]
    assert list(raise_program(program).state_dict()) == list(model.state_dict())

"""Train mode of an exported model: what it cannot do as the original did is said in the report."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.subjects import SmallResNet, dense, image, masked


class Functional(nn.Module):
    """Batch norm and attention called as functions, with flags that follow ``self.training``."""

    def __init__(self, rate: float = 0.0, child_rate: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.qkv = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 12)
        self.attn_dropout, self.attn_drop = rate, nn.Dropout(child_rate)
        self.register_buffer("mean", torch.linspace(-1, 1, 4))
        self.register_buffer("variance", torch.linspace(1, 2, 4))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 4) to (batch, tokens, 3)."""
        x = self.norm(F.relu(self.first(x)).transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        rate = max(self.attn_dropout, self.attn_drop.p) if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = F.batch_norm(x.transpose(1, 2), self.mean, self.variance, training=self.training).transpose(1, 2)
        return self.out(x)


def notes_of(model: nn.Module, x: Tensor) -> tuple[Any, str]:
    """The export of ``model`` with one zero channel, and its notes as one text."""
    with torch.no_grad():
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        last.weight[:, 1] = 0
    pruned = upscale.export(model, (x,))
    return pruned, "\n".join(pruned.report.notes)


def test_functional_batch_norm_is_frozen_and_said() -> None:
    """It keeps to the running statistics in train mode; the layer beside it does not."""
    x = torch.randn(2, 5, 4)
    pruned, notes = notes_of(dense(Functional()).float(), x)
    assert "keeps to eval mode after train() too" in notes and "model (batch_norm)" in notes
    assert "norm," not in notes and "dropout" not in notes
    before = pruned.mean.clone(), pruned.norm.running_mean.clone()
    pruned.train()(x)
    assert torch.equal(pruned.mean, before[0]) and not torch.equal(pruned.norm.running_mean, before[1])
    assert "keeps to eval mode" in str(pruned.report)


@pytest.mark.parametrize("rates", [{"rate": 0.1}, {"child_rate": 0.2}])
def test_attention_dropout_is_idle_and_said(rates: dict[str, float]) -> None:
    """Its rate was zero in eval mode: nothing random is left in train mode."""
    x = torch.randn(2, 5, 4)
    pruned, notes = notes_of(dense(Functional(**rates)).float(), x)
    name = "attn_drop" if "child_rate" in rates else "model (attention dropout)"
    assert f"active in training only, so not exported: {name}" in notes
    pruned.norm.eval()
    torch.testing.assert_close(pruned.train()(x), pruned.train()(x))


def test_multihead_attention_dropout_is_said() -> None:
    """Also on the path that computes the attention weights, which has no fused operator."""

    class Attends(nn.Module):
        def __init__(self, rate: float, need: bool) -> None:
            super().__init__()
            self.need, self.attention = need, nn.MultiheadAttention(4, 2, dropout=rate, batch_first=True)
            self.out = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=self.need)[0])

    for need in (False, True):
        _, notes = notes_of(Attends(0.1, need), torch.randn(2, 5, 4))
        assert "attention (attention dropout)" in notes
        _, notes = notes_of(Attends(0.0, need), torch.randn(2, 5, 4))
        assert "dropout" not in notes


class FrozenNorm(nn.BatchNorm1d):
    """Running statistics in training too."""

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the mode."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class KeptInEval(nn.BatchNorm1d):
    """The other way to freeze."""

    def train(self, mode: bool = True) -> Any:
        """Never."""
        return super().train(False)


class WithActivation(nn.BatchNorm1d):
    """A norm of a class of its own that trains as any other, with a child of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Norm, then activation."""
        return self.act(super().forward(x))


class Fragile(nn.BatchNorm1d):
    """Does not run in training, so trying it out fails."""

    def forward(self, x: Tensor) -> Tensor:
        """Raise in training."""
        assert not self.training
        return super().forward(x)


def norm_net(norm: nn.Module) -> nn.Module:
    """Two linear layers around ``norm``."""
    return dense(nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2))).float()


@pytest.mark.parametrize("kind", [FrozenNorm, KeptInEval])
def test_norm_frozen_by_its_class_stays_frozen(kind: type[nn.Module]) -> None:
    """As a call, since a layer of torch's own would start to use the batch's statistics."""
    model, x = norm_net(kind(4)), torch.randn(6, 4)
    pruned, notes = notes_of(model, x)
    assert "keeps to eval mode after train() too" in notes and notes.endswith("1 (batch_norm)")
    torch.testing.assert_close(pruned.train()(x), model.train()(x))
    assert set(pruned.state_dict()) == set(model.state_dict())


def test_norm_with_an_activation_inside_trains() -> None:
    """The norm is an ordinary layer, the activation a call."""
    model, x = norm_net(WithActivation(4)), torch.randn(6, 4)
    pruned, notes = notes_of(model, x)
    assert notes == "" and type(pruned.get_submodule("1")) is nn.BatchNorm1d
    before = model.state_dict()["1.running_mean"].clone()
    expected = model.train()(x)
    torch.testing.assert_close(pruned.train()(x), expected)
    assert not torch.equal(model.state_dict()["1.running_mean"], before)


def test_norm_that_cannot_be_tried_out_is_said() -> None:
    """Nobody knows what its class does in training."""
    _, notes = notes_of(norm_net(Fragile(4)), torch.randn(6, 4))
    assert "torch's own layer" in notes and notes.endswith("1 (Fragile)")


def test_ordinary_networks_have_no_such_notes() -> None:
    """Layers of torch's own switch as they always did, dropout too."""
    pruned = upscale.export(masked(), (image(),))
    assert pruned.report.notes == ()


def test_frozen_parts_stay_frozen() -> None:
    """Training flags are taken over module by module, by both ways of exporting."""
    for export in (
        lambda m: upscale.export(m, (image(),)),
        lambda m: upscale.PruningManager(m).compute([image()]).prune(),
    ):
        model = copy.deepcopy(masked(SmallResNet())).train()
        model.layer1.eval()
        model.layer1[0].conv1.train()
        flags = {path: module.training for path, module in model.named_modules()}
        pruned = export(model)
        assert {p: m.training for p, m in pruned.named_modules() if p in flags} == flags
        assert pruned.train().layer1.training

"""One regression test for each trap of capture, emission and copying that a prototype fell into."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upscale
from support.masks import Mask, zero_input
from support.oracle import check_equal, fingerprint, parameter_count, relative_error
from support.subjects import SmallResNet, dense, image, masked


def pruned_of(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Export, checked at several batch sizes, with the user's model untouched."""
    inputs = inputs or (image(),)
    before = fingerprint(model)
    pruned = upscale.export(model, inputs, **options)
    assert fingerprint(model) == before
    check_equal(model, pruned, *inputs)
    return pruned


# -- sharing ----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer called at two places, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.alias = self.conv

    def forward(self, x: Tensor) -> Tensor:
        """Both calls see other channels."""
        x = F.relu(self.stem(x))
        return self.head(self.alias(F.relu(self.conv(x))))


def test_module_called_twice_stays_one_module() -> None:
    """It runs twice with one weight, and is one object under both names."""
    for kind in ("input", "output", "both"):
        pruned = pruned_of(masked(Twice(), kind))
        names = [n for n, _ in pruned.named_parameters() if n.endswith(("conv.weight", "alias.weight"))]
        assert len(names) == 1


def test_zeros_need_iteration_around_a_shared_weight() -> None:
    """A channel dead for one call is alive for the other; then dead for both."""
    model = dense(Twice())
    with torch.no_grad():
        zero_input(model.head, 2)
    pruned_of(model)
    with torch.no_grad():
        zero_input(model.conv, 2)
        pruned = pruned_of(model)
    assert pruned.head.in_channels == 5


def test_tied_weights_stay_tied() -> None:
    """Two layers, one parameter: also after export, a copy and a pickle."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.out = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.mid(self.embed(x))))

    model = dense(Tied())
    with torch.no_grad():
        model.embed.weight[:, [1, 4]] = 0
    tokens = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(0))
    pruned = pruned_of(model, tokens)
    for other in (pruned, copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert other.out.weight is other.embed.weight
    assert parameter_count(pruned) < parameter_count(model)


def test_parameters_are_not_shared_with_the_model() -> None:
    """Also those of layers that were not pruned."""
    model = masked()
    pruned = upscale.export(model, (image(),))
    with torch.no_grad():
        for tensor in pruned.state_dict().values():
            tensor.zero_()
    assert model.fc.bias.abs().sum() > 0 and model.bn1.running_var.abs().sum() > 0


def test_models_that_cannot_be_deep_copied() -> None:
    """Masks of ``torch.nn.utils.prune`` and old weight norm refuse ``deepcopy``: the model is never copied."""
    from torch.nn.utils import prune

    model = dense(SmallResNet())
    prune.ln_structured(model.layer1[0].conv2, "weight", 0.5, n=2, dim=1)
    model.layer1[1].conv1.weight  # noqa: B018
    model(image()).sum().backward()
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    pruned_of(model)


# -- functionalisation ------------------------------------------------------------------------------------------------


class Writes(nn.Module):
    """In-place operations of many kinds, through views too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(6)
        self.register_buffer("memory", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Write, then read through another name."""
        y = self.norm(self.a(x))
        if self.kind == "mask":  # Swin's attention mask: slices filled with a running number
            mask = torch.zeros(y.shape[-2:], dtype=y.dtype)
            count = 0
            for rows in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                for columns in (slice(0, -4), slice(-4, -2), slice(-2, None)):
                    mask[rows, columns] = count
                    count += 1
            y = y + mask.masked_fill(mask != 0, -3.0)
        elif self.kind == "view of view":
            z = y[:, 1:5]
            z[:, 1:3].mul_(2).add_(1)
            y = y + F.pad(z, (0, 0, 0, 0, 1, 1))
        elif self.kind == "alias":
            z = y.view(y.shape[0], 2, 3, *y.shape[2:])
            y.relu_()
            y = y + z.flatten(1, 2)
        elif self.kind == "transposed view":
            y.transpose(2, 3)[:, :, 0].zero_()
        elif self.kind == "chunk":
            first, _ = y.chunk(2, 1)
            first.sigmoid_()
        elif self.kind == "setitem":
            y[:, 0, 1:3] = y[:, 1, 2:4] * 2
        elif self.kind == "copy":
            z = torch.empty_like(y)
            z.copy_(y)
            z[..., 1:-1] = 0.25
            y = z
        elif self.kind == "channel":
            y[:, 2].fill_(0.7)
        elif self.kind == "input":  # the user's own tensor is not written to by the exported model either
            y = y + x.clone().mul_(2).sum(1, keepdim=True)
        elif self.kind == "buffer":
            y = y * self.memory.view(1, 6, 1, 1).add(1)  # type: ignore[operator,union-attr]
        return self.b(F.relu_(y))


@pytest.mark.parametrize(
    "kind",
    "mask,view of view,alias,transposed view,chunk,setitem,copy,channel,input,buffer".split(","),
)
def test_writes_through_views(kind: str) -> None:
    """The naive rewrite of ``op_`` into ``op`` gives wrong numbers for these."""
    for mask in (Mask("input", 0.5, 1), Mask("output", 0.5, 2)):
        model = dense(Writes(kind))
        mask.apply(model)
        x = image()
        kept = x.clone()
        pruned_of(model, x)
        assert torch.equal(x, kept)


# -- emission ---------------------------------------------------------------------------------------------------------


class UnderParent(nn.Module):
    """Weights of child layers used by their parent, a parameter of its own, functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(3, 18), nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Attention written by hand and torch's own."""
        t = x.flatten(2).transpose(1, 2)
        q, k, v = F.linear(t, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        t = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        t = F.linear(t, self.proj.weight, self.proj.bias) * self.scale
        t = F.dropout(t, 0.4, training=self.training)
        t = t + self.attention(t, t, t)[0]
        return self.head(t.mean(1))


def test_layers_are_found_by_the_owner_of_their_weight() -> None:
    """Names stay those of the owner, and functional dropout works again in train mode."""
    model = masked(UnderParent(), "input", 0.5, seed=2)
    with torch.no_grad():
        model.proj.weight[[0, 3]] = 0
        model.proj.bias[[0, 3]] = 0
    pruned = pruned_of(model)
    assert set(pruned.state_dict()) <= set(model.state_dict())
    assert isinstance(pruned.proj, nn.Linear) and isinstance(pruned.head, nn.Linear)
    pruned.train()
    assert relative_error(pruned(image()), pruned(image())) > 1e-6, "functional dropout was lost"
    pruned.eval()
    assert relative_error(pruned(image()), pruned(image())) == 0


def test_containers_are_real_containers() -> None:
    """Indexing, slicing and iterating work as on the original."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)])
            self.named = nn.ModuleDict({"left": nn.Conv2d(6, 4, 1), "right": nn.Conv2d(6, 4, 1)})
            self.body = nn.Sequential(OrderedDict(first=nn.ReLU(), second=nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh())))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            x = self.body(x)
            return self.named["left"](x) * self.named["right"](x)

    pruned = pruned_of(masked(Nested()))
    assert isinstance(pruned.layers[1], nn.Conv2d) and len(pruned.layers) == 2
    assert isinstance(pruned.named["right"], nn.Conv2d)
    assert isinstance(pruned.body.second[0], nn.Conv2d) and isinstance(pruned.body[0], nn.ReLU)


def test_ordered_dict_and_defaults_survive_copies() -> None:
    """A pickled pytree code generator turned OrderedDict into dict and made defaulted arguments mandatory."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor, gain: float = 2.0, extra: Tensor | None = None) -> Any:
            x = self.b(F.relu(self.a(x)) * gain)
            return OrderedDict(out=x if extra is None else x + extra, aux=x.mean((2, 3)))

    model = masked(Model())
    pruned = pruned_of(model)
    for other in (pruned, copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), copy.deepcopy(copy.copy(pruned))):
        assert type(other(image())) is OrderedDict
        check_equal(model, other, image())
        assert str(other.report) == str(pruned.report)


def test_training_only_parts_are_reported() -> None:
    """What does not run in eval mode is gone from the result, and the report says so."""

    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.aux = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if self.training:
                x = x + self.aux(x).mean()
            return self.head(x)

    model = masked(Aux())
    pruned = pruned_of(model)
    assert not [name for name in pruned.state_dict() if name.startswith("aux")]
    assert {"aux.weight", "aux.bias"} <= set(pruned.report.removed)
    assert "aux" in str(pruned.report)


def test_hooks_are_not_run_twice_nor_lost() -> None:
    """A pre-hook and a hook that count, and one that changes the result."""
    model = masked()
    model.layer1.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    model.fc.register_forward_hook(lambda module, args, output: output * 3)
    pruned_of(model)


def test_unused_layers_and_buffers_are_dropped_by_name() -> None:
    """Nothing that the result does not need stays in it, and everything gone is listed."""
    model = dense(SmallResNet())
    model.spare = nn.Linear(3, 3)
    with torch.no_grad():
        model.layer1[1].bn2.weight.zero_()
        model.layer1[1].bn2.bias.zero_()
    pruned = pruned_of(model)
    gone = set(model.state_dict()) - set(pruned.state_dict())
    assert gone == set(pruned.report.removed)
    assert any(name.startswith("layer1.1.conv1") for name in gone) and "spare.weight" in gone


def test_integer_and_boolean_buffers() -> None:
    """Position indices, causal masks, counters."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.position = nn.Embedding(11, 8), nn.Embedding(6, 8)
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
            self.register_buffer("index", torch.arange(6))
            self.register_buffer("causal", torch.ones(6, 6).tril().bool(), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            t = self.embed(x) + self.position(self.index)
            scores = (t @ t.transpose(1, 2)).masked_fill(~self.causal, float("-inf"))  # type: ignore[operator]
            return self.fc2(F.gelu(self.fc1(torch.softmax(scores, -1) @ t)))

    tokens = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(3))
    for kind in ("input", "output", "both"):
        pruned_of(masked(Causal(), kind), tokens)


# -- batch norm, rare calls -------------------------------------------------------------------------------------------


def test_norm_read_by_two_and_conv_read_by_norm_and_more() -> None:
    """A convolution whose result goes into a batch norm and elsewhere; a norm used at two places."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.a(x))
            y = self.b(x)
            return self.c(self.norm(y) + torch.tanh(y) + self.norm(x))

    for kind in ("input", "output", "output_bn", "parameter", "both"):
        for seed in range(2):
            model = dense(Model())
            Mask(kind, 0.5, seed).apply(model, (image(),))
            pruned_of(model)


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_layers(size: int) -> None:
    """One or two channels everywhere; all but one is zero."""
    net = nn.Sequential(nn.Conv2d(3, size, 1), nn.ReLU(), nn.Conv2d(size, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 1, 1))
    model = dense(net)
    with torch.no_grad():
        model[4].weight[:, 0] = 0
    pruned_of(model)


def test_examples_may_need_gradients_or_be_views() -> None:
    """The example tensors are only read."""
    model = masked()
    x = image(4)[::2].requires_grad_(True)
    pruned = upscale.export(model, (x,))
    assert x.grad is None
    check_equal(model, pruned, x.detach())
    with torch.inference_mode():
        check_equal(model, upscale.export(model, (image(),)), image())

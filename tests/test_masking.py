"""Masks by magnitude: which channels are zeroed, which are left alone, and what is refused."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import upscale
from upscale import measure
from upscale.errors import InputError, NonFiniteError, NothingToPruneError, UnsupportedModelError
from upscale.masking import MaskingManager


class Residual(nn.Module):
    """Stem, one block, and a head; the batch norms are registered far from their convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        self.bn1 = nn.BatchNorm2d(12)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu_()
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.softmax(self.head((x + y).mean((2, 3))), dim=1)


@pytest.fixture
def residual() -> Residual:
    torch.manual_seed(0)
    return Residual()


def input_zeros(layer: nn.Module) -> list[int]:
    """Input channels of a convolution or linear layer whose weights are all zero."""
    weight = layer.weight.detach()
    return (weight.transpose(0, 1).flatten(1).abs().sum(1) == 0).nonzero().flatten().tolist()


def output_zeros(layer: nn.Module) -> list[int]:
    return (layer.weight.detach().flatten(1).abs().sum(1) == 0).nonzero().flatten().tolist()


def test_input_side_zeroes_the_lowest_l2_channels_of_every_layer_but_the_first(residual: Residual) -> None:
    before = copy.deepcopy(residual)
    pointers = {name: p.data_ptr() for name, p in residual.named_parameters()}
    manager = MaskingManager(residual)
    assert manager.importance() is manager
    assert manager.mask(0.25) is manager

    norms = before.conv1.weight.pow(2).sum((0, 2, 3))
    assert input_zeros(residual.conv1) == sorted(norms.argsort()[:2].tolist())
    assert [len(input_zeros(m)) for m in (residual.conv1, residual.conv2, residual.head)] == [2, 3, 2]
    assert manager.masked["conv1"].tolist() == input_zeros(residual.conv1)
    assert manager.skipped == {"stem": "reads a model input"}
    assert {name: p.data_ptr() for name, p in residual.named_parameters()} == pointers
    for name, tensor in before.state_dict().items():
        now = residual.state_dict()[name]
        if name not in ("conv1.weight", "conv2.weight", "head.weight"):
            assert torch.equal(now, tensor), name
        else:  # what is not zeroed is not changed either
            assert torch.equal(now[now != 0], tensor[now != 0])


def test_output_side_zeroes_rows_bias_and_the_norm_that_follows_by_execution(residual: Residual) -> None:
    before = copy.deepcopy(residual)
    nn.init.ones_(residual.bn1.bias)
    MaskingManager(residual, side="output").importance("l1").mask(0.5)
    rows = output_zeros(residual.conv1)
    assert rows == sorted(before.conv1.weight.abs().sum((1, 2, 3)).argsort()[:6].tolist())
    for tensor in (residual.conv1.bias, residual.bn1.weight, residual.bn1.bias):
        assert (tensor == 0).nonzero().flatten().tolist() == rows
    assert torch.equal(residual.head.weight, before.head.weight)  # behind it there is only a softmax
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        residual.eval()
        read = residual.bn1(residual.conv1(residual.bn0(residual.stem(x)).relu()))
    assert torch.equal(read[:, rows], torch.zeros_like(read[:, rows]))
    assert residual.bn1.running_mean.equal(before.bn1.running_mean)


def test_the_observing_run_leaves_no_trace(residual: Residual) -> None:
    residual.train()
    residual.bn1.eval()
    before = {name: t.clone() for name, t in residual.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    MaskingManager(residual, example_inputs=torch.randn(2, 3, 16, 16, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), expected)
    assert residual.training and residual.stem.training and not residual.bn1.training
    assert all(torch.equal(before[name], t) for name, t in residual.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in residual.parameters())


def test_input_is_recognised_through_views_and_arithmetic_and_joins() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Conv2d(9, 4, 1)  # reads features next to the image
            self.out = nn.Conv2d(4, 4, 1)
            self.image = nn.Conv2d(3, 6, 1)  # registered after others

        def forward(self, x: Tensor) -> Tensor:
            x = (x.transpose(2, 3) - 0.5) / 0.25
            y = torch.relu(self.image(torch.cat([x[:, :1], x[:, 1:]], 1)))
            return self.out(self.late(torch.cat([y, x], 1)))

    manager = MaskingManager(Normalising(), example_inputs=torch.randn(2, 3, 8, 8)).mask(0.5)
    assert set(manager.skipped) == {"image", "late"}
    assert set(manager.masked) == {"out"}


def test_a_sum_with_the_input_may_be_masked() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.fc1(x)
            return self.head(x + self.fc2(x))

    assert set(MaskingManager(Stream()).mask(0.5).masked) == {"fc2", "head"}  # (2, 8) vectors are guessed


def test_layers_used_through_their_weight_only_are_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.relu(nn.functional.linear(x, self.b.weight)), self.a.weight, self.a.bias)

    model = Functional()
    assert set(MaskingManager(model).skipped) == {"b"}
    assert set(MaskingManager(model, side="output").skipped) == {"a"}


def test_fused_transformer_layer_and_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3))
    manager = MaskingManager(model, example_inputs=torch.randn(2, 7, 5)).mask(0.5)
    assert set(manager.masked) == {"1.linear1", "1.linear2", "2"}
    assert torch.count_nonzero(layer.self_attn.out_proj.weight) == 256
    assert torch.count_nonzero(layer.self_attn.in_proj_weight) == 768


def test_embedding_makes_channels_of_its_own() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    tokens = torch.arange(6).view(2, 3)
    assert set(MaskingManager(model, example_inputs=tokens).mask(0.5).masked) == {"1", "2"}
    # Without an example nothing can be guessed that an embedding takes: the first layer counts as the input's
    # reader.
    assert set(MaskingManager(model).mask(0.5).masked) == {"2"}


def test_order_of_registration_stands_in_for_a_run() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.bn = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # two inputs: no guess fits
            return self.fc(self.bn(self.conv(x)).mean((2, 3)) * scale)

    model = Odd()
    manager = MaskingManager(model, side="output").mask(0.5)
    assert set(manager.masked) == {"conv"} and set(manager.skipped) == {"fc"}
    assert (model.bn.weight == 0).nonzero().flatten().tolist() == output_zeros(model.conv)
    assert set(MaskingManager(model).mask(0.5).masked) == {"fc"}
    kwargs = {"x": torch.randn(2, 3, 9, 9), "scale": torch.ones(1)}
    assert MaskingManager(model, example_inputs=kwargs).skipped == {"conv": "reads a model input"}
    with pytest.raises(InputError, match="example_inputs"):
        MaskingManager(model, method="constrained")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 4, 3), (2, 6, 9)),
        (nn.Conv3d(6, 4, 1), (2, 6, 3, 3, 3)),
        (nn.ConvTranspose2d(6, 4, 2), (2, 6, 4, 4)),
        (nn.ConvTranspose2d(6, 4, 2, groups=2), (2, 6, 4, 4)),
        (nn.Conv2d(6, 4, 1, groups=2), (2, 6, 4, 4)),
        (nn.Linear(6, 4), (2, 6)),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_zeroed_channels_are_not_read_or_written(layer: nn.Module, shape: tuple[int, ...], side: str) -> None:
    """Checked by running: masked input channels cannot change a layer, masked output channels are zero."""
    layer = copy.deepcopy(layer)
    is_volume = len(shape) > 2
    first: nn.Module = getattr(nn, f"Conv{len(shape) - 2}d")(2, 6, 1) if is_volume else nn.Linear(2, 6)
    last: nn.Module = getattr(nn, f"Conv{len(shape) - 2}d")(4, 2, 1) if is_volume else nn.Linear(4, 2)
    model = nn.Sequential(first, layer, last)
    manager = MaskingManager(model, side=side, example_inputs=torch.randn(shape[0], 2, *shape[2:])).mask(0.5)
    if side == "input" and getattr(layer, "groups", 1) > 1:
        assert "grouped" in manager.skipped["1"] and "1" not in manager.masked
        return
    channels = manager.masked["1"]
    assert len(channels) == (3 if side == "input" else 2)
    x = torch.randn(shape)
    if side == "input":
        louder = x.clone()
        louder[:, channels] *= 100
        assert torch.equal(layer(x), layer(louder))
    else:
        assert not layer(x)[:, channels].any()


def test_depthwise_is_skipped_on_the_input_side_and_masked_on_the_output_side() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))

    assert set(MaskingManager(net()).mask(0.5).masked) == {"2"}
    assert set(MaskingManager(net(), side="output").mask(0.5).masked) == {"0", "1"}


def test_models_of_inference_mode() -> None:
    """Their tensors do not count how often they were written to."""

    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    with torch.inference_mode():
        model = Counting().eval()
        x = torch.rand(2, 3, 8, 8)
        MaskingManager(model, example_inputs=x).mask(0.5)
        assert model.calls == 0 and int((model[3].weight == 0).all(3).all(2).all(0).sum()) == 4
        smaller = upscale.export(model, (x,))
    assert smaller.get_submodule("3").in_channels == 4


def test_amount_is_a_floor_and_the_last_channel_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    manager = MaskingManager(model).mask(0.29)  # 0.29 * 100 is 28.999... in binary
    assert {name: len(channels) for name, channels in manager.masked.items()} == {"1": 29}
    manager.mask(0.999)
    assert {name: len(channels) for name, channels in manager.masked.items()} == {"1": 99, "2": 1, "3": 1}
    untouched = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    assert MaskingManager(untouched).mask(0).masked == {} and untouched[1].weight.all()


def test_ties_are_broken_by_the_order_of_channels() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    for layer in model:
        nn.init.ones_(layer.weight)
    assert [c.tolist() for c in MaskingManager(copy.deepcopy(model)).mask(0.5).masked.values()] == [[0, 1, 2, 3]] * 2
    everywhere = MaskingManager(model, is_global=True).mask(0.5).masked
    assert [c.tolist() for c in everywhere.values()] == [[0, 1, 2, 3, 4, 5, 6], [0]]


def test_global_ranking_compares_layers_after_normalising() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.ones(20, 20) * 1000)  # even, but large
        model[2].weight.copy_(torch.linspace(0.001, 1, 20).expand(2, 20))
    masked = MaskingManager(model, is_global=True).mask(0.25).masked
    assert masked["2"].tolist() == list(range(10)) and "1" not in masked


def test_heuristics(residual: Residual) -> None:
    by_element = MaskingManager(copy.deepcopy(residual)).importance(torch.abs).mask(0.5)
    by_name = MaskingManager(copy.deepcopy(residual)).importance("l1").mask(0.5)
    assert {n: c.tolist() for n, c in by_element.masked.items()} == {n: c.tolist() for n, c in by_name.masked.items()}
    last_first = MaskingManager(residual).importance(lambda w: -torch.arange(w.shape[1])).mask(0.5)
    assert last_first.masked["conv1"].tolist() == [4, 5, 6, 7]
    for bad in ("l3", None, 2):
        with pytest.raises(InputError, match="heuristic"):
            MaskingManager(residual).importance(bad)
    for broken in (lambda w: w.sum(), lambda w: "no", lambda w: torch.ones(3)):
        with pytest.raises(InputError, match="conv1"):
            MaskingManager(residual).importance(broken)
    with pytest.raises(NonFiniteError):
        MaskingManager(residual).importance(lambda w: w / 0)


def test_a_heuristic_cannot_write_to_the_weights(residual: Residual) -> None:
    before = residual.conv1.weight.clone()
    MaskingManager(residual).importance(lambda w: w.zero_())
    assert torch.equal(before, residual.conv1.weight)


@pytest.mark.parametrize("amount", [-0.1, 1, 1.5, float("nan"), float("inf"), True, "half", None, [0.5], 1j])
def test_bad_amounts_are_refused(residual: Residual, amount: object) -> None:
    before = copy.deepcopy(residual.state_dict())
    with pytest.raises(InputError, match="amount"):
        MaskingManager(residual).mask(amount)
    assert all(torch.equal(before[name], tensor) for name, tensor in residual.state_dict().items())


def test_bad_arguments_are_refused(residual: Residual) -> None:
    with pytest.raises(InputError, match="side"):
        MaskingManager(residual, side="left")
    with pytest.raises(InputError, match="method"):
        MaskingManager(residual, method="random")
    with pytest.raises(InputError, match="is_global"):
        MaskingManager(residual, is_global=1)
    with pytest.raises(InputError, match="example inputs"):
        MaskingManager(residual, example_inputs=torch.randn(2, 4, 8, 8))
    with pytest.raises(InputError, match=r"nn\.Module"):
        MaskingManager(torch.relu)
    with pytest.raises(InputError, match="lazy"):
        MaskingManager(nn.Sequential(nn.LazyConv2d(3, 1)))
    with pytest.raises(UnsupportedModelError, match="ScriptModule"):
        MaskingManager(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))


def test_nothing_to_mask() -> None:
    with pytest.raises(NothingToPruneError, match="no convolution"):
        MaskingManager(nn.Sequential(nn.ReLU())).mask()
    with pytest.raises(NothingToPruneError, match="0: reads a model input"):
        MaskingManager(nn.Sequential(nn.Linear(3, 3))).mask()


def test_non_finite_weights_are_refused(residual: Residual) -> None:
    with torch.no_grad():
        residual.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="conv2"):
        MaskingManager(residual).mask()


def test_computed_weights_are_refused_by_name(residual: Residual) -> None:
    prune.l1_unstructured(residual.conv1, "weight", 0.5)
    with pytest.raises(UnsupportedModelError, match=r"conv1\.weight.*prune\.remove"):
        MaskingManager(residual)
    prune.remove(residual.conv1, "weight")
    MaskingManager(residual)
    parametrizations.weight_norm(residual.conv2)
    with pytest.raises(UnsupportedModelError, match=r"conv2\.weight.*remove_parametrizations"):
        MaskingManager(residual)
    assert MaskingManager(nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))).mask().masked


def test_tied_weights_are_one_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[2].weight = model[1].weight
    manager = MaskingManager(model).mask(0.5)
    assert set(manager.masked) == {"1", "3"} and len(input_zeros(model[1])) == 4


def test_layers_under_one_batch_norm_choose_together() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.bn(self.b(torch.relu(self.bn(self.a(x))))))

    torch.manual_seed(1)
    model = Shared()
    masked = MaskingManager(model, side="output").mask(0.5).masked
    assert masked["a"].tolist() == masked["b"].tolist() == (model.bn.weight == 0).nonzero().flatten().tolist()
    assert len(masked["a"]) == 4


def test_unused_layers_are_left_alone(residual: Residual) -> None:
    residual.spare = nn.Linear(8, 8)
    manager = MaskingManager(residual).mask(0.5)
    assert manager.skipped["spare"] == "is not used by the forward pass" and residual.spare.weight.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(residual: Residual, dtype: torch.dtype) -> None:
    manager = MaskingManager(residual.to(dtype), example_inputs=torch.randn(2, 3, 8, 8, dtype=dtype)).mask(0.5)
    assert len(manager.masked["conv1"]) == 4 and residual.conv1.weight.dtype == dtype


class TestConstrained:
    """Against a stand-in for the graph's groups: what is done with them is masking's own business."""

    @pytest.fixture
    def groups(self, monkeypatch: pytest.MonkeyPatch) -> list:
        """The groups that the stand-in returns; tests fill it."""
        found: list = []
        module = types.ModuleType("upscale.segments")
        module.segments = lambda model, args, kwargs: found
        monkeypatch.setitem(sys.modules, "upscale.segments", module)
        return found

    def test_all_members_zero_the_channels_with_the_lowest_sum(self, residual: Residual, groups: list) -> None:
        whole = torch.arange(8)
        groups += [
            [
                ("stem", "output", whole),
                ("conv2", "output", whole),
                ("conv1", "input", whole),
                ("head", "input", whole),
            ],
            [("conv1", "output", torch.arange(12)), ("conv2", "input", torch.arange(12))],
        ]
        sums = residual.conv1.weight.pow(2).sum((0, 2, 3)).sqrt()
        sums = sums + residual.head.weight.pow(2).sum(0).sqrt()
        masked = MaskingManager(residual, method="constrained").mask(0.5).masked
        lowest = sorted(sums.argsort()[:4].tolist())
        assert masked["conv1"].tolist() == masked["head"].tolist() == lowest
        assert input_zeros(residual.conv1) == input_zeros(residual.head) == lowest
        assert len(masked["conv2"]) == 6 and "stem" not in masked

    def test_output_side(self, residual: Residual, groups: list) -> None:
        whole = torch.arange(8)
        groups += [
            [
                ("stem", "output", whole),
                ("conv2", "output", whole),
                ("conv1", "input", whole),
                ("head", "input", whole),
            ],
            [("head", "output", torch.arange(5))],
        ]
        masked = MaskingManager(residual, side="output", method="constrained").mask(0.5)
        assert output_zeros(residual.stem) == output_zeros(residual.conv2) == masked.masked["stem"].tolist()
        assert (residual.bn2.bias == 0).all() and not residual.bn2.weight[masked.masked["conv2"]].any()
        assert "head" in masked.skipped and residual.head.weight.all()

    def test_channels_found_in_several_places_or_in_none(self, residual: Residual, groups: list) -> None:
        """A reader of a part of a joined tensor, and one to which a channel is many features (flattened)."""
        part = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7])
        pairs = torch.stack([torch.arange(12), torch.full((12,), -1)], 1)
        groups += [[("conv1", "input", part), ("conv2", "input", pairs)]]
        with torch.no_grad():
            residual.conv2.weight[:, [0, 4, 5]] = 0
            residual.conv1.weight[:, 1] = 0
        manager = MaskingManager(residual, method="constrained").mask(0.17)
        assert manager.masked["conv2"].tolist() == [0, 5] and manager.masked["conv1"].tolist() == [1]

    def test_every_member_loses_its_share(self, residual: Residual, groups: list) -> None:
        """Channels that more layers have score more, being sums; each kind of channel loses its share all the same."""
        part = torch.tensor([-1, -1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7])
        groups += [[("conv1", "input", part), ("conv2", "input", torch.arange(12))]]
        masked = MaskingManager(residual, method="constrained").mask(0.5).masked
        assert len(masked["conv1"]) == 4 and len(masked["conv2"]) == 6
        masked = MaskingManager(residual, method="constrained").mask(0.25).masked
        assert len(masked["conv1"]) == 2 and len(masked["conv2"]) == 3

    def test_no_member_loses_its_last_channel(self, residual: Residual, groups: list) -> None:
        lone = torch.full((12,), -1)
        lone[3] = 0
        groups += [[("head", "input", lone), ("conv2", "input", torch.arange(12))]]
        nn.init.zeros_(residual.conv2.weight[:, 3])
        nn.init.zeros_(residual.head.weight)
        masked = MaskingManager(residual, method="constrained").mask(0.5).masked
        assert len(masked["conv2"]) == 6 and 3 not in masked["conv2"] and "head" not in masked

    def test_a_group_with_the_model_input_is_left_alone(self, residual: Residual, groups: list) -> None:
        groups += [[("stem", "input", torch.arange(3)), ("conv1", "input", torch.tensor([0, 1, 2]))]]
        manager = MaskingManager(residual, method="constrained")
        assert set(manager.skipped) == {"stem", "conv1"} and "reads a model input" in manager.skipped["conv1"]
        with pytest.raises(NothingToPruneError):
            manager.mask()

    def test_grouped_readers_are_zeroed_exactly(self, groups: list) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 2, 1))
        groups += [[("0", "output", torch.arange(8)), ("1", "input", torch.arange(8))]]
        channels = MaskingManager(model, method="constrained").mask(0.5).masked["1"]
        x = torch.randn(1, 8, 5, 5)
        louder = x.clone()
        louder[:, channels] *= 100
        assert len(channels) == 4 and torch.equal(model[1](x), model[1](louder))

    def test_a_layer_called_on_two_tensors_ties_them(self, residual: Residual, groups: list) -> None:
        """conv1 reads two segments through one weight; head and conv2 then have to agree as well."""
        groups += [
            [("conv1", "input", torch.arange(8)), ("head", "input", torch.arange(8))],
            [("conv1", "input", torch.arange(8).flip(0)), ("conv2", "input", torch.arange(8))],
        ]
        masked = MaskingManager(residual, method="constrained").mask(0.5).masked
        assert masked["conv1"].tolist() == masked["head"].tolist()
        assert masked["conv2"].tolist() == sorted(7 - c for c in masked["conv1"].tolist())


class TestConstrainedGraph:
    """With the groups of a real graph: readers of one tensor agree, and the export needs no copy."""

    @pytest.mark.parametrize("side", ["input", "output"])
    def test_members_of_a_residual_stream_agree(self, residual: Residual, side: str) -> None:
        x = torch.randn(2, 3, 8, 8)
        manager = MaskingManager(residual, side=side, method="constrained", example_inputs=x).mask(0.5)
        agreeing = ("conv1", "head") if side == "input" else ("stem", "conv2")
        assert len({tuple(manager.masked[name].tolist()) for name in agreeing}) == 1
        assert len(manager.masked[agreeing[0]]) == 4
        pruned = upscale.export(residual.eval(), (x,))
        assert measure.copies(pruned, x[:1]).bytes == measure.copies(residual, x[:1]).bytes
        assert pruned.conv1.in_channels == 4 and pruned.conv2.in_channels == 6 and pruned.stem.out_channels == 4

    def test_unconstrained_readers_disagree_and_copy(self, residual: Residual) -> None:
        """The counterpart, without which the test above would show nothing."""
        x = torch.randn(2, 3, 8, 8)
        manager = MaskingManager(residual, example_inputs=x).mask(0.5)
        assert manager.masked["conv1"].tolist() != manager.masked["head"].tolist()
        pruned = upscale.export(residual.eval(), (x,), reads="gather")
        assert measure.copies(pruned, x[:1]).bytes > measure.copies(residual, x[:1]).bytes

    def test_parts_of_a_joined_tensor(self) -> None:
        class Joined(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
                self.out, self.last = nn.Conv2d(10, 5, 1), nn.Conv2d(5, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.relu(self.a(x))
                return self.last(torch.relu(self.out(torch.cat([self.b(x), x], 1))))

        model, x = Joined().eval(), torch.randn(2, 3, 4, 4)
        masked = MaskingManager(model, method="constrained", example_inputs=x).mask(0.5).masked
        assert [c + 4 for c in masked["b"].tolist()] == [c for c in masked["out"].tolist() if c >= 4]
        pruned = upscale.export(model, (x,))
        assert measure.copies(pruned, x[:1]).by_op.keys() <= {"cat"}


class _Padded(nn.Module):
    """A stream of 8 channels, padded to 16: the readers of the narrow part see half of the wide one's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 3, padding=1)
        self.widen = nn.Conv2d(8, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.narrow(x))
        x = torch.relu(nn.functional.pad(x, (0, 0, 0, 0, 4, 4)) + self.widen(x))
        return self.head(torch.relu(x + self.wide(x)).mean((2, 3)))


@pytest.mark.parametrize("amount", [0.25, 0.5])
def test_constrained_layers_on_a_padded_stream_lose_their_share(amount: float) -> None:
    torch.manual_seed(0)
    model = _Padded()
    manager = MaskingManager(model, method="constrained", example_inputs=torch.randn(2, 3, 16, 16)).mask(amount)
    lost = {name: len(channels) for name, channels in manager.masked.items()}
    assert lost == {"narrow": 8 * amount, "widen": 8 * amount, "wide": 16 * amount, "head": 16 * amount}
    # the narrow stream's channels are the middle of the wide one
    assert set((manager.masked["narrow"] + 4).tolist()) <= set(manager.masked["wide"].tolist())

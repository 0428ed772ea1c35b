"""The flow analysis: labels, constants and liveness on networks small enough to know the answer by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upscale
from upscale.capture import capture
from upscale.errors import RuleError
from upscale.flow import analyse_flow, rule
from upscale.flow.labels import Moved, channel_labels, is_selection, merge_pattern, summarise


def flow_of(model: nn.Module, *inputs: torch.Tensor):
    """Flow of a model, and its nodes by operator name in order."""
    flow = analyse_flow(capture(model.eval(), inputs))
    by_name: dict[str, list] = {}
    for node in flow.nodes:
        by_name.setdefault(str(node.target).split(".")[1] if "." in str(node.target) else node.op, []).append(node)
    return flow, by_name


def convs(*widths: int, kernel: int = 1, **options) -> list[nn.Conv2d]:
    return [nn.Conv2d(a, b, kernel, **options) for a, b in zip(widths[:-1], widths[1:], strict=True)]


@torch.no_grad()
def test_a_channel_is_live_when_a_reader_uses_it() -> None:
    a, b = convs(3, 4, 2)
    b.weight[:, 1] = 0
    flow, nodes = flow_of(nn.Sequential(a, nn.ReLU(), b), torch.rand(2, 3, 5, 5))
    assert flow.live[nodes["conv2d"][0]].tolist() == [True, False, True, True]
    assert flow.live[nodes["relu"][0]].tolist() == [True, False, True, True]


@torch.no_grad()
def test_deadness_travels_back_through_several_layers() -> None:
    a, b, c = convs(3, 4, 4, 2)
    c.weight[:, 0] = 0  # kills b's row 0, the only one that uses a's channel 3
    b.weight[1:, 3] = 0
    flow, nodes = flow_of(nn.Sequential(a, b, c), torch.rand(2, 3, 5, 5))
    assert flow.live[nodes["conv2d"][1]].tolist() == [False, True, True, True]
    assert flow.live[nodes["conv2d"][0]].tolist() == [True, True, True, False]


@torch.no_grad()
def test_an_addition_ties_its_operands_and_both_stay_live() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = convs(3, 4, 4, 2)

        def forward(self, x):
            y = self.a(x)
            return self.c(y + self.b(y))

    model = Residual()
    model.c.weight[:, 2] = 0
    flow, nodes = flow_of(model, torch.rand(2, 3, 5, 5))
    a, b, _ = nodes["conv2d"]
    assert flow.live[b].tolist() == [True, True, False, True]
    assert flow.live[a].tolist() == [True] * 4  # b still reads channel 2
    assert flow.demands[b].inputs.all()


@torch.no_grad()
def test_a_zero_row_becomes_the_constant_that_its_activation_makes_of_it() -> None:
    a, b = convs(3, 4, 2)
    a.weight[1] = 0
    a.bias[1] = 0
    flow, nodes = flow_of(nn.Sequential(a, nn.Sigmoid(), b), torch.rand(2, 3, 5, 5))
    constants = flow.constants[nodes["sigmoid"][0]]
    assert constants is not None
    assert constants.known.tolist() == [False, True, False, False]
    assert constants.value[1].item() == 0.5  # never assume f(0) = 0
    # an unpadded convolution folds it into its bias: 0.5 times the column's sum
    demand = flow.demands[nodes["conv2d"][1]]
    assert demand.inputs.tolist() == [True, False, True, True]
    expected = 0.5 * b.weight[:, 1].sum((1, 2)).double()
    torch.testing.assert_close(demand.delta, expected)


@torch.no_grad()
def test_a_constant_is_kept_where_a_padded_border_would_see_another_value() -> None:
    a, b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1)
    a.weight[1] = 0
    a.bias[1] = 7.0
    flow, nodes = flow_of(nn.Sequential(a, b), torch.rand(2, 3, 5, 5))
    assert flow.demands[nodes["conv2d"][1]].inputs.tolist() == [True] * 4
    a.bias[1] = 0.0  # zero is what padding holds anyway
    flow, nodes = flow_of(nn.Sequential(a, b), torch.rand(2, 3, 5, 5))
    assert flow.demands[nodes["conv2d"][1]].inputs.tolist() == [True, False, True, True]


@torch.no_grad()
def test_without_a_bias_a_constant_goes_to_the_batch_norm_behind() -> None:
    a, b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, bias=False)
    a.weight[1] = 0
    a.bias[1] = 7.0
    norm = nn.BatchNorm2d(2)
    flow, nodes = flow_of(nn.Sequential(a, b, norm), torch.rand(2, 3, 5, 5))
    demand = flow.demands[nodes["conv2d"][1]]
    assert demand.absorber is nodes["batch_norm"][0]
    assert not demand.inputs[1]
    flow, nodes = flow_of(nn.Sequential(a, b), torch.rand(2, 3, 5, 5))  # nobody to take it: the channel stays
    assert flow.demands[nodes["conv2d"][1]].inputs.all()


def test_flatten_keeps_the_pixels_of_a_channel_together() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 2))
    with torch.no_grad():
        model[2].weight[:, 9:18] = 0  # all of channel 1
        model[2].weight[:, 0:5] = 0  # some pixels of channel 0: the channel stays
    flow, nodes = flow_of(model, torch.rand(2, 3, 3, 3))
    flat = flow.nodes[nodes["flatten"][0]]
    assert flat.merge == (1, 9)
    assert flat.channels is not None and flat.channels.unit_count == 4
    assert flow.live[nodes["conv2d"][0]].tolist() == [True, False, True, True]
    assert flow.demands[nodes["linear"][0]].inputs.sum() == 22  # the layer itself needs single pixels


def test_a_channel_shuffle_is_a_selection() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = convs(3, 6, 2)

        def forward(self, x):
            y = self.a(x)
            n, c, h, w = y.shape
            return self.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    flow, nodes = flow_of(Shuffle(), torch.rand(2, 3, 5, 5))
    shuffled = flow.nodes[nodes["reshape"][0]]
    assert shuffled.kind == "select"
    assert shuffled.links[0].operand is nodes["conv2d"][0]
    assert shuffled.links[0].positions.tolist() == [0, 3, 1, 4, 2, 5]


def test_channels_spread_over_heads_are_a_reported_barrier() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x).view(x.shape[0], -1, 2, 3).transpose(1, 2)
            y = F.scaled_dot_product_attention(y, y, y)
            return self.b(y.transpose(1, 2).flatten(2))

    flow, nodes = flow_of(Heads(), torch.rand(2, 4, 3))
    assert flow.live[nodes["linear"][0]].all()
    barrier = next(f for f in flow.nodes.values() if f.kind == "barrier" and f.node.op == "call_function")
    assert "several dimensions" in barrier.effect.reason


def test_an_unknown_operator_is_a_barrier_and_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = convs(3, 4, 2)

        def forward(self, x):
            return self.b(torch.cumsum(self.a(x), 1))

    model = Odd()
    with torch.no_grad():
        model.b.weight[:, 1] = 0
    flow, nodes = flow_of(model, torch.rand(2, 3, 5, 5))
    assert flow.nodes[nodes["cumsum"][0]].kind == "barrier"
    assert flow.live[nodes["conv2d"][0]].all()


def test_an_output_that_cannot_change_does_not_depend_on_the_input() -> None:
    a, b = convs(3, 4, 2)
    with torch.no_grad():
        b.weight.zero_()
    flow, _ = flow_of(nn.Sequential(a, b), torch.rand(2, 3, 5, 5))
    assert not flow.depends
    with torch.no_grad():
        b.weight[0, 0] = 1
    flow, _ = flow_of(nn.Sequential(a, b), torch.rand(2, 3, 5, 5))
    assert flow.depends


@torch.no_grad()
def test_a_layer_whose_result_is_known_still_has_its_operand() -> None:
    """A depthwise filter of zeros gives its bias whatever comes in; the call must not lose what it is called on."""
    a, b, c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 3, padding=1)
    b.weight.zero_()
    b.bias.fill_(0.5)
    model = nn.Sequential(a, b, c, nn.Flatten(), nn.Linear(50, 3))
    flow, nodes = flow_of(Both(model), torch.rand(2, 3, 5, 5))
    assert flow.live[nodes["conv2d"][0]].sum() == 1
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(upscale.export(Both(model), (x,))(x), Both(model)(x))


class Both(nn.Module):
    """A model's result and something of its input, so that the output is no constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), x.mean()


def test_labels_cost_no_memory_and_name_their_dimension() -> None:
    labels = channel_labels((2, 5, 7, 7), 1)
    assert labels.untyped_storage().nbytes() == 5 * 4
    moved = summarise(labels.permute(0, 2, 3, 1))
    assert moved is not None and moved.dim == 3 and moved.positions.tolist() == [0, 1, 2, 3, 4]
    assert summarise(labels.reshape(2, 5, 49).transpose(1, 2).reshape(2, 49 * 5)) is not None
    assert summarise(torch.arange(12).view(3, 4)) is None  # two dimensions


def test_merge_pattern_tells_the_outer_from_the_inner_factor() -> None:
    assert merge_pattern(torch.tensor([0, 0, 1, 1, 2, 2]).numpy(), 3) == (1, 2)
    assert merge_pattern(torch.tensor([0, 1, 2, 0, 1, 2]).numpy(), 3) == (2, 1)
    assert merge_pattern(torch.tensor([0, 2, 1]).numpy(), 3) is None


def test_a_flip_of_space_is_no_selection_of_channels() -> None:
    positions = torch.arange(4).numpy()
    assert is_selection(lambda t: t, (2, 4, 3, 3), 1, Moved(1, positions))
    assert not is_selection(lambda t: t.flip(2), (2, 4, 3, 3), 1, Moved(1, positions))


def test_rules_refuse_duplicates_and_things_that_are_no_operator() -> None:
    with pytest.raises(RuleError, match="already has the rule"):
        rule(torch.ops.aten.linear.default)(lambda op: None)
    with pytest.raises(RuleError, match="not an operator overload"):
        rule(torch.relu)(lambda op: None)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="at least one"):
        rule()

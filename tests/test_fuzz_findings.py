"""What ``make fuzz`` found, one shrunk network each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upscale
from support.oracle import check_equal, parameter_count, randomise


class Net(nn.Module):
    """A network given as its layers and a function of them and the input."""

    def __init__(self, run: Callable[..., Any], tensors: dict[str, Tensor] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        for name, tensor in (tensors or {}).items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        """``run`` on this module and the input."""
        return self.run(self, x)


def values(*shape: int) -> Tensor:
    """Normally distributed, always the same."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def exported(model: nn.Module, x: Tensor, zero: dict[str, list[int]], dim: int = 1, batches: Any = (1, 3)) -> Any:
    """Zero columns (``dim=1``) or rows of weights, export in every reads mode, compare; the model of ``auto``."""
    randomise(model.double().eval(), seed=3)
    with torch.no_grad():
        for name, channels in zero.items():
            model.get_parameter(name).index_fill_(dim, torch.tensor(channels), 0)
    made = {}
    for reads in ("auto", "gather", "baseline"):
        made[reads] = upscale.export(model, (x,), reads=reads)  # type: ignore[arg-type]
        check_equal(model, made[reads], x, batches=batches)
        assert parameter_count(made[reads]) <= parameter_count(model)
    return made["auto"]


def test_pieces_of_another_dimension_than_the_channels() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        first, rest = torch.split(torch.relu(net.a(x)), [1, 4], dim=1)  # tokens
        return net.c(torch.cat([first, net.b(rest)], dim=1))

    net = Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    pruned = exported(net, values(2, 5, 6), {"b.weight": [1, 2], "c.weight": [4]})
    assert pruned.c.in_features == 7


def test_a_layer_along_another_dimension_than_the_channels() -> None:
    net = Net(lambda net, x: net.b(net.a(x)), a=nn.Embedding(7, 2), b=nn.Conv1d(3, 2, 1))
    pruned = exported(net, torch.randint(0, 7, (2, 3)), {"b.weight": [2]})
    assert pruned.b.in_channels == 2


def test_the_same_behind_a_slice() -> None:
    net = Net(lambda net, x: net.b(net.a(x)[..., 1:]), a=nn.Linear(4, 5), b=nn.Conv1d(3, 2, 1))
    pruned = exported(net, values(2, 3, 4), {"b.weight": [1]})
    assert (pruned.a.out_features, pruned.b.in_channels) == (4, 2)


def test_a_gate_expanded_like_an_input_that_keeps_its_channels() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        gate = torch.sigmoid(net.a(F.adaptive_avg_pool2d(x, 1)))
        return net.b(gate.expand_as(x) * x)

    net = Net(run, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 3, 1))
    pruned = exported(net, values(2, 4, 5, 5), {"b.weight": [1]})
    assert (pruned.a.out_channels, pruned.b.in_channels) == (3, 3)


def test_a_selection_by_a_boolean_buffer_keeps_what_it_selects_from() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.b(torch.relu(net.a(x)[:, net.mask]) + net.c(x))

    mask = torch.tensor([True, False, True, True])
    net = Net(run, {"mask": mask}, a=nn.Linear(3, 4), b=nn.Linear(3, 2), c=nn.Linear(3, 3))
    pruned = exported(net, values(2, 3), {"b.weight": [1]})
    assert (pruned.a.out_features, pruned.b.in_features) == (4, 2)


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_an_index_that_lists_all_channels_follows_those_that_are_left(index: list[int]) -> None:
    net = Net(
        lambda net, x: net.b(net.a(x)[:, net.index]),
        {"index": torch.tensor(index)},
        a=nn.Linear(3, 4),
        b=nn.Linear(len(index), 2),
    )
    gone = [i for i, channel in enumerate(index) if channel == 1]
    pruned = exported(net, values(2, 3), {"b.weight": gone})
    assert (pruned.a.out_features, pruned.b.in_features) == (3, len(index) - len(gone))


def test_a_part_in_the_original_order_of_a_list_that_was_reordered() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        gate = torch.sigmoid(net.b(F.relu(net.a(F.adaptive_avg_pool1d(x, 1)))))
        return (x + x * gate).chunk(2, dim=2)[1]

    net = Net(run, stem=nn.Conv1d(3, 6, 1), a=nn.Conv1d(6, 8, 1), b=nn.Conv1d(8, 6, 1))
    exported(net, values(2, 3, 4), {"b.weight": [1], "a.weight": [0, 3]})


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_a_gain_computed_from_a_parameter_along_any_dimension(shape: tuple[int, int]) -> None:
    net = Net(
        lambda net, x: net.b((1 + net.gain) * net.a(x)),
        {"gain": nn.Parameter(values(*shape))},
        a=nn.Linear(3, 2),
        b=nn.Linear(2, 3),
    )
    pruned = exported(net, values(2, 2, 3), {"b.weight": [0]})
    assert pruned.a.out_features == 1


def test_a_product_with_a_parameter_that_has_a_group_dimension() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        grouped = torch.einsum("ngcy,goc->ngoy", net.a(x).flatten(2).unflatten(1, (2, 3)), net.weight)
        return net.b(grouped.flatten(1, 2))

    net = Net(
        run,
        {"weight": nn.Parameter(values(2, 4, 3))},
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv1d(8, 2, 1),
    )
    exported(net, values(2, 3, 2, 2), {"b.weight": [2]})


def test_a_tied_weight_used_straight_and_transposed_stays_one() -> None:
    net = Net(lambda net, x: F.linear(torch.tanh(net.a(x)), net.a.weight.t()), a=nn.Linear(4, 5))
    pruned = exported(net, values(2, 4), {"a.weight": [1]}, dim=0)
    assert [name for name, _ in pruned.named_parameters()] == ["a.weight", "a.bias"]


def test_a_batch_that_torch_fixes_by_a_condition_alone_is_said_and_guarded() -> None:
    net = Net(
        lambda net, x: net.b(torch.take_along_dim(net.a(x), net.index.view(1, 1, 1), dim=1)),
        {"index": torch.tensor([0])},
        a=nn.Conv1d(3, 4, 1),
        b=nn.Linear(1, 3),
    )
    randomise(net.double().eval(), seed=3)
    x = values(2, 3, 1)
    with torch.no_grad():
        net.b.weight[1] = 0
    pruned = upscale.export(net, (x,))
    assert torch.equal(pruned(x), net(x))
    if not any("batch size specialised" in note for note in pruned.report.notes):
        torch.testing.assert_close(pruned(values(3, 3, 1)), net(values(3, 3, 1)))


def test_a_guard_never_refuses_the_example() -> None:
    net = Net(lambda net, x: net.a(x.contiguous().view(x.shape[0], 1, 4)), a=nn.Linear(4, 2))
    randomise(net.double().eval(), seed=3)
    with torch.no_grad():
        net.a.weight[:, 1] = 0
    x = values(2, 1, 2, 2)
    pruned = upscale.export(net, (x,), dynamic_shapes="spatial")
    torch.testing.assert_close(pruned(x), net(x))


def test_rounding_inside_a_float64_model_is_no_fault() -> None:
    """Norms of language models compute in float32 whatever the model's type: there the reference itself rounds."""

    def run(net: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(net.a(x))
        rough = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(rough.pow(2).mean(-1, keepdim=True) + 1e-6).to(hidden.dtype)
        return net.c(torch.relu(net.b(hidden))).float()

    net = Net(run, a=nn.Linear(8, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 4))
    randomise(net.double().eval(), seed=3)
    with torch.no_grad():
        net.b.weight[:, ::4] = 0
        net.c.weight[:, ::3] = 0
    pruned = upscale.export(net, (values(2, 8),))
    assert pruned.report.error <= 1e-10  # compared in float64 throughout
    assert pruned.c.in_features == 21


def test_a_weight_used_without_its_bias_stays_without() -> None:
    net = Net(
        lambda net, x: F.conv2d(torch.relu(net.a(x)), net.b.weight, None, 1, 1),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 2, 2),
    )
    pruned = exported(net, values(2, 3, 4, 4), {"b.weight": [2]})
    assert "b.bias" not in pruned.state_dict() and pruned.a.out_channels == 3


def test_other_spellings_are_known() -> None:
    """Sizes taken from another tensor, aliases, norms over space, and an index computed from a buffer."""

    def run(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.a(x))
        z = torch.multiply(y.flatten(2).view_as(y), torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True))
        return net.b(z[:, :, net.rows.view(-1)])

    net = Net(run, {"rows": torch.tensor([[1, 0], [2, 2]])}, a=nn.Conv2d(3, 5, 1), b=nn.Conv2d(5, 2, 1))
    pruned = exported(net, values(2, 3, 3, 3), {"b.weight": [1, 4]})
    assert (pruned.a.out_channels, pruned.b.in_channels) == (3, 3)
    assert not pruned.report.barriers


def test_a_gain_computed_from_a_parameter_stays_a_parameter() -> None:
    net = Net(
        lambda net, x: net.b((1 + net.gain) * net.a(x)),
        {"gain": nn.Parameter(values(6))},
        a=nn.Linear(3, 6),
        b=nn.Linear(6, 2),
    )
    pruned = exported(net, values(2, 3), {"b.weight": [1, 4]})
    assert pruned.gain.shape == (4,)
    pruned(values(2, 3)).sum().backward()
    assert bool(pruned.gain.grad.any())


def test_blocks_that_lie_apart_and_are_all_kept_are_moved_as_written() -> None:
    """Two halves added up: a block is channels ``c`` and ``c + 2``, and nothing of them is gone."""

    def run(net: Any, x: Tensor) -> Tensor:
        halves = F.relu(net.a(x)).view(-1, 2, 2, 3, 3)
        gate = torch.sigmoid(net.b(halves.sum(1).mean((2, 3), keepdim=True)))
        return (halves * gate.unsqueeze(1)).sum(1)

    net = Net(run, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(2, 2, 1))
    exported(net, values(2, 3, 3, 3), {"b.weight": [1]})


def test_a_weight_shared_by_a_call_with_and_one_without_bias() -> None:
    net = Net(
        lambda net, x: F.conv2d(torch.relu(net.b(torch.relu(net.a(x)))), net.b.weight, None, 1, 1),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 4, 3, padding=1),
    )
    exported(net, values(2, 3, 4, 4), {"b.weight": [2]})


def test_a_diagonal_over_channels_keeps_them() -> None:
    """It pairs a channel with a place in space: without the channel all others would move on."""
    net = Net(lambda net, x: net.b(net.a(x).diagonal(0, 1, 3)), a=nn.Conv2d(2, 3, 1), b=nn.Linear(3, 2))
    pruned = exported(net, values(2, 2, 4, 3), {"b.weight": [0]})
    assert pruned.a.out_channels == 3


def test_a_dead_branch_of_a_concatenation_that_a_softmax_keeps() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        joined = torch.cat([net.dead(x), x], 1)
        gate = F.softmax(net.gate(joined.mean(2)), 1)
        return net.head((joined * gate.view(-1, 6, 1)).mean(2))

    net = Net(run, dead=nn.Conv1d(3, 3, 1), gate=nn.Linear(6, 6), head=nn.Linear(6, 2))
    pruned = exported(net, values(2, 3, 5), {"gate.weight": [0, 1, 2], "head.weight": [0, 1, 2]})
    assert not hasattr(pruned, "dead")


def test_a_conversion_of_a_constant_channel_converts_it() -> None:
    """A channel that is known to be False becomes 0.0: operators behind it do not take booleans."""
    net = randomise(
        Net(lambda m, x: torch.relu((m.first(x) > 0.0).to(x.dtype)) - 0.5, first=nn.Linear(3, 4)).double().eval()
    )
    with torch.no_grad():
        net.first.weight[[1]] = 0
        net.first.bias[1] = -1.0
    check_equal(net, upscale.export(net, (values(2, 3),)), values(2, 3))


def test_batch_norm_without_statistics_takes_no_single_value() -> None:
    """Neither does the user's model: such a batch cannot be compared, and is no fault of the export."""
    net = Net(lambda m, x: m.last(m.norm(m.first(x))), first=nn.Linear(3, 6), last=nn.Linear(6, 2))
    net.norm = nn.BatchNorm1d(6, track_running_stats=False)
    net = randomise(net.double().eval())
    with torch.no_grad():
        net.last.weight[:, [0, 3]] = 0
    pruned = upscale.export(net, (values(4, 3),))
    assert pruned.report.batches and 1 not in pruned.report.batches
    for batch in (2, 5):
        check_equal(net, pruned, values(batch, 3), batches=())


def test_an_index_of_flags_can_be_exported_again() -> None:
    """How many channels the flags pick is known at capture; the flags stay in the state dict."""
    flags = torch.tensor([False, True, True])
    net = Net(lambda m, x: m.last(x[:, m.flags]), {"flags": flags}, last=nn.Conv2d(2, 2, 1))
    net = randomise(net.double().eval())
    with torch.no_grad():
        net.last.weight[:, 1] = 0
    x = values(2, 3, 4, 4)
    pruned = upscale.export(net, (x,))
    check_equal(net, pruned, x)
    check_equal(net, torch.export.export(pruned, (x,)).module(), x, batches=())
    assert torch.equal(pruned.state_dict()["flags"], flags)
    assert pruned.last.in_channels == 1


def test_parts_that_lack_the_dimension_they_were_parted_along() -> None:
    """What a list of them costs to read is asked for the first part."""
    net = Net(lambda m, x: m.last(m.table(x).unbind(1)[0]), table=nn.Embedding(5, 6), last=nn.Linear(6, 2))
    net = randomise(net.double().eval())
    with torch.no_grad():
        net.last.weight[:, [1, 2]] = 0
    tokens = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(0))
    check_equal(net, upscale.export(net, (tokens,)), tokens)


def test_batch_norm_used_again_where_channels_lie_elsewhere() -> None:
    """The second call sees the layer's channels as mere places: the scale that both share is needed whole."""

    def run(m: Net, x: Tensor) -> Tensor:
        y = m.wide(F.relu(m.norm(m.first(x)) + m.other(x)))
        return F.batch_norm(y, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)

    net = Net(
        run,
        first=nn.Conv2d(3, 4, 1),
        norm=nn.BatchNorm2d(4),
        other=nn.Conv2d(3, 4, 1),
        wide=nn.Linear(1, 2),
    )
    net = randomise(net.double().eval())
    with torch.no_grad():
        net.norm.weight[2] = net.norm.bias[2] = 0
        net.other.weight[:, 1] = 0
        net.first.weight[:, 1] = 0
    x = values(2, 3, 4, 1)
    for reads in ("auto", "gather", "baseline"):
        pruned = upscale.export(net, (x,), reads=reads)
        check_equal(net, pruned, x)
        assert pruned.norm.num_features == 4 and pruned.first.in_channels == 2

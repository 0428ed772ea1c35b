"""Grouped convolutions: groups that nobody reads vanish, the others keep equally many channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upscale
from support.oracle import check_equal, fingerprint, randomise
from upscale.flow.groups import as_rows, as_transposed, grouped_inputs, grouped_rows, rectangle


def network(groups: int, inner: int, outer: int, kind: type[nn.Module] = nn.Conv2d, bias: bool = False) -> nn.Module:
    """1x1 convolution, grouped convolution, 1x1 convolution, with batch norm and ReLU between them."""
    i, o = groups * inner, groups * outer
    layers = [
        nn.Conv2d(3, i, 1, bias=bias),
        nn.BatchNorm2d(i),
        nn.ReLU(),
        kind(i, o, 3, padding=1, groups=groups, bias=bias),  # type: ignore[call-arg]
        nn.BatchNorm2d(o),
        nn.ReLU(),
        nn.Conv2d(o, 5, 1),
    ]
    return randomise(nn.Sequential(*layers).double().eval(), seed=groups)


def exported(model: nn.Module, reads: str = "auto") -> nn.Module:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = fingerprint(model)
    pruned = upscale.export(model, (x,), reads=reads)  # type: ignore[arg-type]
    assert fingerprint(model) == before
    check_equal(model, pruned, x, batches=(1, 3))
    return pruned


def sizes(pruned: nn.Module) -> tuple[int, int, int]:
    """Groups, input and output channels of the grouped convolution."""
    layer = pruned.get_submodule("3")
    return layer.groups, layer.in_channels, layer.out_channels


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_group_that_nobody_reads_is_gone(kind: type[nn.Module]) -> None:
    model = network(4, 3, 2, kind)
    with torch.no_grad():
        model[6].weight[:, 2:4] = 0  # both channels of the second group
    pruned = exported(model)
    assert (
        pruned.get_submodule("3").groups,
        pruned.get_submodule("3").in_channels,
        pruned.get_submodule("3").out_channels,
    ) == (3, 9, 6)
    assert pruned.get_submodule("0").out_channels == 9


def test_equal_masks_in_every_group_make_narrower_groups() -> None:
    model = network(4, 3, 2)
    with torch.no_grad():
        model[6].weight[:, [0, 3, 4, 7]] = 0  # one of two outputs, not the same in every group
        for group, column in enumerate((0, 2, 1, 0)):
            model[3].weight[2 * group : 2 * group + 2, column] = 0
    pruned = exported(model)
    assert (
        pruned.get_submodule("3").groups,
        pruned.get_submodule("3").in_channels,
        pruned.get_submodule("3").out_channels,
    ) == (4, 8, 4)
    assert (pruned.get_submodule("0").out_channels, pruned.get_submodule("6").in_channels) == (8, 4)
    assert not any(kind in pruned.report.reads for kind in ("gather", "concat"))


def test_unequal_masks_are_filled_up() -> None:
    model = network(2, 4, 3)
    with torch.no_grad():
        model[6].weight[:, [0, 1, 3]] = 0  # one output left of the first group, two of the second
        model[3].weight[:3, [0, 1]] = 0
        model[3].weight[3:, 3] = 0
    pruned = exported(model, "gather")
    assert (
        pruned.get_submodule("3").groups,
        pruned.get_submodule("3").in_channels,
        pruned.get_submodule("3").out_channels,
    ) == (2, 6, 4)
    assert pruned.get_submodule("6").in_channels == 3


def test_filters_per_channel_go_with_their_channel() -> None:
    """A depthwise convolution with three filters a channel."""
    model = network(4, 1, 3)
    with torch.no_grad():
        model[6].weight[:, 3:6] = 0
    pruned = exported(model)
    assert (
        pruned.get_submodule("3").groups,
        pruned.get_submodule("3").in_channels,
        pruned.get_submodule("3").out_channels,
    ) == (3, 3, 9)
    assert pruned.get_submodule("0").out_channels == 3


def test_two_grouped_convolutions_on_one_sum_agree() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 1)
            self.a, self.b = (nn.Conv2d(12, 12, 3, padding=1, groups=g) for g in (2, 4))
            self.head = nn.Conv2d(12, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(self.a(x) + self.b(x)))

    model = randomise(Sum().double().eval(), seed=3)
    with torch.no_grad():
        model.head.weight[:, [0, 1, 2, 5, 7]] = 0
    pruned = exported(model)
    for layer, groups in ((pruned.a, 2), (pruned.b, 4)):
        assert layer.out_channels % layer.groups == 0 and layer.groups <= groups
        assert layer.out_channels == pruned.a.out_channels


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([(2, 3, 2), (3, 2, 4), (4, 1, 2), (4, 4, 1), (2, 5, 5)]),
    st.integers(0, 10**6),
    st.sampled_from(["auto", "gather", "baseline"]),
    st.booleans(),
    st.booleans(),
)
def test_any_mask_on_any_groups(shape: tuple[int, int, int], seed: int, reads: str, bias: bool, swap: bool) -> None:
    groups, inner, outer = shape
    model = network(groups, inner, outer, nn.ConvTranspose2d if swap else nn.Conv2d, bias)
    draw = torch.Generator().manual_seed(seed)

    def some(count: int) -> torch.Tensor:
        return (torch.rand(count, generator=draw) < torch.rand(1, generator=draw) * 0.7).nonzero().flatten()

    with torch.no_grad():
        model[6].weight[:, some(groups * outer)] = 0
        rows = as_rows(model[3].weight, groups).clone() if swap else model[3].weight
        for group in range(groups):
            rows[group * outer : (group + 1) * outer, some(inner)] = 0
        rows[some(groups * outer)] = 0
        if swap:
            model[3].weight.copy_(as_transposed(rows, groups))
        if bias:
            model[3].bias[some(groups * outer)] = 0
    try:
        exported(model, reads)
    except (upscale.errors.NothingToPruneError, upscale.errors.ConstantOutputError):
        pass


def test_the_smallest_rectangle() -> None:
    needed = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    prefer = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    found = rectangle(needed, np.array([True, True, False]), prefer)
    assert found.astype(int).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert not rectangle(needed, np.zeros(3, dtype=bool)).any()


def test_rows_and_inputs_of_groups() -> None:
    rows = grouped_rows(np.array([1, 0, 0, 0, 1, 1], dtype=bool), 3)
    assert rows.tolist() == [True, True, False, False, True, True]
    inputs = grouped_inputs(np.zeros(6, dtype=bool), rows, 3)
    assert inputs.tolist() == [True, False, False, False, True, False]  # a group is never without input


def test_the_weight_of_a_transposed_convolution_as_rows() -> None:
    layer = nn.ConvTranspose1d(6, 4, 1, groups=2, bias=False).double()
    plain = nn.Conv1d(6, 4, 1, groups=2, bias=False).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(as_rows(layer.weight, 2))
        torch.testing.assert_close(plain(x), layer(x))
        assert torch.equal(as_transposed(as_rows(layer.weight, 2), 2), layer.weight)

"""Coordinates in which what a layer reads is white: there and back, what they whiten, and what they are good for."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from upscale.repairing import blockwise, whitening
from upscale.repairing.pair import capture_pair, collect
from upscale.repairing.sites import Site, find_sites
from upscale.repairing.tape import Tape
from upscale.repairing.whitening import Whitened, whitened


class Matrix(nn.Module):
    """A product with a matrix of shape (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (40, 6)),
    "matrix": (Matrix, (40, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (12, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (12, 6, 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (12, 6, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (12, 6, 7, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (12, 6, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (12, 6, 3, 4, 3)),
}


def inputs_like(*shape: int, channels: int = 1) -> Tensor:
    """Inputs whose channels are far from zero and much alike."""
    x = torch.randn(*shape, dtype=torch.float64).movedim(channels, -1)
    mixed: Tensor = x @ torch.randn(x.shape[-1], x.shape[-1], dtype=torch.float64) + 3
    return mixed.movedim(-1, channels)


def coordinates(model: nn.Module, batches: Sequence[Tensor]) -> list[Whitened]:
    masked = copy.deepcopy(model)
    inputs = collect(masked, batches)
    pair = capture_pair(masked, model, inputs)
    sites, _ = find_sites(pair, masked)
    return whitened(sites, Tape(pair.masked, inputs.device), inputs.leaves, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("most", [1000, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_there_and_back(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in parts that do not go into the number of inputs, and where some have no weight left."""
    monkeypatch.setattr(whitening, "_MOST", most)
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = build().double()
    with torch.no_grad():
        model.weight.flatten()[::5] = 0
    (way,) = coordinates(model, [inputs_like(*shape, channels=shape.index(6))])
    value = way.inside(model.weight.detach())
    torch.testing.assert_close(way.outside(value), model.weight.detach(), rtol=1e-10, atol=1e-12)
    plain = way.geometry.rows_of(model.weight.detach()).flatten()
    assert not torch.allclose(value.flatten()[:3], plain[:3], rtol=1e-3)


def fit_of(masked: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> tuple[blockwise._Fit, list[Site]]:
    inputs = collect(masked, batches)
    pair = capture_pair(masked, model, inputs)
    sites, _ = find_sites(pair, masked)
    return blockwise._Fit(pair, inputs, blockwise._parameters(pair, masked), blockwise._ends(pair.masked)), sites


def assert_root_of(way: Whitened, rows: Tensor, group: int = 0) -> None:
    """The root, applied twice, is the inverse of the damped Gram matrix of ``rows``, its mean square being one."""
    gram = rows.mT @ rows / rows.square().sum(0).mean()
    damped = gram + max(0.1, len(gram) / len(rows)) * torch.eye(len(gram), dtype=torch.float64)
    root = way.root[group, 0]
    torch.testing.assert_close(root @ root, torch.linalg.inv(damped))
    torch.testing.assert_close(root, root.mT)
    assert float(torch.linalg.eigvalsh(root)[0]) > 0


def test_what_is_read_is_white() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), inputs_like(400, 6)
    (way,) = coordinates(model, x.split(100))
    assert_root_of(way, x)


def test_groups_are_whitened_for_what_they_read() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(6, 4, 1, groups=2).double(), inputs_like(64, 6, 1, 1)
    (way,) = coordinates(model, [x])
    for group, part in enumerate(x.flatten(1).split(3, 1)):
        assert_root_of(way, part, group)


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_in_the_order_of_the_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a weight multiplies is the derivative of what is written by it, at every place."""
    monkeypatch.setattr(whitening, "_ROWS", 10_000)
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = build().double()
    x = inputs_like(4, *shape[1:], channels=shape.index(6))
    (way,) = coordinates(model, [x])
    written = model(x).movedim(shape.index(6), -1)
    groups = way.geometry.groups
    for group in range(groups):
        output = group * written.shape[-1] // groups  # the first of its group
        values = written[..., output].flatten()
        gradients = [torch.autograd.grad(value, model.weight, retain_graph=True)[0] for value in values]
        rows = torch.stack([way.geometry.rows_of(gradient)[group, 0] for gradient in gradients])
        assert_root_of(way, rows, group)


def test_few_rows_are_not_taken_for_what_a_layer_reads() -> None:
    """With as many rows as inputs, or fewer, the root goes towards a multiple of the identity."""
    torch.manual_seed(0)
    model, x = nn.Linear(60, 4).double(), torch.randn(60_000, 60, dtype=torch.float64)
    spreads = []
    for rows in (60_000, 60, 6):
        (way,) = coordinates(model, x[:rows].split(500))
        values = torch.linalg.eigvalsh(way.root[0, 0])
        spreads.append(float(values[-1] / values[0]))
    assert spreads[0] < 1.1 and spreads[1] < 3 and spreads[2] < 3


def test_inputs_that_are_not_finite_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), inputs_like(100, 6)
    masked = copy.deepcopy(model)
    inputs = collect(masked, [x.clone()])
    x[3, 2] = torch.nan
    pair = capture_pair(masked, model, inputs)
    sites, _ = find_sites(pair, masked)
    (way,) = whitened(sites, Tape(pair.masked, inputs.device), [[x]], torch.Generator().manual_seed(0))
    assert bool(way.root.isfinite().all()) and bool(way.inverse.isfinite().all())
    torch.testing.assert_close(way.root[0, 0, 2], torch.eye(6, dtype=torch.float64)[2])


def test_inputs_without_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), inputs_like(100, 6)
    with torch.no_grad():
        model.weight[:, [1, 4]] = 0
    (way,) = coordinates(model, [x])
    others = [0, 2, 3, 5]
    rest = nn.Linear(4, 4).double()
    (same,) = coordinates(rest, [x[:, others]])
    torch.testing.assert_close(way.root[0, 0][others][:, others], same.root[0, 0])
    wanted = torch.eye(6, dtype=torch.float64)[[1, 4]]
    torch.testing.assert_close(way.root[0, 0][[1, 4]], wanted, rtol=1e-12, atol=1e-12)


def test_a_layer_that_reads_zeros_or_has_no_weights_keeps_its_values() -> None:
    model = nn.Linear(6, 4).double()
    for weight, x in ((1.0, torch.zeros(20, 6)), (0.0, torch.randn(20, 6))):
        with torch.no_grad():
            model.weight.fill_(weight)
        (way,) = coordinates(model, [x.double()])
        torch.testing.assert_close(way.outside(way.inside(model.weight.detach())), model.weight.detach())


def test_a_fit_in_half_precision_takes_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of a weight is lost in bfloat16, many of them are not."""
    monkeypatch.setattr(blockwise, "_RATE", 0.001)
    torch.manual_seed(0)
    model, x = nn.Linear(24, 6).bfloat16(), inputs_like(512, 24).bfloat16()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.weight.mul_(1.25)
    with torch.no_grad():
        fit, sites = fit_of(masked, model, x.split(64))
        fit.whiten(sites, 32, 0)
        assert torch.equal(fit.fitted()[0], masked.weight)
        before = fit.errors()
        after = fit.descend(100, 0, False, before)
    assert fit.fitted()[0].dtype == torch.bfloat16
    assert after.mean < before.mean


@pytest.mark.parametrize("lift", [1.0, None])
def test_gradients_of_half_precision_are_not_lost(lift: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 17 million outputs is off by little, so that their derivatives are below what float16 has."""
    if lift is not None:
        monkeypatch.setattr(blockwise, "_LIFT", lift)
    torch.manual_seed(0)
    model, x = nn.Conv1d(1, 8, 1, bias=False).half(), torch.randn(40, 1, 65_536).half()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.weight.mul_(1.02)
    fit, _ = fit_of(masked, model, x.split(20))
    before = fit._values[0].detach().clone()
    fit._step(torch.optim.Adam(fit._values, lr=0.001), torch.Generator().manual_seed(0))
    moved = int((fit._values[0] != before).sum())
    assert moved == 8 if lift is None else moved < 4


@pytest.mark.parametrize("seed", range(3))
def test_steps_lead_further_where_inputs_are_alike(seed: int) -> None:
    """Behind the root all directions are as steep."""
    torch.manual_seed(seed)
    model, x = nn.Linear(24, 6).double(), inputs_like(512, 24)
    left = []
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.weight.mul_(1 + 0.3 * torch.randn(6, 24))
    for whitens in (True, False):
        with torch.no_grad():
            fit, sites = fit_of(copy.deepcopy(near), model, x.split(64))
            if whitens:
                fit.whiten(sites, 32, 0)
            left.append(fit.descend(100, 0, False, fit.errors()).mean)
    assert left[0] < 0.8 * left[1]

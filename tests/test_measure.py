"""Measured numbers against counts done by hand."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from upscale import measure
from upscale.errors import InputError


def test_parameters_count_shared_ones_once() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5))
    model[2].weight = model[1].weight
    assert measure.parameters(model) == (15 + 5) + (25 + 5) + 10


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(6, 4), (2, 6), 2 * 2 * 6 * 4),
        (nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5), 2 * 2 * 25 * 4 * 6 * 9),
        (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 5, 5), 2 * 9 * 6 * 9),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (1, 6, 5, 5), 2 * 25 * 6 * 4 * 4),
        (nn.ReLU(), (2, 6), 0),
    ],
)
def test_flops_are_two_a_multiply_accumulate(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert measure.flops(layer, torch.randn(shape)) == expected


def test_flops_see_the_layers_of_a_fused_transformer_and_change_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(7), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    projections = 2 * 2 * 7 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8)
    attention = 2 * 2 * (2 * 7 * 7 * 8)
    assert measure.flops(model, (torch.randn(2, 7, 8),)) == projections + attention
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_latency_ranks_models_and_restores_the_threads() -> None:
    threads = torch.get_num_threads()
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> object:
        def call(x: Tensor) -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = measure.latency(
        {"quick": sleeper("quick", 0.001), "slow": sleeper("slow", 0.01)},
        torch.ones(1),
        runs=4,
        warmup=1,
        threads=2,
    )
    assert 1 <= found["quick"] < found["slow"] < 100 and found["slow"] >= 10
    assert order == ["quick", "slow", "slow", "quick"] * 2 + ["quick", "slow"]
    assert torch.get_num_threads() == threads


def test_latency_times_modules_in_eval_mode() -> None:
    modes: list[bool] = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return x

    probe = Probe()
    measure.latency({"probe": probe}, torch.ones(1), runs=2, warmup=0)
    assert modes == [False, False] and probe.training


@pytest.mark.parametrize(("runs", "warmup"), [(0, 1), (3, -1)])
def test_latency_refuses_nonsense(runs: int, warmup: int) -> None:
    with pytest.raises(InputError):
        measure.latency({}, torch.ones(1), runs=runs, warmup=warmup)


X = torch.randn(2, 8, 5, 5)
INDEX = torch.tensor([0, 3, 4])
ROW = 2 * 5 * 5 * 4  # bytes of one channel


@pytest.mark.parametrize(
    ("name", "function", "expected", "calls"),
    [
        ("view", lambda x: x[:, 2:5], 0, 0),
        ("arithmetic", lambda x: x[:, 2:5] + 1, 0, 0),
        ("cat", lambda x: torch.cat([x[:, :2], x[:, 3:4]], 1), 3 * ROW, 1),
        ("channel by channel", lambda x: torch.cat([x[:, c : c + 1] for c in range(5)], 1), 5 * ROW, 1),
        ("index_select", lambda x: x.index_select(1, INDEX), 3 * ROW, 1),
        ("index", lambda x: x[:, INDEX], 3 * ROW, 1),
        ("contiguous", lambda x: x[:, ::2].contiguous(), 4 * ROW, 1),
        ("no copy", lambda x: x.contiguous(), 0, 0),
        ("clone of doubles", lambda x: x.double(), 16 * ROW, 1),
        ("mixed cat", lambda x: torch.cat([x.double(), x], 1), 16 * ROW + 32 * ROW, 2),
        ("slice assignment", lambda x: torch.empty_like(x)[:, :3].copy_(x[:, 1:4]), 3 * ROW, 1),
        ("hidden in a kernel", lambda x: nn.functional.max_pool2d(x[:, :2], 2), 2 * ROW, 1),
        (
            "hidden in a convolution",
            lambda x: nn.functional.conv2d(x[:, :2], torch.ones(1, 2, 1, 1)),
            2 * ROW,
            1,
        ),
        ("convolution of a whole", lambda x: nn.functional.conv2d(x, torch.ones(1, 8, 1, 1)), 0, 0),
    ],
)
def test_copies(name: str, function: object, expected: int, calls: int) -> None:
    found = measure.copies(function, X)
    assert (found.bytes, found.calls) == (expected, calls), (name, found)
    assert sum(found.by_op.values()) == expected


def test_a_slice_is_free_for_a_convolution_at_batch_one() -> None:
    conv = nn.Conv2d(2, 3, 1)
    assert measure.copies(lambda x: conv(x[:, 1:3]), X[:1]).bytes == 0


@pytest.mark.parametrize(
    ("name", "function", "expected"),
    [
        ("views", lambda x: x[:, 2:5].transpose(1, 2).unsqueeze(0), 0),
        ("arithmetic on a view", lambda x: x[:, 2:5] + 1, 1),
        ("contiguous already", lambda x: x.contiguous(), 0),
        ("contiguous", lambda x: x[:, ::2].contiguous(), 1),
        ("reshape that copies", lambda x: x.transpose(1, 2).reshape(2, -1), 1),
        ("cat", lambda x: torch.cat([x[:, :2], x[:, 3:4]], 1), 1),
        ("index_select", lambda x: x.index_select(1, INDEX).relu(), 2),
        ("convolution", lambda x: nn.functional.conv2d(x, torch.empty(1, 8, 1, 1)), 1),
        ("convolution of a slice", lambda x: nn.functional.conv2d(x[:, :2], torch.empty(1, 2, 1, 1)), 2),
        ("pooling of a slice", lambda x: nn.functional.max_pool2d(x[:, :2], 2), 2),
        ("nothing", lambda x: x, 0),
    ],
)
def test_kernels(name: str, function: object, expected: int) -> None:
    assert measure.kernels(function, X) == expected


def test_timings_keep_rounds_together_and_stop_in_time() -> None:
    calls: list[str] = []
    models = {name: lambda x, name=name: (calls.append(name), time.sleep(0.01)) for name in ("a", "b")}
    found = measure.timings(models, torch.ones(1), runs=1000, warmup=1, seconds=0.0)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}
    assert calls[:4] == ["a", "b", "b", "a"] and all(value >= 10 for values in found.values() for value in values)


def test_timings_run_in_inference_mode() -> None:
    modes: list[bool] = []
    measure.timings({"a": lambda x: modes.append(torch.is_inference_mode_enabled())}, torch.ones(1), runs=1, warmup=0)
    assert modes == [True]

"""``upscale.repair`` against closed forms: what must be restored is, and what is zero stays zero."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import upscale
from upscale.capture import capture
from upscale.errors import InputError, NonFiniteError
from upscale.program import module_path
from upscale.repairing import blockwise
from upscale.repairing import run as repairing
from upscale.repairing.examples import Examples
from upscale.repairing.moments import Regression
from upscale.repairing.pair import capture_pair, collect
from upscale.repairing.report import LayerRepair
from upscale.repairing.samples import HELD_OUT, _Ends
from upscale.repairing.segments import find_segments
from upscale.repairing.solve import _ByPattern


def random_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64 and eval mode, all its parameters and statistics random."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.4)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeroed(model: nn.Module, **where: Any) -> nn.Module:
    """A copy with zeros at an index of each named weight ("a__weight" is ``a.weight``)."""
    masked = copy.deepcopy(model)
    for name, index in where.items():
        with torch.no_grad():
            masked.get_parameter(name.replace("__", "."))[index] = 0
    return masked


def held_out(count: int) -> Tensor:
    return torch.arange(count) % HELD_OUT == 1


@torch.no_grad()
def assert_same(model: nn.Module, original: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    wanted = original(x)
    assert float((model(x) - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


# -- closed forms ----------------------------------------------------------------------------------------------------


def test_inputs_that_are_combinations_of_others_can_go() -> None:
    model = random_like(nn.Sequential(nn.Linear(8, 5)))
    kept = normal(200, 4)
    x = torch.cat([kept, kept @ normal(4, 4, seed=2) + 3], 1)
    masked = zeroed(model, **{"0__weight": (slice(None), slice(4, 8))})
    repaired = upscale.repair(masked, model, [x], ridge=0.0, progress=False)
    assert_same(repaired, model, x)
    assert not repaired[0].weight[:, 4:].any()
    row = repaired.repair_report.layers[0]
    assert row.after < 1e-12 < 1e-3 < row.before


def doubled(width: int = 6) -> nn.Module:
    """Every layer writes each of its channels twice, and no layer reads both alike."""
    model = nn.Sequential(
        nn.Conv2d(3, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 4),
    )  # fmt: skip
    model = random_like(model)
    with torch.no_grad():
        for layer in (model[0], model[1], model[3]):
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():
                    tensor[width:] = tensor[:width]
    return model


def test_a_network_of_doubled_channels_loses_nothing_at_half() -> None:
    model, x = doubled(), normal(64, 3, 6, 6)
    half = (slice(None), [0, 2, 4, 7, 9, 11])
    masked = zeroed(model, **{"3__weight": half, "7__weight": half})
    assert not torch.allclose(masked(x), model(x), rtol=0.1)
    repaired = upscale.repair(masked, model, [x[:40], x[40:]], ridge=0.0, progress=False)
    assert_same(repaired, model, x)
    smaller = upscale.export(repaired, (x[:2],))
    assert smaller.get_submodule("3").in_channels == 6
    assert_same(smaller, model, x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear of sequences": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, stride=2, padding=2, dilation=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (3, 5, 4)),
    "conv2d, no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 4, 5)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (3, 5, 4)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (6, 4, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 2, 2)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2, dilation=2), (4, 4)),
}


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("kind", LAYERS)
def test_any_layer_and_any_mask_equal_least_squares(kind: str, ridge: float) -> None:
    """The design matrix is the derivative of the layer's output by its weight; torch.linalg.lstsq does the rest."""
    build, shape = LAYERS[kind]
    model = random_like(nn.Sequential(build()))
    mixed = normal(64, *shape)
    x = mixed + 0.7 * mixed.roll(1, dims=1) + 0.6 * mixed.roll(1, dims=-1)  # neighbours depend on each other
    away = torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    masked = zeroed(model, **{"0__weight": away})
    repaired = upscale.repair(masked, model, x.split(25), ridge=ridge, progress=False)
    assert not repaired[0].weight[away].any()
    wanted = solved(masked[0], model[0], x[~held_out(len(x))], ridge)
    present = {name: p.detach() for name, p in masked[0].named_parameters()}
    new, old = (error_of(values, model[0], x[held_out(len(x))]) for values in (wanted, present))
    assert (repaired.repair_report.layers[0].ridge == ridge) == (new < old)
    for name, value in (wanted if new < old else present).items():
        torch.testing.assert_close(dict(repaired[0].named_parameters())[name].data, value, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def error_of(values: dict[str, Tensor], original: nn.Module, x: Tensor) -> float:
    return float((torch.func.functional_call(original, values, (x,)) - original(x)).square().mean())


def solved(layer: nn.Module, original: nn.Module, x: Tensor, ridge: float) -> dict[str, Tensor]:
    """The weight and bias that fit best, one output channel at a time, among those that are not zero.

    With a ridge: a penalty on the change of each weight, relative to the mean square of what it multiplies (about its
    mean, where there is a bias), as rows below the design matrix.
    """
    names = [name for name, _ in layer.named_parameters()]
    present = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(layer, values, (x,))
        return out.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)  # (outputs, rows)

    residual = outputs({n: p.detach() for n, p in original.named_parameters()}) - outputs(present)
    design = torch.func.jacrev(outputs)(present)
    for o in range(len(residual)):
        columns = design["weight"][o].flatten(1)
        used = (columns != 0).any(0) & (present["weight"].flatten() != 0)
        matrix, right = columns[:, used], residual[o]
        if "bias" in names:  # what a constant can do is taken out
            means, middle = matrix.mean(0), right.mean()
            matrix, right = matrix - means, right - middle
        if ridge:
            penalty = (ridge * matrix.square().sum(0).mean()).sqrt()
            matrix = torch.cat([matrix, penalty * torch.eye(matrix.shape[1], dtype=x.dtype)])
            right = torch.cat([right, right.new_zeros(matrix.shape[1])])
        change = torch.linalg.lstsq(matrix, right[:, None]).solution.flatten()
        present["weight"].view(-1)[used] += change
        if "bias" in names:
            present["bias"][o] += middle - means @ change
    return present


def test_a_shift_without_bias_goes_into_the_batch_norm() -> None:
    """The dropped channel is a constant: only a shift can stand in for it."""
    model = random_like(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    x = normal(40, 3, 4, 4)
    x[:, 2] = 5
    masked = zeroed(model, **{"0__weight": (slice(None), 2)})
    repaired = upscale.repair(masked, model, [x], ridge=0.0, progress=False)
    assert_same(repaired, model, x)
    torch.testing.assert_close(repaired[1].running_var, model[1].running_var)
    torch.testing.assert_close(repaired.train()(x), model.train()(x))  # training normalises by the batch: no shift


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.norm(self.second(x))


def test_a_layer_that_joins_makes_up_for_what_it_joins() -> None:
    """The first layer cannot be repaired, but the second, in execution order, reads all of its inputs."""
    model, x = random_like(Sum()), normal(80, 6)
    repaired = upscale.repair(zeroed(model, first__weight=(slice(None), [0, 3])), model, [x], 0.0, progress=False)
    assert_same(repaired, model, x)


def test_zeros_scattered_over_the_outputs_equal_least_squares() -> None:
    """Each output has some of its own, beside those of all: one inverse serves all outputs."""
    model, x = random_like(nn.Sequential(nn.Linear(30, 40))), normal(400, 6)
    x = x @ normal(6, 30, seed=2) + 0.3 * normal(400, 30, seed=4)  # neighbours can stand in for each other
    generator = torch.Generator().manual_seed(3)
    masked = zeroed(model, **{"0__weight": (slice(None), slice(4))})
    for row in masked[0].weight.data:
        row[torch.randperm(30, generator=generator)[: int(torch.randint(5, (), generator=generator))]] = 0
    repaired = upscale.repair(masked, model, [x], 0.0, progress=False)
    used = x[~held_out(len(x))]
    for row, kept in enumerate(masked[0].weight != 0):
        design = torch.cat([used[:, kept], torch.ones(len(used), 1)], 1)
        wanted = torch.linalg.lstsq(design, model(used)[:, row]).solution
        torch.testing.assert_close(repaired[0].weight[row, kept], wanted[:-1], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(repaired[0].bias[row], wanted[-1], rtol=1e-8, atol=1e-10)
        assert not repaired[0].weight[row, ~kept].any()


def test_scattered_zeros_are_solved_as_one_by_one() -> None:
    root = normal(1, 80, 12)
    problem = Regression(root.mT @ root, normal(1, 12, 20, seed=2))
    kept = torch.rand(1, 20, 12, generator=torch.Generator().manual_seed(0)) > 0.1
    kept[0, 3, 2:] = False  # of one output nearly all
    kept[0, 4] = False
    solver = _ByPattern(problem, kept, 0)
    assert len(solver._together) >= 15 and {3, 4} <= set(solver._alone.tolist())
    expected = torch.zeros_like(kept[0], dtype=torch.float64)
    for output, pattern in enumerate(kept[0]):
        gram = problem.gram[0][pattern][:, pattern]
        expected[output, pattern] = torch.linalg.solve(gram, problem.right[0, pattern, output])
    torch.testing.assert_close(solver.change(0.0), expected, rtol=1e-10, atol=1e-12)
    singular = Regression(torch.ones(1, 12, 12, dtype=torch.float64), problem.right)
    solver = _ByPattern(singular, kept, 0)
    assert solver._constrained(solver._together, 0.0) is None
    assert bool(solver.change(0.0)[kept[0]].isfinite().all())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([x, x], 1)) + self.layer(torch.cat([2 * x, 2 * x], 1)).square()


def test_a_layer_that_is_called_twice_is_fitted_to_both_calls() -> None:
    model, x = random_like(Twice()), normal(60, 2)
    repaired = upscale.repair(zeroed(model, layer__weight=(slice(None), [1, 2])), model, [x], 0.0, progress=False)
    assert_same(repaired, model, x)
    assert [(row.name, row.samples) for row in repaired.repair_report.layers] == [("layer", 2 * 52)]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def test_the_projections_of_attention() -> None:
    model, half = random_like(Attending()), normal(30, 5, 4)
    x = torch.cat([half, half.flip(2)], 2)
    masked = zeroed(model, attention__in_proj_weight=(slice(None), [0, 1, 5]))
    repaired = upscale.repair(masked, model, [x], 0.0, progress=False)
    assert_same(repaired, model, x)
    assert not repaired.attention.in_proj_weight[:, [0, 1, 5]].any()


# -- how the data is given -------------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, a masked copy, and 48 examples."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU6(),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    model = random_like(model)
    half = slice(None), slice(0, None, 2)
    masked = zeroed(model, **{"3__weight": half, "5__weight": half, "8__weight": half})
    return model, masked, normal(48, 3, 8, 8)


def test_batches_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masked, x = small()
    monkeypatch.setattr("upscale.repairing.samples._LEAST_ROWS", 1000)  # fewer than there are: places are drawn
    one = upscale.repair(masked, model, [x], progress=False)
    several = upscale.repair(masked, model, x.split(7), progress=False)
    monkeypatch.setattr(repairing, "_KEPT", 0)  # nothing is kept between layers
    monkeypatch.setattr("upscale.repairing.samples._KEPT_ROWS", 0)  # nor for the steps behind an activation
    again = upscale.repair(masked, model, x.split(16), progress=False)
    for name, value in one.state_dict().items():
        for other in (several, again):
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-7, atol=1e-9)


def test_labels_are_ignored_and_a_generator_will_do() -> None:
    model, masked, x = small()
    wanted = upscale.repair(masked, model, x.split(24), progress=False).state_dict()
    for batches in (((part, torch.zeros(24)) for part in x.split(24)), [{"input": p, "label": 3} for p in x.split(24)]):
        found = upscale.repair(masked, model, batches, progress=False).state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_no_layer_gets_worse_and_the_networks_are_left_alone() -> None:
    model, masked, x = small()
    masked[0].train()
    calls: list[int] = []
    masked[3].register_forward_hook(lambda *_: calls.append(1))
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, masked)]
    repaired = upscale.repair(masked, model, [x], progress=False)
    for network, saved in zip((model, masked), before, strict=True):
        assert all(torch.equal(network.state_dict()[name], value) for name, value in saved.items())
    assert masked[0].training and repaired[0].training and not repaired[3].training
    assert len(repaired[3]._forward_hooks) == 1
    report = repaired.repair_report
    assert [row.name for row in report.layers] == ["0", "3", "5", "8"]
    assert all(row.after <= row.before for row in report.layers)
    assert report.outputs[1] < 0.5 * report.outputs[0]
    assert "held-out" in str(report) and "8" in str(report)


@torch.no_grad()
def test_the_outputs_error_is_that_of_held_out_examples() -> None:
    model, masked, x = small()
    out = held_out(len(x))
    repaired = upscale.repair(masked, model, x.split(20), progress=False)
    wanted = model(x[out])
    for network, error in zip((masked, repaired), repaired.repair_report.outputs, strict=True):
        expected = (network(x[out]) - wanted).square().sum() / (wanted - wanted.mean()).square().sum()
        assert error == pytest.approx(expected.item(), rel=1e-9)


def test_statistics_are_recalibrated_where_that_helps() -> None:
    """The masked network's variances are wrong, and a huge ridge leaves the weights as they are."""
    model = random_like(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sigmoid()))
    x = normal(64, 3, 6, 6)
    model.train()
    model[1].momentum = None
    model[1].reset_running_stats()
    model(x[~held_out(64)])
    model.eval()
    wrong = copy.deepcopy(model)
    wrong[1].running_var.mul_(9)
    wrong = zeroed(wrong, **{"0__weight": (0, 0)})
    with_it = upscale.repair(wrong, model, [x], ridge=1e9, progress=False)
    assert with_it.repair_report.recalibrated == 1
    torch.testing.assert_close(with_it[1].running_var[1:], model[1].running_var[1:], rtol=1e-5, atol=0)
    assert upscale.repair(model, model, [x], progress=False).repair_report.recalibrated == 0
    assert upscale.repair(wrong, model, [x], recalibrate=False, progress=False).repair_report.recalibrated is None


def test_the_step_behind_an_activation_bounds_the_error() -> None:
    """(p - step(q))^2 >= (act(p) - act(t))^2 for all p, and at p = q no more than the plain (q - t)^2."""
    p, q, t, added = (normal(4000, 1, seed=s) * 4 for s in range(4))
    for clamp in ((0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0)):
        step = _Ends(None, None, clamp).step(q, t, added)
        behind = (p + added).clamp(*clamp) - (t + added).clamp(*clamp)
        assert bool(((p - step).abs() >= behind.abs() - 1e-12).all())
        assert bool(((q - step).abs() <= (q - t).abs() + 1e-12).all())


# -- blocks ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def residual() -> tuple[nn.Module, nn.Module, Tensor]:
    """Two residual blocks and a head, a masked copy, and 64 examples."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model = random_like(model)
    masked = copy.deepcopy(model)
    for block in (masked[1], masked[2]):
        block.conv1.weight.data[:, ::2] = 0
        block.conv2.weight.data[1::2] = 0
    return model, masked, normal(64, 3, 6, 6)


def test_segments_end_at_joins() -> None:
    model, _, x = residual()
    segments = find_segments(capture(model, (x[:2],)))
    assert [module_path(segment.end) for segment in segments] == ["1", "2", "5"]
    assert [sum(node.target is torch.ops.aten.conv2d.default for node in s.nodes) for s in segments] == [3, 2, 0]


def test_blocks_are_fitted_together() -> None:
    model, masked, x = residual()
    ridge = upscale.repair(masked, model, [x], progress=False)
    both = upscale.repair(masked, model, [x], method="blockwise", steps=60, progress=False)
    report = both.repair_report
    assert [name for name, _, _ in report.blocks] == ["1", "2", "5"]
    assert sum(after for *_, after in report.blocks) < sum(before for _, before, _ in report.blocks)
    assert "each block" in str(report)
    assert report.outputs[1] < ridge.repair_report.outputs[1]
    for name, value in masked.named_parameters():
        assert not both.get_parameter(name)[value == 0].any()
    parts = upscale.repair(masked, model, x.split(24), method="blockwise", steps=60, progress=False)
    for name, value in both.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_the_error_of_a_block_is_that_of_held_out_examples() -> None:
    model, masked, x = residual()
    pair = capture_pair(masked, model, collect(masked, [x]))
    fit = blockwise._Fit(pair, collect(masked, [x]), [], blockwise._ends(pair.masked))
    some = x[held_out(len(x))]
    for end, error in zip((2, 3, None), fit.errors().ends, strict=True):
        wanted = model[:end](some)
        assert error == pytest.approx(((masked[:end](some) - wanted).square().mean() / wanted.var(correction=0)).item())


def test_examples_that_are_held_out_are_never_drawn() -> None:
    model = nn.Flatten()
    for x, count in ((torch.arange(24.0).view(24, 1), 10), (torch.arange(24.0).view(24, 1), 3)):
        inputs = collect(model, x.split(count))
        examples = Examples(capture(model, (x[:count],)), inputs)
        drawn = torch.cat([examples.draw(8, torch.Generator().manual_seed(seed))[0][0] for seed in range(40)])
        assert set(drawn.flatten().tolist()) == set(x[~held_out(24)].flatten().tolist())
        held = torch.cat([leaves[0] for leaves, _ in examples.held(2)])
        assert torch.equal(held, x[held_out(24)])


class Fixed(nn.Module):
    """Its batch size is in its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x.reshape(16, 6))))


def test_whole_batches_are_fitted_where_they_cannot_be_taken_apart() -> None:
    model, x = random_like(Fixed()), normal(96, 6)
    masked = zeroed(model, one__weight=(slice(None), [0, 3]), two__weight=(slice(None), [1, 2, 5]))
    ridge = upscale.repair(masked, model, x.split(16), progress=False).repair_report.outputs[1]
    fitted = upscale.repair(masked, model, x.split(16), method="blockwise", steps=60, progress=False)
    assert fitted.repair_report.outputs[1] < ridge
    examples = Examples(capture(model, (x[:16],)), collect(model, x.split(16)))
    leaves, chosen = examples.draw(8, torch.Generator().manual_seed(0))
    assert len(leaves[0]) == 16 and torch.equal(~chosen, held_out(16))


def test_a_rate_that_is_too_high_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the error explodes, the fit starts again, and gets somewhere in the steps that are left."""
    monkeypatch.setattr(blockwise, "_RATE", 1.0)
    model, masked, x = residual()
    both = upscale.repair(masked, model, [x], method="blockwise", steps=300, progress=False)
    blocks = both.repair_report.blocks
    assert sum(after for *_, after in blocks) < 0.8 * sum(before for _, before, _ in blocks)


def test_blocks_that_are_closer_do_not_pay_with_outputs_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth look on blocks go on to get closer, but the outputs are twice as far as at first."""
    model, masked, x = residual()
    seen: list[blockwise._Errors] = []
    errors = blockwise._Fit.errors

    def worse(fit: blockwise._Fit) -> blockwise._Errors:
        share = 1.0 if not seen else 0.9 if len(seen) < 4 else 2.0
        seen.append(blockwise._Errors([error / (1 + len(seen)) for error in errors(fit).ends], share))
        return seen[-1]

    monkeypatch.setattr(blockwise._Fit, "errors", worse)
    monkeypatch.setattr(blockwise, "_RATE", 0.01)
    both = upscale.repair(masked, model, [x], method="blockwise", steps=300, progress=False)
    kept = [after for *_, after in both.repair_report.blocks]
    assert kept == seen[3].ends
    assert seen[-1].mean < seen[3].mean


@pytest.mark.parametrize("steps", [1, 5, 8, 37, 1000])
def test_the_error_is_looked_at_early_and_at_the_end(steps: int) -> None:
    looked = [step for step in sorted(blockwise._checks(steps)) if step]
    assert looked[-1] == steps and looked[0] <= max(1, steps / 20) and len(looked) <= 11


def test_a_fit_that_is_no_better_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_RATE", 10.0)
    monkeypatch.setattr(blockwise, "_SHORTER", 1.0)
    model, masked, x = residual()
    ridge = upscale.repair(masked, model, [x], progress=False)
    both = upscale.repair(masked, model, [x], method="blockwise", steps=5, progress=False)
    assert all(torch.equal(both.state_dict()[name], value) for name, value in ridge.state_dict().items())
    assert all(after == before for _, before, after in both.repair_report.blocks)


# -- masks that are computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["upscale", "torch"])
def test_masks_stay_on(kind: str) -> None:
    model, _, x = small()
    masked = copy.deepcopy(model)
    if kind == "upscale":
        upscale.MaskingManager(masked, example_inputs=x[:2]).mask(0.5, permanent=False)
    else:
        torch_prune.ln_structured(masked[5], "weight", 0.5, n=2, dim=1)
        masked(x[:2])
    zeros = masked[5].weight == 0
    below = "parametrizations.weight.original" if kind == "upscale" else "weight_orig"
    hidden = masked[5].get_parameter(below)[zeros].clone()
    repaired = upscale.repair(masked, model, [x], progress=False)
    assert hidden.any() and torch.equal(repaired[5].get_parameter(below)[zeros], hidden)
    repaired(x[:2])
    assert torch.equal(repaired[5].weight == 0, zeros)
    assert not torch.equal(repaired[5].weight, masked[5].weight)
    assert repaired.repair_report.outputs[1] < repaired.repair_report.outputs[0]


class Functional(nn.Module):
    """A weight of its own, used twice, and one that is computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.zeros(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scaled = nn.functional.linear(x, self.table) * self.table.sum()
        return self.layer(nn.functional.linear(scaled, x.mT @ x))


def test_what_is_no_layer_is_left_and_named() -> None:
    model = random_like(Functional())
    report = upscale.repair(model, model, [normal(16, 4)], progress=False).repair_report
    assert [row.name for row in report.layers] == ["layer"]
    assert "second use" in report.left["table"] and "left as it is: table" in str(report)


class Position(nn.Module):
    """What is added does not depend on the example: one map for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 5, 6, 6))
        self.project, self.layer = nn.Conv2d(5, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.project(torch.relu(self.places))) + self.layer(x)


def test_layers_that_read_the_same_for_every_example_are_repaired_too() -> None:
    torch.manual_seed(0)
    model = random_like(Position())
    masked = zeroed(model, project__weight=(slice(None), slice(2)))
    report = upscale.repair(masked, model, [normal(9, 3, 6, 6), normal(7, 3, 6, 6)], progress=False).repair_report
    (row,) = (row for row in report.layers if row.name == "project")
    assert row.after < 0.5 * row.before
    assert report.outputs[1] < 0.5 * report.outputs[0]


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model, masked, x = small()
    wider = copy.deepcopy(model)
    wider[5] = random_like(nn.Conv2d(8, 7, 1))
    other = copy.deepcopy(model)
    other[4] = nn.Sigmoid()
    bad = x.clone()
    bad[3, 0, 0, 0] = float("nan")
    used = iter(x.split(24))
    list(used)
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (InputError, "there are no batches", lambda: upscale.repair(masked, model, [])),
        (InputError, "generator can be used only once", lambda: upscale.repair(masked, model, used)),
        (InputError, r"goes in a list: \[batch\]", lambda: upscale.repair(masked, model, x)),
        (InputError, "at least two examples", lambda: upscale.repair(masked, model, [x[:1]])),
        (NonFiniteError, "batch 1 holds NaN", lambda: upscale.repair(masked, model, [x, bad])),
        (InputError, "batch 1 does not fit", lambda: upscale.repair(masked, model, [x, x[:, :, :5]])),
        (InputError, "batch 1 does not fit", lambda: upscale.repair(masked, model, [x, x.float()])),
        (InputError, "5.weight is .8, 6, 1, 1. in|5.weight is .6, 8", lambda: upscale.repair(masked, wider, [x])),
        (InputError, "the first call that differs", lambda: upscale.repair(masked, other, [x])),
        (InputError, r"other way round: call repair\(masked, original", lambda: upscale.repair(model, masked, [x])),
        (InputError, "ridge must be", lambda: upscale.repair(masked, model, [x], ridge=-1)),
        (InputError, "ridge must be", lambda: upscale.repair(masked, model, [x], ridge=True)),
        (InputError, "steps must be", lambda: upscale.repair(masked, model, [x], steps=0)),
        (InputError, "method must be", lambda: upscale.repair(masked, model, [x], method="block")),
        (InputError, "fails on the example input", lambda: upscale.repair(masked, model, [x[:, :2]])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert all(torch.equal(masked.state_dict()[name], value) for name, value in before.items())


def test_too_few_samples_are_counted() -> None:
    model = random_like(nn.Sequential(nn.Linear(20, 3)))
    masked = zeroed(model, **{"0__weight": (slice(None), slice(5))})
    with pytest.warns(upscale.RepairWarning, match=r"1 of 1 layers.*0 the first \(8 samples, 16 unknowns\)"):
        repaired = upscale.repair(masked, model, [normal(9, 20)], progress=False)
    row = repaired.repair_report.layers[0]
    assert row.after <= row.before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upscale.repair(masked, model, [normal(90, 20)], progress=False)


# -- one call, and the documentation ---------------------------------------------------------------------------------


def test_prune_repairs_and_exports() -> None:
    model, _, x = small()
    pruned = upscale.prune(model, x[:2], amount=0.5, importance="l2", calibration=[x])
    plain = upscale.prune(model, x[:2], amount=0.5)
    assert not hasattr(plain, "repair_report")
    assert pruned.repair_report.outputs[1] < pruned.repair_report.outputs[0]
    assert {k: v.shape for k, v in pruned.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    wanted = model(x)
    assert (pruned(x) - wanted).square().sum() < 0.5 * (plain(x) - wanted).square().sum()


@pytest.mark.parametrize("turns", [1, 2])
def test_prune_fits_blocks_in_its_last_turn(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, x = residual()
    asked: list[dict[str, Any]] = []

    def spied(*args: Any, **how: Any) -> Any:
        asked.append(how)
        return upscale.repair(*args, **how)

    monkeypatch.setattr("upscale.one_call.repair", spied)
    pruned = upscale.prune(model, x[:2], amount=0.5, calibration=[x], ridge=0.1, steps=turns, blocks=40)
    assert asked == [{"ridge": 0.1}] * (turns - 1) + [{"ridge": 0.1, "method": "blockwise", "steps": 40}]
    assert [name for name, *_ in pruned.repair_report.blocks] == ["1", "2", "5"]
    assert "3 of 3 blocks" in pruned.repair_report.summary()
    plain = upscale.prune(model, x[:2], amount=0.5, calibration=[x], ridge=0.1, steps=turns)
    assert not plain.repair_report.blocks and "blocks" not in plain.repair_report.summary()
    assert pruned.repair_report.outputs[1] < plain.repair_report.outputs[1]


def test_turns_are_left_out_where_single_channels_are_too_large_a_step() -> None:
    """Each hidden channel is a quarter of the FLOPs, so half of them can be met, and no third of the way to it."""
    model, x = random_like(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))), normal(64, 6)
    how: dict[str, Any] = {"ignore": ["0"], "calibration": [x], "steps": 3}
    pruned = upscale.prune(model, x[:2], flops=0.5, **how)
    assert pruned.get_submodule("0").weight.shape == (2, 6)
    with pytest.raises(upscale.BudgetError, match="nearest that these masks reach"):
        upscale.prune(model, x[:2], flops=0.6, **how)


@pytest.mark.parametrize(
    ("blocks", "data", "message"),
    [
        (-1, True, "at least 0, not -1"),
        (2.0, True, "not 2.0"),
        (True, True, "not True"),
        (5, False, "blocks=5 fits to"),
    ],
)
def test_blocks_that_cannot_be_fitted_are_refused(blocks: Any, data: bool, message: str) -> None:
    model, _, x = small()
    with pytest.raises(InputError, match=message):
        upscale.prune(model, x[:2], amount=0.5, calibration=[x] if data else None, blocks=blocks)


def test_the_report_survives_copies_and_pickle() -> None:
    model, masked, x = small()
    pruned = upscale.prune(model, x[:2], amount=0.5, calibration=[x])
    repaired = upscale.repair(masked, model, [x], progress=False)
    for network in (pruned, repaired):
        assert "held-out" in str(copy.deepcopy(network).repair_report)
        assert "held-out" in pickle.loads(pickle.dumps(network)).repair_report


def test_names_in_the_report_are_no_markup() -> None:
    row = LayerRepair("blocks.[x].:x:", 1.0, 0.5, 1e-3, 10, 2)
    text = str(upscale.RepairReport((row,), {"last[/b]": "tied"}, (1.0, 0.5), blocks=(("end[y]", 1.0, 0.5),)))
    assert all(name in text for name in ("blocks.[x].:x:", "last[/b] (tied)", "end[y]"))


def test_the_examples_of_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "repair.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/repair.md", "exec"), names)
    assert "held-out" in capsys.readouterr().out

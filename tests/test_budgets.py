"""How much is masked: amounts by layer, budgets met by the exported model, schedules, and what cannot be met."""

from __future__ import annotations

import copy
import io
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import upscale
from support.oracle import check_equal, fingerprint, randomise
from upscale import InputError, MaskingManager, NothingToPruneError, budget, waiting
from upscale.searching import Search

IMAGE = torch.rand(2, 3, 12, 12, dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.one = nn.Conv2d(48, 40, 3, padding=1)
        self.two = nn.Conv2d(40, 48, 3, padding=1)
        self.three, self.head = nn.Conv2d(48, 56, 3, padding=1), nn.Linear(56, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.two(torch.relu(self.one(x)))
        return self.head(torch.relu(self.three(x)).mean((2, 3)))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(3, 24, 3, padding=1)
        self.c, self.d = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(96, 48, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.cat([self.a(x), self.b(x)], 1))
        y = torch.cat([y, torch.relu(self.c(y))], 1)
        return self.head(torch.relu(self.d(y)).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 96, 1)
        self.deep = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.down, self.wide = nn.Conv2d(96, 40, 1), nn.Conv2d(40, 64, 1)
        self.grouped, self.head = nn.Conv2d(64, 64, 3, padding=1, groups=4), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.deep(torch.relu(self.up(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.grouped(torch.relu(self.wide(self.down(x))))).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(12, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2, self.head = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind().double().eval())


def flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def size(model: nn.Module, _: Tensor) -> int:
    return sum(p.numel() for p in model.parameters())


COUNTS: dict[str, Callable[[nn.Module, Tensor], int]] = {"flops": flops, "params": size}


@pytest.mark.parametrize(("what", "left"), [("flops", 0.8), ("params", 0.5), ("flops", 0.3)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Residual, {}),
        (Residual, {"method": "constrained"}),
        (Residual, {"method": "contiguous", "is_global": True}),
        (Concat, {"is_global": True}),
        (Concat, {"side": "output"}),
        (Grouped, {"steps": 2}),
    ],
)
def test_a_budget_is_met_by_the_exported_model(
    kind: type[nn.Module], options: dict[str, Any], what: str, left: float
) -> None:
    model, count = network(kind), COUNTS[what]
    before = fingerprint(model)
    masked = upscale.mask(model, IMAGE, **options, **{what: left})
    assert fingerprint(model) == before and size(masked, IMAGE) == size(model, IMAGE)
    pruned = upscale.export(masked, (IMAGE,), verify=False)
    check_equal(masked, pruned, IMAGE)
    assert count(pruned, IMAGE) == pytest.approx(left * count(model, IMAGE), rel=0.01)


@pytest.mark.parametrize(("what", "left"), [("flops", 0.8), ("params", 0.6)])
def test_attention_counts_as_what_it_costs(what: str, left: float) -> None:
    model, x, count = network(Transformer), torch.rand(2, 3, 3, 12, dtype=torch.float64), COUNTS[what]
    pruned = upscale.prune(model, x, is_global=True, **{what: left})
    assert pruned.report.error is not None  # verified
    assert count(pruned, x) == pytest.approx(left * count(model, x), rel=0.01)


def test_the_same_call_gives_the_same_masks() -> None:
    first, second = (upscale.mask(network(Concat), IMAGE, flops=0.6).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_budget_of_all_masks_nothing() -> None:
    manager = MaskingManager(network(Residual), example_inputs=IMAGE).mask(flops=1)
    assert not manager.masked


def test_zeros_that_are_there_already_count() -> None:
    model = network(Residual)
    total = size(model, IMAGE)
    MaskingManager(model, example_inputs=IMAGE).mask(0.3)
    MaskingManager(model, example_inputs=IMAGE).mask(params=0.3)
    assert size(upscale.export(model, (IMAGE,)), IMAGE) == pytest.approx(0.3 * total, rel=0.01)


# -- what cannot be met -----------------------------------------------------------------------------------------------


def two_layers() -> tuple[nn.Module, Tensor]:
    """72 parameters; with n channels between the layers 7 n + 2 are left."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 2)).eval(), torch.rand(2, 4)


@pytest.mark.parametrize(("left", "nearest"), [(0.05, 9 / 72), (0.5, 37 / 72), (0.98, 72 / 72)])
def test_an_unreachable_budget_names_the_nearest(left: float, nearest: float) -> None:
    model, x = two_layers()
    before = fingerprint(model)
    manager = MaskingManager(model, example_inputs=x)
    with pytest.raises(InputError, match=f"nearest that these masks reach is params={nearest:.4g}"):
        manager.mask(params=left)
    assert fingerprint(model) == before and not manager.masked
    manager.mask(params=37 / 72)
    assert size(upscale.export(model, (x,)), x) == 37


def test_layers_without_channels_to_mask_bound_the_budget() -> None:
    model = network(Residual)
    before = fingerprint(model)
    with pytest.raises(InputError, match="every channel masked that may be"):
        MaskingManager(model, example_inputs=IMAGE, ignore=["one", "three"]).mask(flops=0.02)
    with pytest.raises(NothingToPruneError, match="ignored"):
        MaskingManager(model, example_inputs=IMAGE).mask(flops=0.5, ignore="*")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flops": 0}, "flops is what is left"),
        ({"flops": 1.2}, "flops is what is left"),
        ({"params": float("nan")}, "params is what is left"),
        ({"latency": True}, "latency is what is left"),
        ({"params": "half"}, "params is what is left"),
        ({"flops": 0.5, "params": 0.5}, "one of amount, flops, params and latency, not flops and params"),
        ({"amount": 0.5, "flops": 0.5}, "not amount and flops"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"schedule": "cubic"}, "geometric"),
        ({"amount": {"one": 1.0}}, "amount of 'one'"),
        ({"amount": {3: 0.5}}, "no name"),
        ({"amount": {"oen": 0.5}}, "'oen' matches no .* nearest names are one"),
        ({"amount": {"stem": 0.5}}, "stem cannot be masked: reads a model input"),
        ({"ignore": ["thre"]}, "'thre' matches no .* nearest names are three"),
        ({"ignore": [3]}, "ignore holds 3"),
        ({"ignore": [nn.Linear(2, 2)]}, "not part of the model"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = network(Residual)
    manager = MaskingManager(model, example_inputs=IMAGE)
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        manager.mask(**arguments)
    assert fingerprint(model) == before and not manager.masked


def test_a_weight_that_the_model_transforms_cannot_have_a_budget() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Standardised(8, 8, 3), nn.Flatten(), nn.Linear(512, 2)).double().eval()
    before = fingerprint(model)
    with pytest.raises(upscale.UnsupportedModelError, match="ignore="):
        MaskingManager(model, example_inputs=IMAGE).mask(params=0.5)
    assert fingerprint(model) == before


# -- latency ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """A call takes as long as the model has parameters, and a tenth of the original's time at least."""
    seen: list[nn.Module] = []

    def timed(model: nn.Module, pruned: nn.Module, args: Any, kwargs: Any) -> float:
        seen.append(pruned)
        pruned(*args, **kwargs)
        return 0.1 + 0.9 * size(pruned, IMAGE) / size(model, IMAGE)

    monkeypatch.setattr(budget, "timed", timed)
    return seen


def test_latency_is_that_of_exported_candidates(clock: list[nn.Module]) -> None:
    model = network(Residual)
    pruned = upscale.prune(model, IMAGE, latency=0.6)
    left = 0.1 + 0.9 * size(pruned, IMAGE) / size(model, IMAGE)
    assert left == pytest.approx(0.6, rel=0.1)
    assert 1 < len(clock) <= 12


def test_a_latency_that_cannot_be_reached(clock: list[nn.Module]) -> None:
    model = network(Residual)
    before = fingerprint(model)
    with pytest.raises(InputError, match="latency=0.05 cannot be met within 10 %.*nearest.*latency=0.1"):
        MaskingManager(model, example_inputs=IMAGE).mask(latency=0.05)
    assert fingerprint(model) == before


def test_two_models_are_timed() -> None:
    model = network(Residual).train()
    assert budget.timed(model, model, (IMAGE,), {}) > 0 and model.training


# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_what_a_scan_finds(seed: int) -> None:
    draw = random.Random(seed)
    steps = [draw.random() ** 4 for _ in range(draw.randint(5, 400))]
    total = sum(steps) * draw.uniform(1, 1.5)
    left = [1 - done / total for done in itertools.accumulate(steps, initial=0.0)]
    target = draw.uniform(0.05, 1)
    search = Search(lambda chosen: left[len(chosen)], target, 0.01)
    found = search.run(0, len(steps), single=False)
    assert found.met == any(abs(value - target) <= 0.01 * target for value in left)
    if not found.met:
        assert abs(found.left - target) == min(abs(value - target) for value in left)
    assert len(search.seen) <= 25  # of up to 401


def test_single_channels_close_a_gap_that_the_order_leaves() -> None:
    gains = [0.1, 0.3, 0.1, 0.1]
    found = Search(lambda chosen: 1 - sum(gains[c] for c in chosen), 0.7, 0.01).run(0, 4)
    assert found.met and found.chosen == (0, 2, 3)


def test_a_choice_that_leaves_nothing_is_not_taken() -> None:
    found = Search(lambda chosen: -1.0 if len(chosen) > 5 else 1 - 0.1 * len(chosen), 0.2, 0.01).run(0, 10)
    assert not found.met and found.left == pytest.approx(0.5)


# -- amounts by layer -------------------------------------------------------------------------------------------------


def counts(manager: MaskingManager) -> dict[str, int]:
    return {name: len(channels) for name, channels in manager.masked.items()}


def test_amounts_by_name() -> None:
    model = network(Residual)
    sizes = {"one": 48, "two": 40, "three": 48, "head": 56}

    def of(amount: Any, **options: Any) -> dict[str, int]:
        return counts(MaskingManager(copy.deepcopy(model), example_inputs=IMAGE).mask(amount, **options))

    assert of({"t*": 0.5}) == {"two": 20, "three": 24}
    assert of({"*": 0.25, "t*": 0.5, "two": 0}) == {"one": 12, "three": 24, "head": 14}
    assert of({"t*": 0.5, "*": 0.25}) == {name: size // 4 for name, size in sizes.items()}  # later keys win
    assert of({"stem": 0, "head": 0.5}) == {"head": 28}
    assert of(0.5, ignore=["t*"]) == {"one": 24, "head": 28}


def test_containers_and_modules_are_names_too() -> None:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)]
    model, x = nn.Sequential(*parts).eval(), torch.rand(2, 8)
    manager = MaskingManager(model, example_inputs=x, ignore=[parts[1], "2.2"])
    assert manager.skipped["1.0"] == "is to be left alone"
    assert set(manager.mask(0.5).masked) == {"0.2", "2.0"}
    other = nn.Sequential(*copy.deepcopy(parts)).eval()
    assert set(MaskingManager(other, example_inputs=x).mask({"1": 0.5}).masked) == {"1.0", "1.2"}
    assert not MaskingManager(model, example_inputs=x, ignore=model[0]).masked
    masked = upscale.mask(model, x, ignore=model[0], amount=0.5, side="output")
    assert all(torch.equal(a, b) for a, b in zip(masked[0].parameters(), model[0].parameters(), strict=True))


@pytest.mark.parametrize("method", ["unconstrained", "constrained", "contiguous"])
def test_ignored_layers_stay_in_every_method(method: Any) -> None:
    model = network(Residual)
    manager = MaskingManager(model, method=method, example_inputs=IMAGE).mask(0.5, ignore=["two"])
    assert "two" not in manager.masked and manager.masked
    check_equal(model, upscale.export(model, (IMAGE,)), IMAGE)


def test_global_ranking_is_among_layers_of_one_amount() -> None:
    model = network(Residual)
    manager = MaskingManager(model, is_global=True, example_inputs=IMAGE).mask({"one": 0.5, "t*": 0.25})
    assert counts(manager)["one"] == 24 and "head" not in manager.masked
    assert counts(manager)["two"] + counts(manager)["three"] == (40 + 48) // 4


def test_a_group_loses_the_least_that_its_layers_are_given() -> None:
    model = network(Residual)  # "one" and "three" read the stream
    manager = MaskingManager(model, method="constrained", example_inputs=IMAGE).mask({"one": 0.5, "three": 0.25})
    assert counts(manager) == {"one": 12, "three": 12}
    manager = MaskingManager(network(Residual), method="constrained", example_inputs=IMAGE).mask({"one": 0.5})
    assert counts(manager) == {"one": 24, "three": 24}  # who is not named goes along


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "gone"), [("geometric", [0, 11, 20, 28]), ("linear", [0, 9, 18, 28])]
)  # of 56, to a half: 56 * (1 - 0.5 ** (1 / 3)) = 11.6, 56 / 6 = 9.3, ...
def test_steps_score_the_weights_masked_so_far(schedule: Any, gone: list[int]) -> None:
    seen: list[list[int]] = []

    def score(weight: Tensor) -> Tensor:
        if weight.shape == (10, 56):
            seen.append((weight == 0).all(0).nonzero().flatten().tolist())
        return torch.rand(weight.shape[1])  # another order at every step

    model = network(Residual)
    manager = MaskingManager(model, example_inputs=IMAGE).importance(score)
    manager.mask({"head": 0.5}, steps=3, schedule=schedule)
    final = manager.masked["head"].tolist()
    assert [len(zeros) for zeros in [*seen, final]] == gone
    assert all(set(a) <= set(b) for a, b in itertools.pairwise([*seen, final]))
    assert (model.head.weight == 0).all(0).nonzero().flatten().tolist() == final


@pytest.mark.parametrize("call", [{"amount": 0.5}, {"flops": 0.5}])
def test_an_error_between_steps_puts_everything_back(call: dict[str, float]) -> None:
    calls = itertools.count()

    def score(weight: Tensor) -> Tensor:
        if next(calls) >= 6:
            raise KeyboardInterrupt
        return weight.abs()

    model = network(Residual)
    before = fingerprint(model)
    manager = MaskingManager(model, side="output", example_inputs=IMAGE).importance(score)
    with pytest.raises(KeyboardInterrupt):
        manager.mask(**call, steps=4)
    assert fingerprint(model) == before and not manager.masked


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_waiting_is_shown_on_a_terminal_after_a_while(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, patience: float, shown: bool
) -> None:
    monkeypatch.setattr(waiting, "_PATIENCE", patience)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    with waiting.Waiting("masking to flops=0.5", console) as line:
        line.step("flops 0.712")
        line.step("flops 0.507")
    text = console.file.getvalue()
    assert ("masking to flops=0.5: flops 0.507" in text) == shown and (text == "") == (not shown)


def test_a_budget_without_an_example_says_what_is_missing() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(InputError, match="a budget.*example_inputs="):
        MaskingManager(model).mask(flops=0.5)


def test_zeros_that_are_there_already_are_told() -> None:
    """Freshly built networks may end their branches in batch norms of weight 0: nothing of them is needed."""
    model = network(Residual)
    nn.init.zeros_(model.two.weight)
    nn.init.zeros_(model.two.bias)
    before = fingerprint(model)
    with pytest.raises(InputError, match="with nothing masked: zeros that the model has already"):
        MaskingManager(model, example_inputs=IMAGE).mask(flops=0.9)
    assert fingerprint(model) == before

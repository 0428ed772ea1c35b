"""Measured rates: used by the plan, cached, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import upscale
from support.oracle import check_equal, randomise
from upscale import InputError, Target, tuning


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS", 0.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    model = randomise(model.double().eval())
    with torch.no_grad():
        model[2].weight[:, [1, 5, 6]] = 0
    return model


IMAGE = torch.rand(2, 3, 6, 6, dtype=torch.float64)


def test_rates_are_measured_once_and_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = tmp_path / "deep" / "rates.json", network()
    target = upscale.tune(model, IMAGE, cache=cache, target=Target(batch=4))
    assert target.batch == 4 and target.rates is not None and target.round_to in tuning._MULTIPLES
    assert target.rates.call > 0 and target.rates.multiply > 0
    pruned = upscale.export(model, (IMAGE,), target=target)
    check_equal(model, pruned, IMAGE)
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured again"))
    assert upscale.tune(model, (IMAGE,), cache=cache, target=Target(batch=4)) == target
    assert upscale.tune(model, IMAGE, cache=cache, target=Target(round_to=3)).round_to == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', "KEY", "NAN"])
def test_a_cache_that_cannot_be_used_is_measured_anew(tmp_path: Path, text: str) -> None:
    cache, model = tmp_path / "rates.json", network()
    upscale.tune(model, IMAGE, cache=cache)
    (key, entry), *_ = json.loads(cache.read_text()).items()
    broken = {"KEY": {key: {"rates": {"unknown": 1.0}, "round_to": 1}}, "NAN": {key: entry | {"rates": {"call": -1.0}}}}
    cache.write_text(json.dumps(broken[text]) if text in broken else text)
    assert upscale.tune(model, IMAGE, cache=cache).rates is not None
    assert json.loads(cache.read_text())[key]["rates"].keys() == entry["rates"].keys()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert upscale.tune(network(), IMAGE, cache=tmp_path / "file" / "rates.json").rates is not None


def test_an_interruption_leaves_the_cache_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = tmp_path / "rates.json", network()
    upscale.tune(model, IMAGE, cache=cache)
    before = cache.read_text()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.json, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upscale.tune(model, IMAGE, cache=cache, refresh=True)
    assert cache.read_text() == before and list(tmp_path.iterdir()) == [cache]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    upscale.tune(model, IMAGE, cache=tmp_path / "rates.json")
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("args", [(), (torch.rand(2, 5, 6, 6),)])
def test_an_example_that_does_not_fit_is_refused(tmp_path: Path, args: tuple[object, ...]) -> None:
    with pytest.raises(InputError, match="example"):
        upscale.tune(network(), args, cache=tmp_path / "rates.json")


def test_rates_decide_how_a_tensor_is_read() -> None:
    """Where calls are dear, a layer rather multiplies by zeros; where they cost nothing, it picks its channels."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    heads = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(3))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.heads = model, heads

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            return torch.cat([head(y) for head in self.heads], 1)

    net = randomise(Net().double().eval())
    with torch.no_grad():
        for i, head in enumerate(net.heads):
            head.weight[:, i::3] = 0
    inner = {}
    for name, call in (("dear", 1e6), ("free", 0.0)):
        rates = upscale.plan.Rates(call=call, copy=0.0, piece=call)
        pruned = upscale.export(net, (IMAGE,), target=Target(rates=rates))
        check_equal(net, pruned, IMAGE)
        inner[name] = sorted(head.in_channels for head in pruned.heads)
    assert inner["free"] == [10, 11, 11]
    assert inner["dear"][-1] == 16


def test_what_the_host_takes_for_a_call_is_measured_and_nothing_random_is_drawn() -> None:
    before = torch.get_rng_state()
    taken = tuning._Bench(torch.device("cpu"), torch.float64).issue()
    assert 0 < taken < 1e8 and torch.equal(torch.get_rng_state(), before)

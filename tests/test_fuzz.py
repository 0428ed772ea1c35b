"""The fuzzer itself: deterministic, able to use every operator, and it finds, shrinks and repeats planted faults."""

from __future__ import annotations

import ast
import random
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upscale
from benchmarks.fuzz.__main__ import main
from benchmarks.fuzz.build import BATCHES, Builder, Reject, make_inputs, rebuild
from benchmarks.fuzz.catalogue import CATALOGUE
from benchmarks.fuzz.generate import FAMILIES, FAMILY_OF, draw
from benchmarks.fuzz.graph import Graph, Input, Step, Zero, needed
from benchmarks.fuzz.judge import judge, judge_more
from benchmarks.fuzz.script import standalone
from benchmarks.fuzz.session import Session
from benchmarks.fuzz.shrink import Shrinker
from benchmarks.fuzz.source import instance, network
from benchmarks.fuzz.verdict import BAD, GOOD

EXPORT = upscale.export
INPUTS = (
    Input("x0", (4, 6, 6)),
    Input("x1", (6, 4)),
    Input("x2", (6, 4)),
    Input("x3", (3, 3, 4, 4)),
    Input("x4", (6,)),
    Input("x5", (4,), 5),
)


def chain() -> Graph:
    """Convolution, batch norm, activation, convolution, head; two zero channels between the convolutions."""
    steps = (
        Step(0, "conv", {"x": "x0"}, {"out": 6, "kernel": 3}),
        Step(1, "batch_norm", {"x": "v0"}),
        Step(2, "activation", {"x": "v1"}),
        Step(3, "conv", {"x": "v2"}, {"out": 4}),
        Step(4, "head", {"x": "v3"}),
    )
    zeros = (Zero("m3.weight", ((1, (0, 2)),)), Zero("m0.weight", ((0, (5,)),)), Zero("m0.bias", ((0, (5,)),)))
    return Graph(seed=3, inputs=(Input("x0", (3, 6, 6)),), steps=steps, outputs=("v4",), zeros=zeros)


def source(graph: Graph) -> str:
    """The source of a graph's network."""
    return network(*rebuild(graph, CATALOGUE))


def test_the_same_seed_gives_the_same_example() -> None:
    """Data, source and weights; other seeds give others."""
    for seed in range(12):
        one, two = draw(seed), draw(seed)
        assert one == two and source(one) == source(two)
        first, second = (instance(source(g), seed, g.zeros).state_dict() for g in (one, two))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert len({source(draw(seed)) for seed in range(12)}) == 12


def test_a_focus_draws_a_family_more_often() -> None:
    """Ten times the weight shows."""
    plain, keen = (
        sum("recurrent" in draw(seed, 10, focus).families(FAMILY_OF) for seed in range(40))
        for focus in ("", "recurrent")
    )
    assert keen > plain


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_operator_can_be_used(name: str) -> None:
    """Each is accepted now and then, and what it makes has the sizes that are said of it."""
    rng = random.Random(5)
    used = 0
    for _ in range(150):
        builder = Builder(INPUTS, 1)
        for number, first in enumerate(("conv", "linear", "conv")):
            builder.add(Step(number, first), CATALOGUE[first].function, rng)
        try:
            step = builder.add(Step(7, name), CATALOGUE[name].function, rng)
        except Reject:
            continue
        used += 1
        result = next(reversed(builder.pool.values()))
        graph = Graph(1, INPUTS, (), (result.name,))
        model = instance(network(builder, graph), 1, ())
        with torch.no_grad():
            value = model(*make_inputs(INPUTS, BATCHES[0], 1 + BATCHES[0]))
        assert tuple(value.shape) == (result.times * BATCHES[0], *result.dims)
        assert step.op == name
        if used == 3:
            return
    assert used, f"{name} is never accepted"


def test_networks_are_valid_and_whole() -> None:
    """What is drawn can be built, runs at any batch, uses every step, and holds zeros as a rule."""
    masked = 0
    for seed in range(40):
        graph = draw(seed)
        assert needed(graph) == graph and graph.outputs
        text = source(graph)
        ast.parse(text)
        model = instance(text, seed, graph.zeros)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert all(zero.name in state for zero in graph.zeros)
        masked += bool(graph.zeros)
    assert masked >= 30


def test_a_block_of_zeros_meets_just_that_block() -> None:
    """Blocks over two dimensions are products of indices."""
    text = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.p = nn.Parameter("
    model = instance(text + "torch.zeros(4, 3))\n", 1, [Zero("p", ((0, (1, 3)), (1, (0, 2))))])
    zero = model.p == 0
    assert zero.sum() == 4 and bool(zero[1, 0] & zero[1, 2] & zero[3, 0] & zero[3, 2])


def test_a_short_run(tmp_path: Path) -> None:
    """A few dozen networks: all judged, and whatever fails is written down and repeated by its script."""
    session = Session(tmp_path, shrink_seconds=5)
    session.run(range(30), 15, lambda seed, verdict: None)
    assert sum(session.outcomes.values()) >= 5
    assert set(session.outcomes) <= {*GOOD, *BAD} and not session.outcomes["fuzzer error"]
    assert session.outcomes["smaller"] >= sum(session.outcomes.values()) // 3, session.outcomes
    assert set(session.families) <= {*FAMILIES, "head"}
    assert len(session.failures) == len(list(tmp_path.glob("*.py")))
    for failure in session.failures:
        with pytest.raises(Exception):  # noqa: B017 - whatever it was
            runpy.run_path(str(failure.path))


def test_further_masks_agree_with_the_public_call() -> None:
    """A network captured once and masked anew is judged as the whole export judges it."""
    judged = list(judge_more(chain(), 5))
    assert len(judged) == 5 and len({graph.zeros for graph, _ in judged}) > 1
    for graph, verdict in judged:
        assert not verdict.failed and judge(graph).outcome == verdict.outcome


# -- planted faults ---------------------------------------------------------------------------------------------------


def corrupting(kind: type[nn.Module]) -> Callable[..., Any]:
    """An export that gets the first weight of every layer of that kind wrong."""

    def export(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        pruned = EXPORT(model, *args, **options)
        for module in pruned.modules():
            if isinstance(module, kind):
                module.weight.data.view(-1)[0] += 0.5  # type: ignore[union-attr,operator]
        return pruned

    return export


def test_a_planted_fault_is_found_shrunk_and_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A batch norm whose weight is wrong: found, reduced to little more than a batch norm, repeated by a script."""
    assert judge(chain()).outcome == "smaller"
    monkeypatch.setattr(upscale, "export", corrupting(nn.BatchNorm2d))
    verdict = judge(chain())
    assert verdict.outcome == "wrong, verified" and verdict.failed, verdict
    small = Shrinker(chain(), lambda graph: judge(graph).like(verdict), seconds=20).run()
    assert "batch_norm" in [step.op for step in small.steps] and len(small.steps) <= 3
    assert len(small.zeros) <= 1 and small.batch == 2
    script = tmp_path / "failure.py"
    script.write_text(standalone(small, judge(small), "the test"))
    code = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert not any("support" in line or "benchmarks" in line for line in code)
    with pytest.raises(AssertionError, match="relative error"):
        runpy.run_path(str(script))
    monkeypatch.setattr(upscale, "export", EXPORT)
    runpy.run_path(str(script))


def test_other_failures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed model, an exception, an unjustified refusal, a hang."""

    def touching(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        pruned = EXPORT(model, *args, **options)
        next(model.parameters()).data.add_(1)
        return pruned

    def raising(error: Exception) -> Callable[..., Any]:
        def export(*args: Any, **options: Any) -> nn.Module:
            raise error

        return export

    planted = {
        "model changed": touching,
        "exception": raising(KeyError("conv2d")),
        "refused": raising(upscale.NothingToPruneError("nothing")),
        "hang": lambda *args, **options: time.sleep(5),
    }
    for outcome, export in planted.items():
        monkeypatch.setattr(upscale, "export", export)
        assert judge(chain(), limit=1 if outcome == "hang" else 30).outcome == outcome
    monkeypatch.setattr(upscale, "export", raising(upscale.ConstantOutputError("constant")))
    assert judge(chain()).outcome == "refused"


def test_the_command_says_so_by_its_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """0 without failures, 1 with one; the failure's script is printed."""
    monkeypatch.setattr("benchmarks.fuzz.session.draw", lambda seed, longest, focus: chain())
    arguments = ["--count", "1", "--folder", str(tmp_path), "--shrink", "3"]
    assert main(arguments) == 0
    assert "conv" in capsys.readouterr().out and not list(tmp_path.iterdir())
    monkeypatch.setattr(upscale, "export", corrupting(nn.Conv2d))
    assert main(arguments) == 1
    assert "class Net(nn.Module)" in capsys.readouterr().out and len(list(tmp_path.glob("wrong*.py"))) == 1

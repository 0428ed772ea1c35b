"""Draws a random example: inputs, a chain of steps, heads, zeros. The same seed gives the same example."""

from __future__ import annotations

import random
from dataclasses import replace

from . import ops_attention, ops_blocks, ops_layers, ops_modules, ops_move, ops_pointwise, ops_space  # noqa: F401 - fill the table
from .build import Builder, Reject, rebuild
from .catalogue import CATALOGUE
from .graph import Graph, Input, Step, needed
from .zeros import Masker

TRIES = 30  # operators tried for one step before the network is declared long enough
FAMILY_OF = {name: operator.family for name, operator in CATALOGUE.items()}
FAMILIES = sorted(set(FAMILY_OF.values()) - {"head"})


def draw(seed: int, longest: int = 10) -> Graph:
    """The example of that seed."""
    rng = random.Random(seed)
    while True:
        graph = Graph(
            seed=seed,
            inputs=_inputs(rng),
            form=rng.choice(("tensor", "tensor", "tuple", "list", "dict", "nested", "twice")),
            batch=rng.choice((1, 2, 2, 3)),
            spatial=rng.random() < 0.06,
            reads=rng.choice(
                (("auto",), ("auto",), ("auto",), ("gather",), ("baseline",), ("auto", "gather", "baseline"))
            ),
        )
        graph = replace(graph, other=rng.choice([b for b in (1, 2, 3, 4) if b != graph.batch]))
        grown = _grow(graph, rng, rng.randint(2, longest))
        if grown is not None:
            return grown


def _inputs(rng: random.Random) -> tuple[Input, ...]:
    kinds = (
        "large",
        "image",
        "image",
        "image",
        "image",
        "sequence",
        "volume",
        "tokens",
        "tokens",
        "vector",
        "ids",
        "ids",
    )
    made = [_input(rng, f"x{i}", rng.choice(kinds)) for i in range(rng.choice((1, 1, 1, 2)))]
    return tuple(made)


def _input(rng: random.Random, name: str, kind: str) -> Input:
    sides = (4, 5, 6, 7, 8)
    if kind == "large":  # where slicing may be cheaper than gathering
        return Input(name, (rng.choice((2, 3, 4)), rng.choice((18, 24)), rng.choice((20, 24))))
    if kind == "image":
        return Input(name, (rng.choice((1, 2, 3, 4)), rng.choice(sides), rng.choice(sides)))
    if kind == "sequence":
        return Input(name, (rng.choice((2, 3, 4)), rng.choice(sides)))
    if kind == "volume":
        return Input(name, (rng.choice((1, 2, 3)), 3, rng.choice((4, 5)), 4))
    if kind == "tokens":
        return Input(name, (rng.choice((3, 4, 6, 8)), rng.choice((2, 4, 5, 6))))
    if kind == "vector":
        return Input(name, (rng.choice((3, 4, 6)),))
    return Input(name, (rng.choice((4, 6)),), vocabulary=rng.choice((5, 7)))


def _grow(graph: Graph, rng: random.Random, length: int) -> Graph | None:
    """Add steps, heads and zeros; None where the result is of no use."""
    builder = Builder(graph.inputs, graph.seed)
    steps: list[Step] = []
    families = [op for op in CATALOGUE.values() if op.weight]
    weights = [op.weight for op in families]
    for number in range(length):
        for _ in range(TRIES):
            operator = rng.choices(families, weights)[0]
            step = _try(builder, steps, Step(number, operator.name), rng)
            builder = _clean(builder, graph, steps)
            if step is not None:
                steps.append(step)
                break
    builder, outputs = _end(builder, graph, steps, rng)
    if not outputs:
        return None
    graph = needed(graph.with_steps(steps, outputs))
    try:
        builder, graph = rebuild(graph, CATALOGUE)
    except Reject:  # a write into a tensor that is gone changed a value that was within bounds
        return None
    return replace(graph, zeros=Masker(builder, rng).draw())


def _try(builder: Builder, steps: list[Step], step: Step, rng: random.Random) -> Step | None:
    try:
        return builder.add(step, CATALOGUE[step.op].function, rng)
    except Reject:
        return None


def _clean(builder: Builder, graph: Graph, steps: list[Step]) -> Builder:
    """Build anew where a rejected step wrote into tensors."""
    if not builder.dirty:
        return builder
    fresh = Builder(graph.inputs, graph.seed)
    for step in steps:
        fresh.add(step, CATALOGUE[step.op].function)
    return fresh


def _end(builder: Builder, graph: Graph, steps: list[Step], rng: random.Random) -> tuple[Builder, list[str]]:
    """A head on most of the tensors that nobody reads; the rest are outputs as they are."""
    loose = [t for t in builder.pool.values() if t.name not in builder.used and t.name.startswith("v")]
    rng.shuffle(loose)
    outputs = []
    for tensor in loose[: rng.choice((1, 2, 3))]:
        name = tensor.name
        if tensor.floating and rng.random() < 0.75:
            for _ in range(8):
                number = len(steps) + 1000
                step = _try(builder, steps, Step(number, "head", {"x": name}), _Forced(rng, tensor.name))
                if step is not None:
                    steps.append(step)
                    name = f"v{number}"
                    break
        outputs.append(name)
    return builder, outputs


class _Forced(random.Random):
    """Random choices, but for tensors: those are given."""

    def __init__(self, rng: random.Random, tensor: str) -> None:
        super().__init__(rng.random())
        self.tensor = tensor

    def choices(self, population, weights=None, **options):  # type: ignore[no-untyped-def]
        """The given tensor where tensors are drawn."""
        named = [item for item in population if getattr(item, "name", None) == self.tensor]
        return named or super().choices(population, weights, **options)

"""Makes a failing example small while it still fails in the same way: greedy, one simplification at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from .build import Reject, rebuild
from .catalogue import CATALOGUE
from .graph import Graph, Input, Step, Zero, needed

Fails = Callable[[Graph], bool]


class Shrinker:
    """``fails`` says whether a graph fails as the first did; at most ``seconds`` are spent."""

    def __init__(self, graph: Graph, fails: Fails, seconds: float = 60.0) -> None:
        self.best, self.fails = graph, fails
        self.stop = time.monotonic() + seconds
        self.tried: set[Graph] = set()
        self.trials = 0

    def run(self) -> Graph:
        """The smallest graph found."""
        passes = (outputs, truncations, bypasses, plainer, fewer_zeros, choices, widths, sizes)
        improved = True
        while improved and time.monotonic() < self.stop:
            improved = False
            for simpler in passes:
                while self._improve(simpler):
                    improved = True
        return self.best

    def _improve(self, simpler: Callable[[Graph], Iterator[Graph]]) -> bool:
        """Take the first simplification of this kind that still fails."""
        for candidate in simpler(self.best):
            if time.monotonic() > self.stop:
                return False
            tidy = self._tidy(candidate)
            if tidy is not None and self._known(tidy) and self._still(tidy):
                self.best = tidy
                return True
        return False

    def _tidy(self, candidate: Graph) -> Graph | None:
        """The candidate without dead steps and unused choices; None where it cannot be built."""
        try:
            builder, tidy = rebuild(needed(candidate), CATALOGUE)
        except Reject:
            return None
        shapes = {n: tuple(p.shape) for n, p in [*builder.root.named_parameters(), *builder.root.named_buffers()]}
        zeros = [fitted(zero, shapes[zero.name]) for zero in tidy.zeros if zero.name in shapes]
        used = {name for step in tidy.steps for name in step.refs.values()} | set(tidy.outputs)
        inputs = tuple(i for i in tidy.inputs if i.name in used)
        return replace(tidy, zeros=tuple(z for z in zeros if z is not None), inputs=inputs or tidy.inputs[:1])

    def _known(self, graph: Graph) -> bool:
        key = repr(graph)
        if key in self.tried:  # type: ignore[comparison-overlap]
            return False
        self.tried.add(key)  # type: ignore[arg-type]
        return True

    def _still(self, graph: Graph) -> bool:
        self.trials += 1
        try:
            return self.fails(graph)
        except Reject:
            return False


def fitted(zero: Zero, shape: tuple[int, ...]) -> Zero | None:
    """``zero`` for a parameter that may have become smaller."""
    block = []
    for dim, chosen in zero.block:
        if dim >= len(shape):
            return None
        inside = tuple(index for index in chosen if index < shape[dim])
        if not inside:
            return None
        block.append((dim, inside))
    return Zero(zero.name, tuple(block))


def outputs(graph: Graph) -> Iterator[Graph]:
    """One output alone; one output less; a plain tensor; one way to read."""
    for name in graph.outputs if len(graph.outputs) > 1 else ():
        yield replace(graph, outputs=(name,), form="tensor")
    for name in graph.outputs if len(graph.outputs) > 1 else ():
        yield replace(graph, outputs=tuple(o for o in graph.outputs if o != name))
    if graph.form != "tensor":
        yield replace(graph, form="tensor")
    if len(graph.reads) > 1:
        yield from (replace(graph, reads=(reads,)) for reads in graph.reads)
    if graph.spatial:
        yield replace(graph, spatial=False)
    if graph.reads != ("auto",):
        yield replace(graph, reads=("auto",))


def truncations(graph: Graph) -> Iterator[Graph]:
    """An intermediate result as the only output, or in place of one of several."""
    names = [name for step in graph.steps for name in step.refs.values()]
    for name in dict.fromkeys(names):
        yield replace(graph, outputs=(name,), form="tensor")


def bypasses(graph: Graph) -> Iterator[Graph]:
    """Without one step (or two): its readers read something earlier instead."""
    for step in reversed(graph.steps):
        makes = _results(graph, step)
        earlier = [*step.refs.values(), *(i.name for i in graph.inputs)]
        earlier += [n for s in graph.steps if s.number != step.number for n in _results(graph, s)]
        for other in dict.fromkeys(earlier):
            yield _renamed(graph, makes, other, step)


def _results(graph: Graph, step: Step) -> list[str]:
    """The names under which the results of a step are read."""
    names = [n for s in graph.steps for n in s.refs.values()] + list(graph.outputs)
    prefix = f"v{step.number}"
    return [n for n in dict.fromkeys(names) if n.startswith(prefix) and not n[len(prefix) : len(prefix) + 1].isdigit()]


def _renamed(graph: Graph, names: list[str], other: str, without: Step) -> Graph:
    steps = []
    for step in graph.steps:
        if step is not without:
            refs = {key: other if name in names else name for key, name in step.refs.items()}
            steps.append(replace(step, refs=refs))
    return graph.with_steps(steps, (other if name in names else name for name in graph.outputs))


def plainer(graph: Graph) -> Iterator[Graph]:
    """A step replaced by a plain one: a convolution, a linear layer, an activation, a batch norm, a sum."""
    for index, step in enumerate(graph.steps):
        for op in ("activation", "linear", "conv", "batch_norm", "combine"):
            if op != step.op and "x" in step.refs and _rank(op) < _rank(step.op):
                steps = list(graph.steps)
                steps[index] = Step(step.number, op, step.refs, {})
                yield graph.with_steps(steps)


def _rank(op: str) -> int:
    order = ("activation", "linear", "conv", "batch_norm", "combine", "head")
    return order.index(op) if op in order else len(order)


def choices(graph: Graph) -> Iterator[Graph]:
    """One step with one choice (or all of them) at its simplest."""
    for index, step in enumerate(graph.steps):
        droppable = [key for key in step.choices if key != "shared"]
        for keys in ([droppable] if len(droppable) > 1 else []) + [[key] for key in droppable]:
            steps = list(graph.steps)
            steps[index] = replace(step, choices={k: v for k, v in step.choices.items() if k not in keys})
            yield graph.with_steps(steps)


def fewer_zeros(graph: Graph) -> Iterator[Graph]:
    """No zeros, half of them, all but one, fewer indices in one."""
    zeros = graph.zeros
    if zeros:
        yield replace(graph, zeros=())
    half = len(zeros) // 2
    if half > 1:
        yield replace(graph, zeros=zeros[:half])
        yield replace(graph, zeros=zeros[half:])
    for index, zero in enumerate(zeros):
        yield replace(graph, zeros=zeros[:index] + zeros[index + 1 :])
        for position, (dim, chosen) in enumerate(zero.block):
            for less in ((chosen[0],), chosen[1:]) if len(chosen) > 1 else ():
                block = (*zero.block[:position], (dim, less), *zero.block[position + 1 :])
                yield replace(graph, zeros=(*zeros[:index], Zero(zero.name, block), *zeros[index + 1 :]))


def widths(graph: Graph) -> Iterator[Graph]:
    """The widths of all steps at once, two at a time: layers that must match shrink together."""
    wide = [
        (index, key)
        for index, step in enumerate(graph.steps)
        for key, value in step.choices.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 1
    ]
    for i, (a, key) in enumerate(wide):
        for b, other in wide[i + 1 :]:
            if a != b:
                steps = list(graph.steps)
                for index, name in ((a, key), (b, other)):
                    steps[index] = replace(
                        steps[index], choices={k: v for k, v in steps[index].choices.items() if k != name}
                    )
                yield graph.with_steps(steps)


def sizes(graph: Graph) -> Iterator[Graph]:
    """Smaller inputs and batches."""
    for batch, other in ((2, 3), (2, 1)):
        if (graph.batch, graph.other) not in ((2, 3), (batch, other)):
            yield replace(graph, batch=batch, other=other)
    for index, item in enumerate(graph.inputs):
        for dim, size in enumerate(item.dims):
            for less in (1, 2, 3, size // 2, size - 1):
                if 0 < less < size:
                    dims = (*item.dims[:dim], less, *item.dims[dim + 1 :])
                    made = Input(item.name, dims, item.vocabulary)
                    yield replace(graph, inputs=(*graph.inputs[:index], made, *graph.inputs[index + 1 :]))

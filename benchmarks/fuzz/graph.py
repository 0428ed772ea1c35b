"""A fuzzed network as plain data: inputs, steps, outputs, zeros. The same data always gives the same network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Input:
    """One argument of ``forward``: its dimensions after the batch; with a ``vocabulary``: ids below it."""

    name: str
    dims: tuple[int, ...]
    vocabulary: int = 0


@dataclass(frozen=True)
class Step:
    """One call of an operator of the catalogue: ``refs`` name earlier tensors, ``choices`` are its random parameters.

    A choice that is missing stands for the simplest one, which is how a failure is shrunk.
    """

    number: int
    op: str
    refs: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Zero:
    """Zeros in one parameter: the block where every listed dimension has one of the listed indices."""

    name: str
    block: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Graph:
    """A whole example: the network, its zeros, and how it is exported and compared."""

    seed: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...] = ()
    outputs: tuple[str, ...] = ()
    form: str = "tensor"  # what forward returns: tensor, tuple, list, dict, nested, twice
    zeros: tuple[Zero, ...] = ()
    batch: int = 2
    other: int = 3  # the second batch size that is compared
    reads: tuple[str, ...] = ("auto",)
    spatial: bool = False  # height, width and depth are left free too

    def with_steps(self, steps: Iterable[Step], outputs: Iterable[str] | None = None) -> Graph:
        """The same example with other steps and, where given, other outputs."""
        return replace(self, steps=tuple(steps), outputs=self.outputs if outputs is None else tuple(outputs))

    def families(self, family_of: Mapping[str, str]) -> set[str]:
        """The operator families that occur."""
        return {family_of[step.op] for step in self.steps}


def step_of(tensor: str) -> int | None:
    """The number of the step that makes a tensor: ``v12`` and ``v12b`` give 12, an input gives None."""
    digits = "".join(character for character in tensor[1:] if character.isdigit())
    return int(digits) if tensor.startswith("v") else None


def needed(graph: Graph) -> Graph:
    """``graph`` without the steps whose results nobody reads (a write into an earlier tensor is no reason to stay)."""
    wanted = {step_of(name) for name in graph.outputs}
    kept: list[Step] = []
    for step in reversed(graph.steps):
        if step.number in wanted:
            kept.append(step)
            wanted.update(step_of(name) for name in step.refs.values())
            if "shared" in step.choices:
                wanted.add(step_of("v" + step.choices["shared"][1:]))
    return graph.with_steps(reversed(kept))

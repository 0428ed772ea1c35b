"""Two captured networks run side by side over all batches, from a place in the graph that moves forward.

Running the whole network once a layer would cost the square of its depth. So the values that are alive at one place
are kept for every batch, and the place moves on from layer to layer. Where these values are too many to keep
(:attr:`Frontier.limit`) the place stays behind, and what lies between is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..program import Program, last_uses

__all__ = ["Frontier", "State", "Tape"]


@dataclass
class State:
    """Where a run of one batch stands: the nodes before ``position`` are done, ``values`` holds what is still used."""

    position: int
    values: dict[fx.Node, Any]
    waiting: dict[fx.Node, Any] = field(default_factory=dict)  # inputs of the model that no node has asked for yet

    def copied(self) -> State:
        """A state that can move on by itself; the tensors are shared."""
        return State(self.position, dict(self.values), dict(self.waiting))

    def storages(self) -> Iterable[tuple[int, int]]:
        """Address and bytes of all memory that is held."""
        for leaf in pytree.tree_leaves(list(self.values.values())):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                yield storage.data_ptr(), storage.nbytes()


class Tape:
    """A program's nodes in a row, each of which can be run when those before it are done."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self._device = program, device
        self.nodes = list(program.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.calls = [node for node in self.nodes if node.op == "call_function"]
        self._dying = last_uses(program.graph)

    def start(self, leaves: Sequence[Tensor]) -> State:
        """The state before the first node; ``leaves``: the model's tensor inputs, moved to its device when read."""
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        return State(0, {}, dict(zip(inputs, leaves, strict=True)))

    def value(self, state: State, node: Any) -> Any:
        """The value of ``node``, or the tensor it names; what is no node is a value already."""
        if not isinstance(node, fx.Node):
            return node
        return self.program.tensors[str(node.target)] if node.op == "get_attr" else state.values[node]

    def advance(self, state: State, stop: fx.Node, keep: Iterable[fx.Node] = ()) -> None:
        """Run ``state`` up to ``stop``, which is not run itself. ``keep``: values not to be freed."""
        kept = set(keep)
        while state.position < self.place[stop]:
            node = self.nodes[state.position]
            self._step(state, node)
            for used in self._dying.get(node, ()):
                if used not in kept:
                    state.values.pop(used, None)
            if not node.users and node not in kept:
                state.values.pop(node, None)
            state.position += 1

    def _step(self, state: State, node: fx.Node) -> None:
        if node.op == "placeholder":
            value = state.waiting.pop(node)
            state.values[node] = value.to(self._device)
        elif node.op == "call_function":
            state.values[node] = self.call(node, lambda used: self.value(state, used))

    def call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """Run one call on the values that ``value`` gives for its arguments."""
        target: Any = node.target
        return target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))


class Frontier:
    """The states of several tapes for all batches."""

    def __init__(self, tapes: Sequence[Tape], batches: Sequence[Sequence[Tensor]], limit: int) -> None:
        """``batches``: the flat tensor inputs of each; ``limit``: bytes of activations to keep for all of them."""
        self.tapes, self.limit = tuple(tapes), limit
        self._states = [tuple(tape.start(leaves) for tape in tapes) for leaves in batches]

    def __len__(self) -> int:
        return len(self._states)

    @torch.no_grad()
    def visit(self, stops: Sequence[fx.Node], use: Callable[[int, tuple[State, ...]], None]) -> None:
        """For each batch run every tape to its stop and call ``use(number, states)``, which may run them further.

        The frontier moves to the stops if what is alive there fits the limit for all batches.
        """
        moves = False
        for number, states in enumerate(self._states):
            moved = tuple(state.copied() for state in states)
            for tape, state, stop in zip(self.tapes, moved, stops, strict=True):
                self._advance(number, tape, state, stop)
            if number == 0:
                moves = _bytes(moved) * len(self._states) <= self.limit
            if moves:
                self._states[number] = moved
                moved = tuple(state.copied() for state in moved)
            use(number, moved)

    @staticmethod
    def _advance(number: int, tape: Tape, state: State, stop: fx.Node) -> None:
        try:
            tape.advance(state, stop)
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(f"batch {number}: the model does not accept it: {error}") from error


def _bytes(states: Iterable[State]) -> int:
    held: Mapping[int, int] = dict(pair for state in states for pair in state.storages())
    return sum(held.values())

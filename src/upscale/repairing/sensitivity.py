"""How much an error in what a layer writes changes what the network writes: to first order, by backpropagation.

With ``J`` the derivative of the outputs by a layer's result and ``v`` standard normal, ``v J e`` is the change that an
error ``e`` makes, seen along ``v``; its square is ``|J e|^2`` on average (Hutchinson 1990, "A stochastic estimator of
the trace of the influence matrix for Laplacian smoothing splines"). One backward pass gives ``v J`` for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..program import Program, run
from .examples import Examples
from .geometry import batch_dim
from .outputs import examples_of
from .pair import Inputs, batch_size
from .sites import Site, bias_node, weight_node
from .tape import State, Tape

__all__ = ["Change", "Sensitivity"]

_EXAMPLES = 8  # of a backward pass
_DRAWS, _MOST_DRAWS = 128, 16  # of ``v``: over all held-out examples, and for each of them at most


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to a layer's weight (in its shape), and to each of its outputs (outputs,)."""

    weight: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class _Derivative:
    """Of one call of a layer: ``v J`` by example, (examples, channels, places), what the layer read, and the run that
    other arguments are taken from."""

    site: Site
    node: fx.Node
    slope: Tensor
    read: Tensor
    state: State


class Sensitivity:
    """Derivatives of a network's outputs by what its layers write, on the held-out examples.

    An error of 1 is as large as the outputs' mean square about their mean, over all of them.
    """

    def __init__(self, program: Program, inputs: Inputs, sites: Sequence[Site], seed: int) -> None:
        layers = {call.node: site for site in sites for call in site.calls}
        self._tape = _Differentiated(program, inputs.device, layers)
        self._examples, self._device, self._seed = Examples(program, inputs), inputs.device, seed
        (output,) = (node for node in program.graph.nodes if node.op == "output")
        self._outputs: list[Any] = list(output.args[0])
        self._held, self._scales = self._output_scales()

    def factors(self) -> dict[str, Tensor]:
        """For each layer how much the mean square of each output's error counts, (outputs,) in float64, if errors at
        different places have nothing to do with each other. Missing are layers that the outputs have no derivative by.
        """
        found: dict[str, Tensor] = {}
        draws = 0
        for count, derivatives in self._passes():
            draws += count
            for one in derivatives:
                total = one.slope.double().flatten(2).square().sum((0, 2))
                found[one.site.name] = found.get(one.site.name, torch.zeros_like(total)) + total
        return {name: total / draws for name, total in found.items() if bool(total.any())}

    def errors(self, changes: Mapping[str, Sequence[Change]]) -> dict[str, list[float]]:
        """For each layer and each change of it, the mean square of the change of the outputs, relative to theirs."""
        found = {name: torch.zeros(len(some), dtype=torch.float64) for name, some in changes.items()}
        draws = 0
        for count, derivatives in self._passes():
            draws += count
            along: dict[str, Tensor] = {}  # (changes, examples)
            for one in derivatives:
                name = one.site.name
                if name in changes:
                    here = torch.stack([self._along(one, change, count) for change in changes[name]])
                    along[name] = along[name] + here if name in along else here  # all calls of a layer change
            for name, values in along.items():
                found[name] += values.square().sum(1).cpu()
        return {name: (total / max(1, draws)).tolist() for name, total in found.items()}

    def _along(self, one: _Derivative, change: Change, count: int) -> Tensor:
        """``v J e`` of each example, or of all that cannot be told apart; ``e``: what the change adds."""
        node, weight, bias = one.node, weight_node(one.node), bias_node(one.node)

        def value(used: fx.Node) -> Any:
            if used is weight:
                return change.weight
            if used is bias:
                return torch.zeros_like(change.shift, dtype=change.weight.dtype)
            return one.read if used is node.args[0] else self._tape.value(one.state, used)

        error = one.site.geometry.by_example(Tape.call(self._tape, node, value), batch_dim(node)).flatten(2)
        slope = one.slope.flatten(2)
        along = (slope * error).double().sum((1, 2)) + slope.double().sum(2) @ change.shift.double()
        return along.view(count, -1).sum(1) if len(along) % count == 0 else along.sum(0, keepdim=True)

    def _passes(self) -> Iterator[tuple[int, list[_Derivative]]]:
        """For each part of the examples how many count, and the derivatives; several times where there are few."""
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(min(_MOST_DRAWS, math.ceil(_DRAWS / max(1, self._held)))):
            taken = 0
            for leaves, chosen in self._examples.held(_EXAMPLES):
                yield _count(leaves, chosen), self._derivatives(leaves, chosen, generator)
                taken += _count(leaves, chosen)
                if taken >= _DRAWS:
                    break

    def _derivatives(
        self, leaves: Sequence[Tensor], chosen: Tensor | None, generator: torch.Generator
    ) -> list[_Derivative]:
        state, values, probes = self._tape.differentiable(self._moved(leaves), self._outputs)
        outputs = {number: values[number] for number in self._scales}
        used = [number for number, y in outputs.items() if y.requires_grad]
        if not used or not probes:
            return []
        along = [self._direction(outputs[number], self._scales[number], chosen, generator) for number in used]
        written = [result for _, result in probes.values()]
        slopes = torch.autograd.grad([outputs[number] for number in used], written, along, allow_unused=True)
        found = []
        for (node, (read, _)), slope in zip(probes.items(), slopes, strict=True):
            if slope is not None:
                site = self._tape.layers[node]
                found.append(_Derivative(site, node, site.geometry.by_example(slope, batch_dim(node)), read, state))
        return found

    @staticmethod
    def _direction(output: Tensor, scale: float, chosen: Tensor | None, generator: torch.Generator) -> Tensor:
        """``v``: zero for examples that are not chosen."""
        drawn = torch.randn(output.shape, generator=generator).to(output.device, output.dtype) / scale
        if chosen is None or not output.dim() or len(output) != len(chosen):
            return drawn
        return drawn * chosen.to(output.device).view(-1, *[1] * (output.dim() - 1))

    def _output_scales(self) -> tuple[int, dict[int, float]]:
        """How many examples are held out; for each output that is real and varies, the root of its sum of squares about
        the mean in an example, times the root of their number."""
        parts: dict[int, list[Tensor]] = {}
        examples = 0
        for leaves, chosen in self._examples.held(_EXAMPLES):
            examples += _count(leaves, chosen)
            for number, y in enumerate(run(self._tape.program, self._moved(leaves))):
                if isinstance(y, Tensor) and y.is_floating_point():
                    here = y if chosen is None else examples_of(y, chosen)
                    parts.setdefault(number, []).append(here.flatten().double())
        values = {number: torch.cat(some) for number, some in parts.items()}
        squares = {number: float((y - y.mean()).square().sum()) for number, y in values.items() if len(y)}
        varying = {number: total for number, total in squares.items() if 0 < total < math.inf}
        scales = {number: math.sqrt(total / examples * len(varying)) for number, total in varying.items()}
        return examples, scales

    def _moved(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        return [leaf.to(self._device) for leaf in leaves]


class _Differentiated(Tape):
    """A tape that keeps, of each call of a layer, what it reads and writes, as part of autograd's graph."""

    def __init__(self, program: Program, device: torch.device, layers: Mapping[fx.Node, Site]) -> None:
        super().__init__(program, device)
        self.layers = layers
        self.probes: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def value(self, state: State, node: Any) -> Any:
        """The value of ``node``; the model's own tensors need no derivative."""
        found = super().value(state, node)
        return found.detach() if isinstance(node, fx.Node) and node.op == "get_attr" else found

    def call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """Run one call; what a layer writes can be differentiated by."""
        result = super().call(node, value)
        if node in self.layers:
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            read = node.args[0]
            assert isinstance(read, fx.Node)
            self.probes[node] = value(read).detach(), result
        return result

    def differentiable(
        self, leaves: Sequence[Tensor], wanted: Sequence[Any]
    ) -> tuple[State, list[Any], dict[fx.Node, tuple[Tensor, Tensor]]]:
        """The state at the end of a run, the values of ``wanted``, and what each layer's call read and wrote."""
        self.probes = {}
        with torch.enable_grad():
            state = self.start(leaves)
            self.advance(state, self.nodes[-1], keep=[node for node in wanted if isinstance(node, fx.Node)])
        probes, self.probes = self.probes, {}
        return state, [self.value(state, node) for node in wanted], probes


def _count(leaves: Sequence[Tensor], chosen: Tensor | None) -> int:
    """How many examples count."""
    return batch_size(leaves) if chosen is None else int(chosen.sum())

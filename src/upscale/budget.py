"""Budgets: mask until a share of the FLOPs, parameters or time is left, as the exported model will have them.

The model is captured once. Every candidate is a set of zeros in a copy of the captured tensors, compiled as an export
would be: flow, plan and lowering, with nothing emitted or verified. What is counted is the lowered program itself, so
that channels which a barrier, a residual stream or the planner keeps are counted as kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from . import measure
from .amounts import Budget
from .capture import capture
from .channels import Side
from .errors import BudgetError, ConstantOutputError, NothingToPruneError, UnsupportedModelError
from .exporting import Compiled, compile_program, finish
from .observe import quietly_evaluated
from .prices import channel_prices
from .program import Program, interpret
from .ranking import Group
from .report import count_parameters
from .searching import Found, Search
from .waiting import Waiting
from .zeroing import Zeros

__all__ = ["Costs", "choose_within"]

#: How near a budget must be met, relative to it, and how many candidates are tried.
_TOLERANCE = {"flops": 0.01, "params": 0.01, "latency": 0.1}
_MOST = {"flops": 40, "params": 40, "latency": 12}
_ROUNDS, _SECONDS = 50, 1.5  # of one timing


class Costs:
    """What an export of a model costs, as shares of the original: one capture, then a compilation for each question.

    Raises:
        CaptureError, UnsupportedModelError: the model cannot be captured.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], side: Side) -> None:
        self._side, self._model, self._args, self._kwargs = side, model, args, dict(kwargs)
        self._program = capture(model, args, kwargs)
        self._names = {id(tensor): name for name, tensor in self._program.tensors.items()}
        self._spare = {id(tensor) for tensor in self._program.spare.values()}
        self._originals: dict[str, float] = {}
        self._kinds: dict[str, Callable[[Compiled], float]] = {
            "flops": self._flops,
            "params": self._parameters,
            "latency": self._time,
        }

    def left(self, kind: str, zeros: Iterable[Zeros]) -> float:
        """What is left of the original's ``kind`` with these zeros; -1 where the output would be constant.

        Zeros that the model has already count too: the original is the model with nothing removed.
        """
        try:
            compiled = compile_program(replace(self._program, tensors=self._zeroed(zeros)))
        except NothingToPruneError:
            return 1.0
        except ConstantOutputError:
            return -1.0
        return self._kinds[kind](compiled)

    def prices(self, kind: str, groups: Sequence[Group]) -> list[Tensor]:
        """See :func:`upscale.prices.channel_prices`."""
        return channel_prices(self._program, kind, groups, self._side)

    def _zeroed(self, zeros: Iterable[Zeros]) -> dict[str, Tensor]:
        """The captured tensors, copied where there are zeros to write."""
        tensors = dict(self._program.tensors)
        copied: set[str] = set()
        for entry in zeros:
            if id(entry.tensor) in self._spare:
                continue
            name = self._names.get(id(entry.tensor))
            if name is None:
                raise UnsupportedModelError(
                    f"a budget cannot be met for {type(entry.module).__name__}.{entry.slot}: the model computes with "
                    "something made of it (weight standardisation, a cast), so its zeros cannot be followed; give an "
                    "amount, and leave such layers out with ignore="
                )
            if name in copied:
                tensors[name].detach().masked_fill_(entry.where, 0)
            else:
                tensors[name] = nn.Parameter(entry.tensor.detach().masked_fill(entry.where, 0))
                copied.add(name)
        return tensors

    def _flops(self, compiled: Compiled) -> float:
        if "flops" not in self._originals:
            self._originals["flops"] = count_flops(self._program)
        return _share(count_flops(compiled.lowered), self._originals["flops"])

    def _parameters(self, compiled: Compiled) -> float:
        return _share(count_parameters(compiled.lowered.tensors), count_parameters(self._program.tensors))

    def _time(self, compiled: Compiled) -> float:
        pruned = finish(compiled, type(self._model).__name__, check=False)
        return timed(self._model, pruned, self._args, self._kwargs)


def _share(after: float, before: float) -> float:
    return after / before if before else 1.0


def count_flops(program: Program) -> int:
    """FLOPs of one call on the captured inputs, by torch's own counter: see :func:`upscale.measure.flops`."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {name: fake.from_tensor(tensor.detach()) for name, tensor in program.tensors.items()}
    inputs = [fake.from_tensor(tensor) for tensor in program.inputs]
    counter = measure.flop_counter()
    with torch.no_grad(), fake, counter:
        interpret(program.graph, tensors, inputs)
    return int(counter.get_total_flops())


def timed(model: nn.Module, pruned: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Time of a call of ``pruned`` as a share of one of ``model``, with the threads that torch has now.

    The median over pairs of calls made one after the other: a busy machine slows both.
    """
    with quietly_evaluated(model), quietly_evaluated(pruned):
        calls = {"before": lambda *a: model(*a, **kwargs), "after": lambda *a: pruned(*a, **kwargs)}
        found = measure.timings(calls, args, runs=_ROUNDS, threads=None, seconds=_SECONDS)
    return statistics.median(after / before for before, after in zip(found["before"], found["after"], strict=True))


def choose_within(
    budget: Budget,
    costs: Costs,
    order: Sequence[tuple[int, int]],
    taken: int,
    zeros: Callable[[Sequence[tuple[int, int]]], list[Zeros]],
    must: bool,
) -> list[tuple[int, int]]:
    """The channels, (group, channel), that are masked to leave what ``budget`` says.

    ``order``: all that may go, first to last; ``taken``: how many of them are gone already. ``zeros``: what masking
    some of them zeroes. ``must``: whether a budget that cannot be met is an error; else the nearest choice is taken.

    Raises:
        BudgetError: no choice along ``order`` is within 1 % of the budget (10 % of a latency).
    """
    kind, tolerance = budget.kind, _TOLERANCE[budget.kind]
    if budget.left == 1 and not taken:
        return []
    with Waiting(f"masking to {budget}", Console(stderr=True)) as waiting:

        def cost(chosen: Sequence[int]) -> float:
            left = costs.left(kind, zeros([order[position] for position in chosen]))
            waiting.step(f"{kind} {max(left, 0):.3f}")
            return left

        search = Search(cost, budget.left, tolerance, _MOST[kind])
        found = search.run(taken, len(order), single=kind != "latency")
    if must and not found.met:
        raise BudgetError(_unreachable(budget, found, tolerance, len(order)))
    return [order[position] for position in found.chosen]


def _unreachable(budget: Budget, found: Found, tolerance: float, size: int) -> str:
    if found.left < 0:
        return f"{budget} cannot be met: whatever is masked, the output no longer depends on the input"
    nearest = f"the nearest that these masks reach is {budget.kind}={found.left:.4g}"
    if len(found.chosen) == size:
        advice = "with every channel masked that may be; try another side= or method=, or a shorter ignore="
    elif not found.chosen and found.left < budget.left:
        advice = "with nothing masked: zeros that the model has already, such as batch norms of weight 0, leave no more"
    else:
        advice = "as single channels are too large a step"
    return f"{budget} cannot be met within {100 * tolerance:g} %: {nearest}, {advice}. Nothing was masked"

"""Which channels a call of ``mask`` takes: by share or by budget, in one step or several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from .amounts import Budget, Request, comparable, shares
from .ranking import Group, quantiles, removal_order
from .zeroing import Zeros

if TYPE_CHECKING:
    from .budget import Costs

__all__ = ["Chooser", "Picked", "remembered"]

Picked = list[list[int]]  # for each group, its masked channels

_P = ParamSpec("_P")
_R = TypeVar("_R")
_M = TypeVar("_M")


def remembered(method: Callable[Concatenate[_M, _P], _R]) -> Callable[Concatenate[_M, _P], _R]:
    """Keep the last call of ``method``, so that it can be made again after weights have changed."""

    @functools.wraps(method)
    def called(self: Any, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        result = method(self, *args, **kwargs)
        self._score_again = functools.partial(method, self, *args, **kwargs)
        return result

    return called


@dataclass(frozen=True)
class Chooser:
    """The choice, given scores.

    ``parts``: the share that each group loses; in a budget, 0 for a group that is left alone. ``arranged``: from
    scores and a choice to the masks that keep each group's number (contiguous masks choose others than the lowest).
    ``rescaled``: whether scores of different layers are brought to one scale before they are compared. ``by_price``:
    whether a budget goes by score for what a channel costs. ``zeros``: what a choice zeroes. ``costs``: what it leaves,
    for budgets.
    """

    request: Request
    groups: Sequence[Group]
    parts: Sequence[float]
    is_global: bool
    rescaled: bool
    by_price: bool
    arranged: Callable[[Sequence[Tensor], Picked], Picked]
    zeros: Callable[[Iterable[list[int]]], list[Zeros]]
    costs: Costs | None

    def pick(self, scores: Sequence[Tensor], part: float, taken: Picked) -> Picked:
        """The channels masked after ``part`` of the way; those ``taken`` by an earlier step are among them."""
        if self.costs is not None:
            return self._within_budget(scores, part, taken)
        ranked = comparable(scores, taken, self.is_global and self.rescaled)
        parts = [1 - self.request.kept(1 - share, part) for share in self.parts]
        return self.arranged(scores, shares(self.groups, ranked, parts, self.is_global))

    def _within_budget(self, scores: Sequence[Tensor], part: float, taken: Picked) -> Picked:
        from .budget import choose_within  # the whole front end, loaded where a graph is needed

        budget = self.request.budget
        assert budget is not None and self.costs is not None
        order = self._order(scores, taken, budget.kind)

        def picked(chosen: Sequence[tuple[int, int]]) -> Picked:
            found: Picked = [[] for _ in self.groups]
            for g, channel in chosen:
                found[g].append(channel)
            return self.arranged(scores, found)

        aim = Budget(budget.kind, self.request.kept(budget.left, part))
        gone = sum(map(len, taken))
        return picked(
            choose_within(aim, self.costs, order, gone, lambda chosen: self.zeros(picked(chosen)), must=part == 1)
        )

    def _order(self, scores: Sequence[Tensor], taken: Picked, kind: str) -> list[tuple[int, int]]:
        """All channels that may go: by score, or by their rank's share of the layer, so that layers lose alike.

        Where scores are errors that add up, the least error for the cost goes first: a knapsack, filled greedily
        (Dantzig 1957, "Discrete-Variable Extremum Problems").
        """
        assert self.costs is not None
        if self.is_global and self.by_price:
            prices = self.costs.prices(kind, self.groups)
            scores = [score / price for score, price in zip(scores, prices, strict=True)]
        ranked = comparable(scores, taken, self.is_global and self.rescaled)
        if not self.is_global:
            ranked = [quantiles(group, score) for group, score in zip(self.groups, ranked, strict=True)]
        members = [g for g, share in enumerate(self.parts) if share > 0]
        order = removal_order([(self.groups[g], ranked[g]) for g in members])
        return [(members[k], channel) for k, channel in order]

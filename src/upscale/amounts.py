"""How much is asked for: amounts by layer, layers that are left alone, budgets, and schedules of several steps."""

from __future__ import annotations

import difflib
import fnmatch
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import InputError
from .mask_arguments import checked_amount, one_of, whole
from .ranking import Group, normalised, pick, quantiles

__all__ = [
    "Amount",
    "Budget",
    "Ignored",
    "Request",
    "Schedule",
    "checked_request",
    "group_shares",
    "matching",
    "shares",
]

Amount = float | Mapping[str, float]
Ignored = Iterable[str | nn.Module] | str | nn.Module
Schedule = Literal["geometric", "linear"]

#: What is masked where nothing is said. An object of its own, so that a budget can tell that no amount was given.
HALF = float("0.5")

BUDGETS = ("flops", "params", "latency")


@dataclass(frozen=True)
class Budget:
    """What the exported model may still cost: ``left`` of the original's ``kind``, ``0 < left <= 1``."""

    kind: str
    left: float

    def __str__(self) -> str:
        return f"{self.kind}={self.left:g}"


@dataclass(frozen=True)
class Request:
    """One call of ``mask``: an amount or a budget, and in how many steps it is reached."""

    amount: float | Mapping[str, float] | None
    budget: Budget | None
    steps: int
    schedule: Schedule

    def parts(self) -> Iterator[float]:
        """How far each step goes: the share of channels (or cost) kept after it is ``kept ** part`` of a geometric
        schedule, and ``1 - part * (1 - kept)`` of a linear one."""
        return (step / self.steps for step in range(1, self.steps + 1))

    def kept(self, kept: float, part: float) -> float:
        """What is kept after a part of the way to ``kept``."""
        if part == 1:
            return kept
        return kept**part if self.schedule == "geometric" else 1 - part * (1 - kept)

    def asked(self, part: float) -> dict[str, Any]:
        """What to ask of ``mask`` to go a part of the way: its ``amount``, or its budget."""
        if self.budget is not None:
            return {self.budget.kind: self.kept(self.budget.left, part)}
        assert self.amount is not None
        if part == 1:
            return {"amount": self.amount}
        if isinstance(self.amount, Mapping):
            return {"amount": {name: 1 - self.kept(1 - share, part) for name, share in self.amount.items()}}
        return {"amount": 1 - self.kept(1 - self.amount, part)}


def checked_request(amount: Any, flops: Any, params: Any, latency: Any, steps: Any, schedule: Any) -> Request:
    """Raises InputError for anything but one amount, or one budget, and a number of steps."""
    budgets = [
        Budget(kind, _checked_left(kind, value))
        for kind, value in zip(BUDGETS, (flops, params, latency), strict=True)
        if value is not None
    ]
    given = [*(["amount"] if amount is not HALF else []), *(budget.kind for budget in budgets)]
    if len(given) > 1:
        raise InputError(f"give one of amount, flops, params and latency, not {' and '.join(given)}")
    whole("steps", steps, 1)
    one_of("schedule", schedule, ("geometric", "linear"))
    if isinstance(amount, Mapping):
        amount = {_checked_pattern(pattern): _checked_share(pattern, share) for pattern, share in amount.items()}
    elif budgets:
        amount = None
    else:
        amount = checked_amount(amount)
    return Request(amount, budgets[0] if budgets else None, steps, schedule)


def _checked_left(kind: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
        raise InputError(f"{kind} is what is left of the original, a number above 0 and at most 1, not {value!r}")
    return float(value)


def _checked_pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise InputError(f"amount by layer is a dict from name patterns to numbers; {pattern!r} is no name")
    return pattern


def _checked_share(pattern: str, share: Any) -> float:
    try:
        return checked_amount(share)
    except InputError as error:
        raise InputError(f"amount of {pattern!r}: {error}") from None


# -- names ------------------------------------------------------------------------------------------------------------


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The layers that ``pattern`` names: by name, by a module that they are in, or by shell-style wildcards.

    Raises:
        InputError: there are none; the message has the nearest names.
    """
    found = [n for n in names if n == pattern or n.startswith(pattern + ".") or fnmatch.fnmatchcase(n, pattern)]
    if not found:
        modules = {n.rsplit(".", k)[0] for n in names for k in range(n.count(".") + 1)}
        near = difflib.get_close_matches(pattern, [*names, *sorted(modules - set(names))], n=3, cutoff=0.4)
        hint = f"the nearest names are {', '.join(near)}" if near else f"layers are {', '.join([*names][:5])}, ..."
        raise InputError(f"{pattern!r} matches no convolution or linear layer of the model; {hint}")
    return found


def ignored_layers(ignore: Ignored, model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers that ``ignore`` says to leave alone: names, patterns and modules, one or several."""
    items = [ignore] if isinstance(ignore, (str, nn.Module)) else ignore
    if not isinstance(items, Iterable):
        raise InputError(f"ignore must be a list of layer names, patterns or modules, not {ignore!r}")
    found: set[str] = set()
    for item in items:
        if isinstance(item, nn.Module):
            found.update(_within(item, model, layers))
        elif isinstance(item, str):
            found.update(matching(item, layers))
        else:
            raise InputError(f"ignore holds {item!r}; it takes layer names, patterns and modules")
    return found


def _within(module: nn.Module, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    if all(module is not other for other in model.modules()):
        raise InputError(f"ignore holds a {type(module).__name__} that is not part of the model")
    inside = {id(part) for part in module.modules()}
    weights = {id(p) for p in module.parameters()}
    found = [n for n, layer in layers.items() if id(layer) in inside or id(layer._parameters.get("weight")) in weights]
    if not found:
        raise InputError(f"ignore holds a {type(module).__name__} in which there is no layer to mask")
    return found


# -- shares -----------------------------------------------------------------------------------------------------------


def group_shares(
    amount: Amount,
    groups: Sequence[Group],
    layers: Collection[str],
    ignored: Collection[str],
    skipped: Mapping[str, str],
) -> list[float]:
    """The share of its channels that each group loses.

    The last pattern that matches a layer says its amount; where none does it loses nothing. A group of several layers
    loses the least that is asked for any of them, among those that are named.

    Raises:
        InputError: a pattern matches no layer, or only layers that cannot be masked.
    """
    if not isinstance(amount, Mapping):
        named = dict.fromkeys(layers, amount)
    else:
        named = {}
        for pattern, share in amount.items():
            found = matching(pattern, layers)
            if share > 0 and all(name in skipped for name in found):
                raise InputError(f"amount of {pattern!r}: {found[0]} cannot be masked: {skipped[found[0]]}")
            named.update(dict.fromkeys(found, share))
    shares = []
    for group in groups:
        asked = [named[name] for name in group.members if name in named]
        alone = any(name in ignored for name in group.members)
        shares.append(min(asked) if asked and not alone else 0.0)
    return shares


def shares(
    groups: Sequence[Group], scores: Sequence[Tensor], parts: Sequence[float], is_global: bool
) -> list[list[int]]:
    """The lowest channels of each group, by its share, so that each of its layers loses that share as nearly as can be;
    with ``is_global`` groups of one share are ranked together."""
    if not is_global:
        return [pick([(g, quantiles(g, s))], part)[0] for g, s, part in zip(groups, scores, parts, strict=True)]
    picked: list[list[int]] = [[] for _ in groups]
    for part in sorted(set(parts)):
        members = [k for k, other in enumerate(parts) if other == part]
        for k, channels in zip(members, pick([(groups[k], scores[k]) for k in members], part), strict=True):
            picked[k] = channels
    return picked


def comparable(scores: Sequence[Tensor], taken: Sequence[Sequence[int]], rescaled: bool) -> list[Tensor]:
    """Scores to rank by: on one scale if ``rescaled``, and lowest for channels that are ``taken`` already."""
    found = []
    for score, channels in zip(scores, taken, strict=True):
        ranked = normalised(score) if rescaled else score.clone()
        ranked[torch.tensor(list(channels), dtype=torch.int64)] = float("-inf")
        found.append(ranked)
    return found

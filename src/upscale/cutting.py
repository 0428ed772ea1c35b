"""What is cut from a layer's weight: rows and columns as planned, zeros where the plan says zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import large
from .flow.effects import Contract
from .flow.groups import as_rows, as_transposed
from .plan import Contraction

__all__ = ["cut_weight"]


def cut_weight(weight: torch.Tensor, effect: Contract, cut: Contraction) -> torch.Tensor:
    """The new weight of a layer, sharing nothing with the old one."""
    if effect.groups > 1 and cut.columns is not None:
        return large.in_format_of(weight, _grouped(weight, effect, cut))
    chosen: dict[int, Sequence[int]] = {} if effect.groups > 1 else {effect.weight_out: cut.rows}
    if cut.columns is not None and effect.weight_in is not None:
        chosen[effect.weight_in] = cut.columns
    new = large.cut(weight, chosen)
    _zero(new, effect.weight_out, _places(cut.rows, cut.zero_rows))
    if effect.weight_in is not None:
        _zero(new, effect.weight_in, _places(cut.columns or (), cut.blank))
    return new


def _grouped(weight: torch.Tensor, effect: Contract, cut: Contraction) -> torch.Tensor:
    """Of a grouped layer: the kept rows, each with the columns of its own group."""
    transposed = effect.weight_out == 1
    table = as_rows(weight, effect.groups) if transposed else weight  # (out, in / groups, ...)
    width, device = table.shape[1], weight.device
    rows, columns = torch.tensor(cut.rows), torch.tensor(cut.columns).view(cut.groups, -1)
    _, group = torch.unique(rows // (len(table) // effect.groups), return_inverse=True)
    mine = columns[group]
    new = table.index_select(0, rows.to(device))
    new = new[torch.arange(len(rows), device=device)[:, None], (mine % width).to(device)]
    blank = torch.zeros(effect.groups * width, dtype=torch.bool)
    blank[list(cut.blank)] = True
    new[blank[mine].to(device)] = 0.0
    _zero(new, 0, _places(cut.rows, cut.zero_rows))
    return as_transposed(new, cut.groups).contiguous() if transposed else new


def _places(kept: Sequence[int], zero: Sequence[int]) -> list[int]:
    zeros = set(zero)
    return [i for i, item in enumerate(kept) if item in zeros] if zeros else []


def _zero(tensor: torch.Tensor, dim: int, places: list[int]) -> None:
    if places:
        tensor.index_fill_(dim, torch.tensor(places, device=tensor.device), 0.0)

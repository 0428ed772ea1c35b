"""Where the zeros of a mask go: which entries of which parameters, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .channels import Side, channel_count, entries_of, norm_per_channel
from .errors import InputError, UnsupportedModelError

__all__ = ["Zeros", "put_back_on_error", "refuse_computed", "refuse_regrowth", "write", "zero_channels", "zeros_of"]


@dataclass(frozen=True, eq=False)
class Zeros:
    """Entries of one parameter: ``where`` is bool, broadcastable to its shape, True at every entry that is zeroed."""

    module: nn.Module
    slot: str  # the parameter's name in the module
    where: Tensor

    @property
    def tensor(self) -> Tensor:
        """The parameter itself."""
        parameter = self.module._parameters[self.slot]
        assert parameter is not None
        return parameter


def zeros_of(layer: nn.Module, side: Side, channels: Tensor, norms: Sequence[nn.Module]) -> list[Zeros]:
    """What masking ``channels`` of ``layer`` zeroes.

    ``channels``: int64 indices. On the output side a channel's bias goes with it, and its weight and bias in
    ``norms``, the batch norms that directly follow.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    chosen = torch.zeros(channel_count(layer, side), dtype=torch.bool, device=weight.device)
    chosen[channels.to(weight.device)] = True
    found = [Zeros(layer, "weight", entries_of(layer, side, chosen))]
    if side == "output":
        for module, slot in [(layer, "bias"), *((norm, slot) for norm in norms for slot in ("weight", "bias"))]:
            row = module._parameters.get(slot)
            if row is not None:
                found.append(Zeros(module, slot, chosen.to(row.device)))
    return found


def zero_channels(model: nn.Module, layers: Iterable[nn.Module]) -> list[Zeros]:
    """What is zero already: channels of either side of ``layers`` and of the model's batch norms, with the biases of
    the output side where these are zero too."""
    found = []
    for layer in layers:
        for side in get_args(Side):
            nothing = norm_per_channel(layer, side, 1) == 0
            entries = zeros_of(layer, side, nothing.nonzero().flatten(), [])
            found += [Zeros(e.module, e.slot, e.where & (e.tensor.detach() == 0)) for e in entries]
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine):
        nothing = (norm.weight.detach() == 0) & (norm.bias.detach() == 0)
        found += [Zeros(norm, slot, nothing) for slot in ("weight", "bias")]
    return [entry for entry in found if bool(entry.where.any())]


def write(zeros: Iterable[Zeros]) -> None:
    """Write the zeros on the parameters' own storage."""
    with torch.no_grad():
        for entry in zeros:
            entry.tensor.masked_fill_(entry.where, 0)


@contextmanager
def put_back_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give ``tensors`` their present values back if anything is raised inside, an interrupt included."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
        raise


def refuse_regrowth(
    layers: Mapping[str, nn.Module], side: Side, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """A mask cannot keep a channel whose weights an earlier mask has overwritten with zeros."""
    for name, channels in after.items():
        back = torch.tensor(
            sorted({*before.get(name, torch.arange(0)).tolist()} - {*channels.tolist()}), dtype=torch.int64
        )
        gone = [c for c in back.tolist() if not _any_weight(layers[name], side, c)]
        if gone:
            raise InputError(
                f"the mask of {name} keeps channels that were zeroed for good before ({', '.join(map(str, gone[:5]))}"
                f"{', ...' if len(gone) > 5 else ''}): their weights are gone. mask(permanent=False) makes masks that "
                "can be taken back"
            )


def _any_weight(layer: nn.Module, side: Side, channel: int) -> bool:
    zeros = zeros_of(layer, side, torch.tensor([channel]), [])[0]
    return bool((zeros.tensor.detach() * zeros.where).any())


def refuse_computed(name: str, layer: nn.Module, slots: Iterable[str]) -> None:
    """A weight that is computed anew at every call cannot be zeroed in place."""
    for slot in slots:
        if slot in layer._parameters:
            continue
        advice = "torch.nn.utils.prune.remove"
        if parametrize.is_parametrized(layer, slot):
            advice = "torch.nn.utils.parametrize.remove_parametrizations"
        raise UnsupportedModelError(
            f"{name}.{slot} is not a parameter but computed from others (a parametrisation, "
            f"torch.nn.utils.prune, weight norm), so zeros written to it would be lost. Make it one "
            f"first, for instance with {advice}."
        )

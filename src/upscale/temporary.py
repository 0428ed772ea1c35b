"""Masks that are not written into the weights but computed at every call, so that zeros survive training.

They are parametrisations (``torch.nn.utils.parametrize``): an optimiser moves the value underneath, and what the layer
computes with is that value with zeros at the masked entries. Their gradient there is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import UnsupportedModelError
from .zeroing import Zeros, put_back_on_error

__all__ = ["ChannelMask", "Lifted", "again", "fold", "held", "lift", "put_on"]


class ChannelMask(nn.Module):
    """The parametrisation. ``kept``: bool buffer, broadcastable to the parameter's shape; False entries are zero."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, value: Tensor) -> Tensor:
        return value.masked_fill(~self.kept, 0)


@dataclass(frozen=True, eq=False)
class Lifted:
    """A temporary mask that was taken off, to be put on again."""

    module: nn.Module
    slot: str
    mask: ChannelMask


def put_on(model: nn.Module, zeros: Iterable[Zeros]) -> None:
    """Register a mask for every parameter in ``zeros``, in every module that holds it (tied weights)."""
    masked: dict[int, tuple[Tensor, Tensor]] = {}
    for entry in zeros:
        parameter = entry.tensor
        where = masked[id(parameter)][1] | entry.where if id(parameter) in masked else entry.where
        masked[id(parameter)] = (parameter, where)
    holders = [
        (module, slot, masked[id(parameter)][1])
        for module in model.modules()
        for slot, parameter in module._parameters.items()
        if id(parameter) in masked
    ]
    again([Lifted(module, slot, ChannelMask(~where)) for module, slot, where in holders])


def again(lifted: Iterable[Lifted]) -> None:
    """Put masks (back) on."""
    for entry in lifted:
        entry.mask.train(entry.module.training)
        parametrize.register_parametrization(entry.module, entry.slot, entry.mask)


def lift(model: nn.Module) -> list[Lifted]:
    """Take all temporary masks off; the parameters are the same objects as before, with their unmasked values.

    Raises:
        UnsupportedModelError: another parametrisation lies on the same parameter. Nothing is changed then.
    """
    found = []
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for slot, chain in module.parametrizations.items():
            masks = [entry for entry in chain if isinstance(entry, ChannelMask)]
            if masks and len(chain) > 1:
                raise UnsupportedModelError(
                    f"{path}.{slot} has another parametrisation beside its mask: remove that one first, with "
                    "torch.nn.utils.parametrize.remove_parametrizations"
                )
            found += [Lifted(module, slot, mask) for mask in masks]
    for entry in found:
        parametrize.remove_parametrizations(entry.module, entry.slot, leave_parametrized=False)
    return found


@contextmanager
def held(model: nn.Module, tensors: Callable[[], Iterable[Tensor]]) -> Iterator[list[Lifted]]:
    """Without temporary masks inside; if anything is raised they are put on again, and put back is what ``tensors``
    gives once they are off."""
    lifted = lift(model)
    try:
        with put_back_on_error(tensors()):
            yield lifted
    except BaseException:
        lift(model)  # new ones may be on in part
        again(lifted)
        raise


def fold(model: nn.Module) -> int:
    """Write the zeros of all temporary masks into the parameters and take the masks off. Returns how many."""
    lifted = lift(model)
    with torch.no_grad():
        for entry in lifted:
            parameter = entry.module._parameters[entry.slot]
            assert parameter is not None
            parameter.masked_fill_(~entry.mask.kept, 0)
    return len(lifted)

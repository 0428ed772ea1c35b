"""The paper's two-line face: ``MaskingManager`` (in :mod:`upscale.masking`) and ``PruningManager``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .accept import unwrap
from .capture import capture
from .errors import InputError
from .exporting import become, check_finite, check_replaceable, compile_program, finish, take_training_flags
from .flow import analyse_flow
from .mask_groups import find_layers
from .masks import checked, grown, zeroed_by_name
from .plan import Mode, Target
from .program import Program
from .raising import raise_program
from .setting import checked_target
from .temporary import put_on
from .zeroing import zero_channels


class PruningManager:
    """Remove masked channels from a model, in place (Wan et al. 2023, arXiv 2307.08771).

    ``PruningManager(model).compute([x]).prune()``: the object ``model`` itself becomes the smaller model, after it has
    been verified. It is then a ``torch.fx.GraphModule``: no longer an instance of its class, without that class's
    methods, and optimisers made before it must be made again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        check_replaceable(self._model)
        self._captured: Program | None = None
        self._masked: Program | None = None
        self._only: Mapping[str, torch.Tensor] | None = None
        self._reorder = True

    def compute(
        self,
        inputs: Any,
        pruned_inputs: Iterable[tuple[str, int]] | None = None,
        pruned_outputs: Iterable[tuple[str, int]] | None = None,
        constrained: bool = False,
        reorder_producer: bool = True,
        reorder_consumer: bool = True,
    ) -> PruningManager:
        """Find what can go. Returns ``self``.

        Args:
            inputs: the example call: a list or tuple of positional inputs, a tensor, or a dict of keyword inputs.
            pruned_inputs, pruned_outputs: channels to remove as (parameter name, channel) pairs, whatever their
                weights hold. Where both are None, channels are removed whose weights are zero.
            constrained: grow the pruned set until all layers on a shared tensor agree, so that nothing is copied.
            reorder_producer, reorder_consumer: whether the layers that write a tensor, and those that read it, may
                have their channels in another order. A tensor has one order for both, so channels are reordered
                only where both are True (the default); if either is False, every tensor keeps the original order,
                and a layer that reads channels with gaps between them gathers them. (The paper's interface has
                both; here they are one switch.)

        Raises:
            InputError, CaptureError, UnknownChannelError, NonFiniteError: see each.
        """
        args, kwargs = _call_of(inputs)
        program = capture(self._model, args, kwargs)
        check_finite(program)
        self._captured = program
        self._only = None
        if pruned_inputs is not None or pruned_outputs is not None:
            named_in, named_out = checked("pruned_inputs", pruned_inputs), checked("pruned_outputs", pruned_outputs)
            program, self._only = zeroed_by_name(program, named_in, named_out)
        if constrained:
            program, self._only = grown(program, analyse_flow(program, self._only, partial=False))
        self._masked = program
        self._reorder = bool(reorder_producer and reorder_consumer)
        return self

    def prune(self, baseline: bool = False, target: Target | None = None) -> Any:
        """Turn the model into the pruned one, after verification, and return it (the same object).

        ``baseline=True`` keeps the original order and reads subsets channel by channel, as the paper's baseline does.
        ``target``: what the model will run on, where the example does not say it; see :class:`upscale.Target`. Its
        memory format should be that of the inputs given to :meth:`compute`.

        Raises:
            NothingToPruneError, ConstantOutputError, VerificationError: the model is untouched.
        """
        mode: Mode = "baseline" if baseline else "auto"
        target = checked_target(target)
        compiled = compile_program(self._computed(), mode, only=self._only, reorder=self._reorder, target=target)
        pruned = finish(compiled, type(self._model).__name__)
        take_training_flags(self._model, pruned)
        self._captured = self._masked = None
        return become(self._model, pruned)

    def trace(self) -> torch.fx.GraphModule:
        """The captured model as an ordinary module, nothing masked or removed: what pruning starts from."""
        self._computed()
        assert self._captured is not None
        return _copied(self._captured, type(self._model).__name__)

    def get_mock_model(self, masks_on: bool = False) -> torch.fx.GraphModule:
        """The model with the masks applied, unpruned in shape and trainable: what pruning must reproduce.

        ``masks_on``: keep channels of convolutions, linear layers and batch norms that are zero at zero while it is
        trained, by parametrisations as those of ``MaskingManager.mask(permanent=False)``; :func:`upscale.export` takes
        it as it is afterwards. Else the zeros are plain values, which an optimiser moves.
        """
        mock = _copied(self._computed(), type(self._model).__name__)
        if masks_on:
            put_on(mock, zero_channels(mock, find_layers(mock).values()))
        return mock

    def _computed(self) -> Program:
        if self._masked is None:
            raise InputError("call compute(inputs) first, for example PruningManager(model).compute([x]).prune()")
        return self._masked


def _call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (list, tuple)):
        return tuple(inputs), {}
    raise InputError(f"inputs must be a list of example inputs, such as [x], not {type(inputs).__name__}")


def _copied(program: Program, name: str) -> torch.fx.GraphModule:
    """An ordinary module of the program's size that shares no tensor with the user's model."""
    tensors = {k: _copy(t) for k, t in program.tensors.items()}
    return raise_program(replace(program, tensors=tensors), class_name=name)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    new = tensor.detach().clone()
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


__all__ = ["PruningManager"]

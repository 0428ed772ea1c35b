"""What of a pruned module is not in its recipe: tensors, which of them are one, flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upscale.errors import FileError, MismatchError
from upscale.recipe.describe import ADJUSTABLE, ModuleFact
from upscale.recipe.example import are_dense, is_dense

__all__ = ["State", "apply_state", "contents", "state_of"]


@dataclass(frozen=True)
class State:
    """``aliases``: name -> the name under which its tensor is stored. ``strides``: of tensors that do not lie in
    memory dimension by dimension. ``frozen``: parameters that need no gradient. ``training``: modules in train mode."""

    aliases: dict[str, str]
    strides: dict[str, tuple[int, ...]]
    frozen: tuple[str, ...]
    training: tuple[str, ...]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name, persistent or not."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor of a module under its first name, and for every other name that first one."""
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named_tensors(model):
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        chosen = first.setdefault(place if tensor.numel() else (name,), name)
        if chosen == name:
            tensors[name] = tensor.detach()
        else:
            aliases[name] = chosen
    return tensors, aliases


def state_of(model: nn.Module) -> tuple[State, dict[str, Tensor]]:
    """State and tensors of a module. The tensors are the module's own."""
    tensors, aliases = contents(model)
    strides = {
        name: tuple(tensor.stride())
        for name, tensor in tensors.items()
        if not tensor.is_contiguous() and is_dense(tensor)
    }
    frozen = tuple(name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)
    training = tuple(path for path, module in model.named_modules(remove_duplicate=False) if module.training)
    return State(aliases, strides, frozen, training), tensors


def apply_state(
    model: nn.Module, state: State, tensors: Mapping[str, Tensor], modules: tuple[ModuleFact, ...], device: torch.device
) -> None:
    """Give a rebuilt module the stored tensors, flags and adjustable settings.

    Raises:
        MismatchError: the module has other tensors than those stored, or of another shape.
    """
    _check_names(model, state, tensors)
    placed: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        source = state.aliases.get(name, name)
        if tensor.shape != tensors[source].shape:
            raise MismatchError(
                f"{name} has shape {tuple(tensors[source].shape)} in the file and {tuple(tensor.shape)} here"
            )
        if source not in placed:
            placed[source] = _placed(tensors[source], state.strides.get(source), device)
    frozen = set(state.frozen)
    for module_path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_path}." if module_path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.data = placed[state.aliases.get(prefix + name, prefix + name)]
                trainable = parameter.is_floating_point() or parameter.is_complex()
                parameter.requires_grad_(trainable and prefix + name not in frozen)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = placed[state.aliases.get(prefix + name, prefix + name)]
    _apply_flags(model, state, modules)


def _check_names(model: nn.Module, state: State, tensors: Mapping[str, Tensor]) -> None:
    here, stored = [name for name, _ in named_tensors(model)], {*tensors, *state.aliases}
    if missing := [name for name in here if name not in stored]:
        raise MismatchError(f"the file holds no tensor {missing[0]!r}, which the rebuilt model has")
    if extra := [name for name in [*tensors, *state.aliases] if name not in set(here)]:
        raise MismatchError(f"the file holds a tensor {extra[0]!r}, which the rebuilt model lacks")
    if wrong := [name for name, source in state.aliases.items() if source not in tensors]:
        raise FileError(f"{wrong[0]!r} shares the tensor {state.aliases[wrong[0]]!r}, which it does not hold")


def _placed(tensor: Tensor, strides: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """A copy in memory of its own: what was read may be a window on the file."""
    if strides is None:
        strides = torch.empty(tensor.shape, device="meta").stride()
    elif not are_dense(tuple(tensor.shape), strides):
        raise FileError(f"a tensor of shape {tuple(tensor.shape)} cannot have the strides {strides}")
    return torch.empty_strided(tuple(tensor.shape), strides, dtype=tensor.dtype, device=device).copy_(tensor)


def _apply_flags(model: nn.Module, state: State, modules: tuple[ModuleFact, ...]) -> None:
    training, settings = set(state.training), {fact.path: fact.settings for fact in modules}
    for path, module in model.named_modules(remove_duplicate=False):
        module.training = path in training
        for name, kinds in ADJUSTABLE.items():
            text = settings.get(path, {}).get(name)
            if text is not None and name in vars(module):
                setattr(module, name, _setting(text, kinds, f"{name} of {path}"))


_WORDS = {"None": None, "True": True, "False": False}


def _setting(text: str, kinds: tuple[type, ...], where: str) -> object:
    try:
        value: object = _WORDS[text] if text in _WORDS else float(text) if "." in text or "e" in text else int(text)
    except ValueError as error:
        raise FileError(f"{where} is {text[:40]!r}") from error
    if type(value) not in kinds:
        raise FileError(f"{where} is {text[:40]!r}")
    return value

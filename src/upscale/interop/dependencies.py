"""Torch-Pruning's dependency graph of a model, built so that the model is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..observe import quietly_evaluated

__all__ = ["dependency_graph", "reads", "writes"]


def dependency_graph(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A ``torch_pruning.DependencyGraph`` (Fang et al. 2023, arXiv 2301.12900), traced by one call of ``model``.

    Raises:
        InputError: Torch-Pruning is not installed, or cannot trace the model.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise InputError('this needs Torch-Pruning: pip install "upscale-pruning[torch-pruning]"') from error
    with quietly_evaluated(model), _differentiable(model):
        try:
            return torch_pruning.DependencyGraph().build_dependency(
                model, args, forward_fn=lambda called, _: called(*args, **kwargs), verbose=False
            )
        except Exception as error:
            raise InputError(f"Torch-Pruning cannot trace {type(model).__name__}: {error}") from error


def reads(dep: Any) -> bool:
    """Whether an item of a group prunes input channels alone (a batch norm's or depthwise convolution's are both)."""
    return bool(dep.handler.__name__ == "prune_in_channels")


def writes(dep: Any) -> bool:
    """Whether an item of a group prunes output channels."""
    return bool(dep.handler.__name__ == "prune_out_channels")


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients on, for frozen parameters too: Torch-Pruning finds layers by what autograd records."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    hooks = [(module, dict(module._forward_hooks)) for module in model.modules()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, before in hooks:  # a forward pass that raises leaves Torch-Pruning's behind
            for key in [key for key in module._forward_hooks if key not in before]:
                del module._forward_hooks[key]

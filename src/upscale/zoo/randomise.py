"""Random values where a fresh model is too regular to be tried: a wrong constant must show in the outputs.

In a freshly built network batch norms do nothing, biases are zero, and in many the signal dies on the way, so that
the output is the same for every input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .subject import Subject

_TINY = 1e-3  # layer scales start at 1e-5 or so


def randomise(subject: Subject, seed: int = 0) -> None:
    """Give every statistic, affine parameter, bias and constant parameter of the model a random value, in place.

    Other weights keep their initial values, made larger where they are too small to keep the signal up (a standard
    deviation of less than one by the root of the fan-in). Batch norms get the statistics of the example, disturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in subject.model.modules():
            _randomise_statistics(module, generator)
            norm = _is_norm(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.numel():
                    _randomise_parameter(name, parameter, norm, generator)
                    if name == "weight" and not isinstance(module, nn.Embedding):
                        _keep_up(parameter)
        _calibrate(subject, generator)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _randomise_statistics(module: nn.Module, generator: torch.Generator) -> None:
    buffers = dict(module.named_buffers(recurse=False))
    if "running_var" not in buffers:
        return
    for name, buffer in buffers.items():
        if name in ("running_mean", "bias"):  # a frozen batch norm has buffers only
            _normal(buffer, 0.5, generator)
        elif name in ("running_var", "weight"):
            _uniform(buffer, 0.5, 2.0, generator)


def _randomise_parameter(name: str, parameter: Tensor, norm: bool, generator: torch.Generator) -> None:
    flat = bool((parameter == parameter.flatten()[0]).all())
    flat = flat or (parameter.numel() > 1 and float(parameter.abs().max()) < _TINY)
    if "bias" in name and parameter.ndim == 1:
        _normal(parameter, 0.5 if norm else 0.3, generator)
    elif flat and parameter.ndim == 2:  # a zeroed head, a table of position biases
        _normal(parameter, 1 / math.sqrt(parameter.shape[1]), generator)
    elif flat or (norm and parameter.ndim == 1):
        _uniform(parameter, 0.5, 1.5, generator)


def _keep_up(weight: Tensor) -> None:
    """Scale a matrix or a filter up until its outputs are as large as its inputs."""
    if weight.ndim < 2 or weight.numel() < 2:
        return
    wanted, found = 1 / math.sqrt(weight[0].numel()), float(weight.std())
    if 0 < found < wanted:
        weight.mul_(wanted / found)


def _calibrate(subject: Subject, generator: torch.Generator) -> None:
    """Give batch norms the statistics of the example, disturbed; random ones stay where the model refuses."""
    norms: list[Any] = [module for module in subject.model.modules() if _has_statistics(module)]
    saved = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    try:
        with _learning(norms):
            subject.call(subject.model)
    except Exception:  # a model that cannot run so is tried with random statistics
        for norm, (mean, variance) in zip(norms, saved, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        return
    for norm in norms:
        mean, variance = norm.running_mean, norm.running_var
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64).to(mean)
        factor = 0.5 + 1.5 * torch.rand(mean.shape, generator=generator, dtype=torch.float64).to(mean)
        mean.add_(0.3 * noise * variance.sqrt())
        variance.add_(0.01 * variance.mean() + 1e-4).mul_(factor)  # no channel is divided by next to nothing


def _has_statistics(module: nn.Module) -> bool:
    tensors = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return all(isinstance(tensor, Tensor) for tensor in tensors) and hasattr(module, "momentum")


@contextlib.contextmanager
def _learning(norms: list[Any]) -> Iterator[None]:
    """These batch norms alone in training mode, keeping the statistics of the last batch only."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.training, norm.momentum = False, momentum


def _normal(tensor: Tensor, scale: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)


def _uniform(tensor: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

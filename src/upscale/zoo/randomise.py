"""Random values where a fresh model is too regular to be tried: a wrong constant must show in the outputs.

In a freshly built network batch norms do nothing, biases are zero, and in many the signal dies on the way, so that
the output is the same for every input.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .subject import Subject, batch_of, rebatched

_EXAMPLES, _VALUES = 16, 3_200_000  # statistics are taken of so many examples, or values of inputs
_TINY = 1e-3  # layer scales start at 1e-5 or so


def randomise(subject: Subject, seed: int = 0) -> None:
    """Give every statistic, affine parameter, bias and constant parameter of the model a random value, in place.

    Other weights keep their initial values, made larger where they are too small to keep the signal up (a standard
    deviation of less than one by the root of the fan-in). Batch norms get statistics that fit, disturbed.
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
    calibrate(subject, seed)


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


def calibrate(subject: Subject, seed: int = 0) -> None:
    """Give batch norms the statistics of what they see of random inputs, disturbed, one after the other.

    A norm further on sees the disturbed results, so that sizes do not drift from layer to layer. Call it again where
    weights have changed much: rounding grows with sizes.
    """
    norms = [module for module in subject.model.modules() if _has_statistics(module)]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        for norm in norms:
            hook = norm.register_forward_pre_hook(lambda norm, args: _disturb(norm, args, generator))
            stack.callback(hook.remove)
        for inputs in (rebatched(subject.inputs, _enough(subject), seed), subject.inputs):
            with contextlib.suppress(Exception):  # a model that does not run says so itself, later
                subject.call(subject.model, inputs)
                return


def _has_statistics(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var"))


def _enough(subject: Subject) -> int:
    """So many examples that statistics mean something, if they are small."""
    leaves = pytree.tree_leaves(subject.inputs)
    values = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
    batch = max(batch_of(subject.inputs), 1)
    return max(batch, min(_EXAMPLES, _VALUES * batch // max(values, 1)))


def _disturb(norm: Any, args: tuple[Any, ...], generator: torch.Generator) -> None:
    """Statistics of the first argument: the mean moved by a third of a deviation, the variance two to eight times.

    With the variance itself, a deep random network is chaotic: rounding grows from layer to layer till it shows.
    """
    value, mean, variance = args[0], norm.running_mean, norm.running_var
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != mean.numel():
        return
    others = [dim for dim in range(value.ndim) if dim != 1]
    middle, found = value.mean(others), value.var(others, correction=0)
    # No channel is blown up more than the average one: a few examples may agree in it by chance, and then other inputs
    # would grow from layer to layer, and rounding with them.
    found = torch.maximum(found.clamp(min=float(found.mean())), middle.square() / 10) + 1e-4
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64).to(mean)
    factor = 2.0 + 6.0 * torch.rand(mean.shape, generator=generator, dtype=torch.float64).to(mean)
    mean.copy_(middle + 0.3 * noise * found.sqrt())
    variance.copy_(found * factor)


def _normal(tensor: Tensor, scale: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)


def _uniform(tensor: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

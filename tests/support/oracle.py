"""What the tests mean by "the same": randomised statistics, relative error on nested outputs, hashes of a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every statistic, affine parameter, bias and all-zero parameter of ``model`` a random value, in place.

    Freshly built networks have batch norms that do nothing and biases of zero, so a wrong constant would go unseen.
    Weights of layers keep their initial values, but for those that are zero or one everywhere (layer scales, class
    tokens, ViT's head). Variances end up in [0.5, 2].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _NORMS):
                if getattr(module, "running_mean", None) is not None:
                    normal(module.running_mean, 0.5)  # type: ignore[arg-type]
                    uniform(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
                if module.weight is not None:
                    uniform(module.weight, 0.5, 1.5)
                if module.bias is not None:
                    normal(module.bias, 0.5)
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    if not parameter.is_floating_point() or parameter.numel() == 0:
                        continue
                    flat = bool((parameter == parameter.flatten()[0]).all())
                    small = parameter.numel() > 1 and parameter.abs().max() < 1e-3  # layer scales start at 1e-6
                    if "bias" in name and parameter.dim() == 1:
                        normal(parameter, 0.3)
                    elif (flat or small) and parameter.dim() == 2:  # a zeroed head: any sensible weight
                        normal(parameter, parameter.shape[1] ** -0.5)
                    elif flat or small:
                        uniform(parameter, 0.5, 1.5)
    return model


def leaves(value: Any, path: str = "out") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` of a nested output; containers yield their own type so that structures can be compared."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield path, (type(value), tuple(value))
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, type(value)
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, (tuple, list)):
        yield path, (type(value), len(value))
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def relative_error(a: Any, b: Any) -> float:
    """Largest ``max|a-b| / max|a|`` over the tensors of two nested outputs, finite entries only.

    Structure, shapes, dtypes and the pattern of non-finite entries must be the same: AssertionError otherwise.
    """
    left, right = list(leaves(a)), list(leaves(b))
    assert [path for path, _ in left] == [path for path, _ in right], f"output structure differs: {left} / {right}"
    worst = 0.0
    for (path, x), (_, y) in zip(left, right, strict=True):
        if not isinstance(x, torch.Tensor):
            assert type(x) is type(y) and x == y, f"{path}: {x!r} became {y!r}"
            continue
        assert isinstance(y, torch.Tensor), f"{path}: a tensor became {y!r}"
        assert x.shape == y.shape, f"{path}: shape {tuple(x.shape)} became {tuple(y.shape)}"
        assert x.dtype == y.dtype, f"{path}: {x.dtype} became {y.dtype}"
        worst = max(worst, _tensor_error(path, x.detach(), y.detach()))
    return worst


def _tensor_error(path: str, x: torch.Tensor, y: torch.Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    finite = torch.isfinite(x)
    assert torch.equal(finite, torch.isfinite(y)), f"{path}: non-finite entries differ"
    assert torch.equal(torch.isnan(x), torch.isnan(y)), f"{path}: NaN entries differ"
    odd = ~finite & ~torch.isnan(x)
    assert torch.equal(x[odd], y[odd]), f"{path}: infinite entries differ"
    if not bool(finite.any()):
        return 0.0
    difference = (x[finite] - y[finite]).abs().max().item()
    scale = x[finite].abs().max().item()
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


def rebatch(value: Any, batch: int, seed: int) -> Any:
    """Random inputs like ``value`` whose first dimensions are ``batch`` (integers stay within the range seen)."""
    generator = torch.Generator().manual_seed(seed)

    def one(item: Any) -> Any:
        if isinstance(item, Mapping):
            return type(item)({key: one(part) for key, part in item.items()})  # type: ignore[call-arg]
        if isinstance(item, (tuple, list)):
            return type(item)(one(part) for part in item)
        if not isinstance(item, torch.Tensor) or item.dim() == 0:
            return item
        shape = (batch, *item.shape[1:])
        if item.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(item)
        low, high = int(item.min()), int(item.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(item)

    return one(value)


def check_equal(
    masked: nn.Module,
    exported: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    batches: Sequence[int] = (1, 2, 3, 5),
    tol: float = 1e-10,
    seed: int = 0,
) -> float:
    """Assert that both modules agree on ``inputs`` and on random inputs of the given batch sizes; the worst error.

    Both run in whatever mode they are in. The first dimension of every input tensor must be the batch.
    """
    named = dict(kwargs or {})
    trials: list[tuple[str, Any, Any]] = [("the given inputs", inputs, named)]
    trials += [
        (f"batch {batch}", rebatch(tuple(inputs), batch, seed + 2 * i + 1), rebatch(named, batch, seed + 2 * i + 2))
        for i, batch in enumerate(batches)
    ]
    worst = 0.0
    with torch.no_grad():
        for label, args, keywords in trials:
            error = relative_error(masked(*args, **keywords), exported(*args, **keywords))
            assert error <= tol, f"relative error {error:.3g} > {tol:g} at {label}"
            worst = max(worst, error)
    return worst


def varies(model: nn.Module, inputs: Sequence[Any], trials: int = 4, seed: int = 99) -> bool:
    """Whether any output of the model changes by more than rounding over random inputs."""
    with torch.no_grad():
        first = model(*rebatch(tuple(inputs), 2, seed))
        for trial in range(trials):
            scale = 10.0**trial
            args = rebatch(tuple(inputs), 2, seed + 1 + trial)
            args = tuple(a * scale if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
            if relative_error(first, model(*args)) > 1e-9:
                return True
    return False


def state_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of every parameter and buffer, persistent or not."""
    digest = hashlib.sha256()
    named = list(model.named_parameters(remove_duplicate=False)) + list(model.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a failing call must leave alone: state, modes, hooks, classes, identity of parameters, gradients."""
    return {
        "state": state_hash(model),
        "training": {name: module.training for name, module in model.named_modules(remove_duplicate=False)},
        "hooks": {name: tuple(len(getattr(module, hook)) for hook in _HOOKS) for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "identity": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "grad": {name: None if p.grad is None else id(p.grad) for name, p in model.named_parameters()},
    }


def parameter_count(model: nn.Module) -> int:
    """Number of elements in distinct parameters."""
    return sum(parameter.numel() for parameter in model.parameters())

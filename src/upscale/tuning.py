"""Measure, once, what elementary steps cost on the user's device, so that plans are made for it.

Every rate of :class:`~upscale.plan.Rates` is one small experiment in eager mode; the result is cached on disk under the
device's name, torch's version and what else it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .accept import unwrap
from .errors import InputError
from .files import replacing
from .importance.progress import progress_bar
from .machine import processor
from .observe import quietly_evaluated
from .plan import Rates, Target, guessed_rates
from .plan.products import VIEWS
from .pointwise import as_products
from .setting import checked_target

__all__ = ["tune"]

_VERSION = 3  # of the experiments below: raise it when one of them changes
_MULTIPLES = (1, 2, 4, 8, 16, 32)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_SECONDS = 0.05  # for one experiment
_STARTS, _MOST = 10, 1024  # calls that an experiment should take as long as, and images that it takes for that at most


def tune(
    model: nn.Module,
    args: Any,
    *,
    target: Target | None = None,
    cache: str | os.PathLike[str] | None = None,
    refresh: bool = False,
) -> Target:
    """Measure the device of ``model`` and return a :class:`Target` to export for: ``export(..., target=tune(...))``.

    Args:
        model, args: the model and an example call, a tensor or a tuple; its heaviest layers are timed on the example.
        target: what is known already (backend, batch, memory format); these are passed on.
        cache: a JSON file; None: ``upscale/rates.json`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Written atomically. A
            file that cannot be read is measured anew, one that cannot be written is done without.
        refresh: measure even if the cache has this device.

    Returns:
        ``target`` with ``rates``, and with ``round_to`` set to the multiple of channels that the device works on
        fastest (1 where none is at least 3 % faster). A few seconds on a CPU.

    Raises:
        InputError: no example, or one that the model does not accept.
    """
    target, model = checked_target(target), unwrap(model)
    arguments = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    example = next((a for a in pytree.tree_leaves(arguments) if isinstance(a, Tensor)), None)
    if example is None:
        raise InputError("tune needs an example input, such as upscale.tune(model, (torch.rand(1, 3, 224, 224),))")
    layers = _heaviest(model, arguments)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), example.device)
    path = Path(cache) if cache is not None else _default_cache()
    key = _key(device, dtype, layers)
    known = {} if refresh else _load(path)
    if key not in known:
        with torch.inference_mode(), quietly_evaluated(model):
            known = _load(path) | {key: _measure(layers, device, dtype)}
        _save(path, known)
    entry = known[key]
    rates = Rates(**entry["rates"])
    return dataclasses.replace(
        target, rates=rates, round_to=entry["round_to"] if target.round_to == 1 else target.round_to
    )


# -- experiments ------------------------------------------------------------------------------------------------------


def _measure(layers: list[tuple[nn.Module, Tensor, float]], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    bench = _Bench(device, dtype)
    steps: dict[str, Callable[[dict[str, float]], float]] = {
        "call": bench.call,
        "copy": bench.copy,
        "pick": bench.pick,
        "piece": bench.piece,
        "stretch": bench.stretch,
        "multiply": lambda found: bench.multiply(layers, found),
        "load": bench.load,
        "product": bench.product,
    }
    found: dict[str, float] = {}
    with progress_bar("measuring this device", len(steps) + 1) as advance:
        for name, step in steps.items():
            found[name] = max(0.0, step(found))
            advance()
        multiple = bench.multiple(found)
    if device.type == "cuda":  # the time above is the host's: within a model no call is waited for
        found = found | {"issue": bench.issue(), "call": guessed_rates("cuda").call}
    return {"rates": found, "round_to": multiple}


class _Bench:
    """Experiments on one device; every one returns nanoseconds, given what was found before it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.width = torch.empty((), dtype=dtype).element_size()

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def index(self, count: int, total: int) -> Tensor:
        return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values.to(self.device)

    def time(self, run: Callable[[], object]) -> float:
        """Median nanoseconds of one call."""
        for _ in range(3):
            run()
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while len(times) < 9 or time.perf_counter() < end:
            times.append(self.once(run))
        return statistics.median(times)

    def ratio(self, run: Callable[[], object], other: Callable[[], object], less: float) -> float:
        """Median time of ``run``, ``less`` nanoseconds, over that of ``other``, measured in turns: what slows the
        machine slows both."""
        times: list[tuple[float, float]] = []
        end = time.perf_counter() + 2 * _SECONDS
        while len(times) < 3 or time.perf_counter() < end:
            times.append((self.once(run), self.once(other)))
        return statistics.median((a - less) / b for a, b in times[1:])

    def once(self, run: Callable[[], object]) -> float:
        """Nanoseconds of one call."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter_ns()
        run()
        wait()
        return float(time.perf_counter_ns() - start)

    def call(self, found: dict[str, float]) -> float:
        x, index = self.random(1, 4, 2, 2), self.index(2, 4)
        return self.time(lambda: x.index_select(1, index))

    def issue(self) -> float:
        """What the host takes for a layer's call: of many small ones, waited for together."""
        convolutions = [nn.utils.skip_init(nn.Conv2d, 4, 4, 1, device=self.device, dtype=self.dtype) for _ in range(10)]
        layers = nn.Sequential(*(m for layer in convolutions for m in (layer, nn.ReLU()))).eval()
        x = self.random(1, 4, 2, 2)
        return self.time(lambda: layers(x)) / len(layers)

    def copy(self, found: dict[str, float]) -> float:
        x, index = self.random(2, 128, 56, 56), self.index(64, 128)
        return (self.time(lambda: x.index_select(1, index)) - found["call"]) / (2 * 64 * 56 * 56 * self.width)

    def pick(self, found: dict[str, float]) -> float:
        x, index = self.random(2 * 56 * 56, 128), self.index(64, 128)
        return (self.time(lambda: x.index_select(1, index)) - found["call"]) / (2 * 56 * 56 * 64 * self.width)

    def piece(self, found: dict[str, float]) -> float:
        x = self.random(1, 64, 2, 2)

        def join(count: int) -> Tensor:
            return torch.cat([x[:, 2 * i : 2 * i + 1] for i in range(count)], 1)

        return (self.time(lambda: join(32)) - self.time(lambda: join(2))) / 30

    def stretch(self, found: dict[str, float]) -> float:
        x = self.random(2, 64, 56, 56).contiguous(memory_format=torch.channels_last)
        taken = self.time(lambda: torch.cat([x[:, 4 * i : 4 * i + 2] for i in range(16)], 1))
        rest = found["call"] + 16 * found["piece"] + 2 * 32 * 56 * 56 * self.width * found["copy"]
        return (taken - rest) / (16 * 2 * 56 * 56)

    def multiply(self, layers: list[tuple[nn.Module, Tensor, float]], found: dict[str, float]) -> float:
        if not layers:
            return dataclasses.asdict(Rates())["multiply"]
        times = [self.time(functools.partial(layer, x)) for layer, x, _ in layers]
        return sum(times) / sum(products for *_, products in layers) * 4 / self.width

    def load(self, found: dict[str, float]) -> float:
        x, weight = self.random(1, 2048), self.random(2048, 2048)
        taken = self.time(lambda: nn.functional.linear(x, weight))
        return (taken - found["call"] - 2048 * 2048 * found["multiply"]) / (2048 * 2048 * self.width)

    def product(self, found: dict[str, float]) -> float:
        weight, views, ratios = self.random(96, 64, 1, 1), VIEWS * found["call"], []
        for form, memory_format in (("rows", torch.channels_last), ("planes", torch.contiguous_format)):
            part = self.random(4, 128, 56, 56).contiguous(memory_format=memory_format)[:, 32:96]
            dense = part.contiguous(memory_format=memory_format)
            kernel = weight.contiguous(memory_format=memory_format)
            product, convolution = as_products(form).forward, functools.partial(nn.functional.conv2d, dense, kernel)
            ratios.append(self.ratio(functools.partial(product, part, kernel), convolution, views))
        return statistics.mean(ratios)

    def multiple(self, found: dict[str, float]) -> int:
        """The multiple of channels at which a convolution of 33 to 64 channels takes least time on average. On so many
        images that a GPU does more than start it."""
        x, weight = self.random(1, 64, 28, 28), self.random(64, 64, 3, 3)
        least = _STARTS * found["call"]
        while len(x) < _MOST and self.time(functools.partial(nn.functional.conv2d, x, weight, padding=1)) < least:
            x = x.repeat(4, 1, 1, 1)
        times = {}
        for count in range(32, 65):
            part, weight = x[:, :count].contiguous(), self.random(count, count, 3, 3)
            times[count] = self.time(functools.partial(nn.functional.conv2d, part, weight, padding=1))
        means = {m: statistics.mean(times[-(-n // m) * m] for n in range(33, 65)) for m in _MULTIPLES}
        best = min(means, key=lambda m: means[m])
        return best if means[best] < 0.97 * means[1] else 1


def _heaviest(model: nn.Module, args: tuple[Any, ...], most: int = 8) -> list[tuple[nn.Module, Tensor, float]]:
    """The model's layers with most multiply-adds on the example: (layer, its input, multiply-adds)."""
    seen: dict[nn.Module, tuple[nn.Module, Tensor, float]] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        weight = layer.weight
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and isinstance(weight, Tensor):
            channels = weight.shape[0]
            seen[layer] = (layer, inputs[0].detach(), output.numel() / channels * weight.numel())

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, _LAYERS)]
    try:
        with torch.no_grad(), quietly_evaluated(model):
            model(*args)
    except Exception as error:
        raise InputError(f"the model does not accept the example: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(seen.values(), key=lambda entry: -entry[2])[:most]


# -- cache ------------------------------------------------------------------------------------------------------------


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upscale" / "rates.json"


def _key(device: torch.device, dtype: torch.dtype, layers: list[tuple[nn.Module, Tensor, float]]) -> str:
    """All that the rates depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {processor()}"
    shapes = ",".join(f"{tuple(x.shape)}x{tuple(layer.weight.shape)}" for layer, x, _ in layers)  # type: ignore[arg-type]
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return f"{_VERSION}; {name}; torch {torch.__version__}; {dtype}; {threads} threads; {shapes}"


def _load(path: Path) -> dict[str, Any]:
    """The cache, without entries that are not as this version writes them."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in data.items() if _is_entry(v)} if isinstance(data, dict) else {}


def _is_entry(value: Any) -> bool:
    if (
        not isinstance(value, dict)
        or value.get("round_to") not in _MULTIPLES
        or not isinstance(value.get("rates"), dict)
    ):
        return False
    names = {f.name for f in dataclasses.fields(Rates)}
    return all(k in names and isinstance(v, (int, float)) and 0 <= v < float("inf") for k, v in value["rates"].items())


def _save(path: Path, entries: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError), replacing(path) as draft, draft.open("w") as file:
        json.dump(entries, file, indent=1)

"""1x1 convolutions that read a slice of channels: a convolution, which copies the slice first, or a matrix product.

``python -m benchmarks.pointwise`` times single layers, side by side in rotated rounds: times over that of a convolution
on the slice. ``--nets resnet50 mobilenet_v2`` times whole networks of torchvision instead, exported with and without
products. One thread, float32, random weights; the allocator keeps freed memory, as for ``upscale bench``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import upscale
from upscale import Target
from upscale.bench.run import ALLOCATOR
from upscale.markdown import table
from upscale.measure import timings
from upscale.plan import Rates
from upscale.pointwise import as_products

MOST = 100_000  # rounds: the seconds decide
FORMATS = {"channels_last": ("rows", torch.channels_last), "contiguous": ("planes", torch.contiguous_format)}
SETTINGS = (("channels_last", 1), ("channels_last", 8), ("contiguous", 8))


class Shape(NamedTuple):
    """Height and width, channels of the tensor, those that are read, outputs."""

    size: int
    held: int
    read: int
    outputs: int


SHAPES = (
    Shape(56, 128, 64, 64),
    Shape(56, 128, 64, 256),
    Shape(56, 512, 256, 64),
    Shape(28, 64, 32, 192),
    Shape(28, 256, 128, 512),
    Shape(28, 512, 256, 128),
    Shape(28, 1024, 512, 128),
    Shape(14, 192, 96, 576),
    Shape(14, 512, 256, 1024),
    Shape(14, 1024, 512, 256),
    Shape(14, 1024, 768, 256),
    Shape(7, 320, 160, 960),
    Shape(7, 960, 720, 160),
    Shape(7, 1024, 512, 2048),
    Shape(7, 2048, 1024, 512),
)


def layers(memory_format: str, batch: int, seconds: float, bias: bool) -> Iterator[tuple[str, ...]]:
    """A line for each shape."""
    for shape in SHAPES:
        times = in_turns(ways_of(shape, memory_format, batch, bias), seconds)
        copying = times.pop("slice")
        ratios = [statistics.median(a / b for a, b in zip(other, copying, strict=True)) for other in times.values()]
        name = f"{shape.size}x{shape.size}, {shape.read} of {shape.held} to {shape.outputs}"
        yield name, f"{statistics.median(copying) / 1000:,.0f}", *(f"{ratio:.2f}" for ratio in ratios)


def in_turns(ways: dict[str, tuple[Tensor, Callable[[Tensor], Any]]], seconds: float) -> dict[str, list[int]]:
    """Nanoseconds of each way in every round. Before each call the tensor that it reads is written, as the layer before
    would: where it lies then does not depend on what was timed before."""
    names = list(ways)
    times: dict[str, list[int]] = {name: [] for name in names}
    end, turn = time.perf_counter() + seconds, 0
    with torch.inference_mode():
        while turn < 8 or time.perf_counter() < end:
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                x, way = ways[name]
                x.mul_(1.0)
                start = time.perf_counter_ns()
                way(x)
                times[name].append(time.perf_counter_ns() - start)
            turn += 1
    return {name: values[3:] for name, values in times.items()}


def ways_of(
    shape: Shape, memory_format: str, batch: int, bias: bool
) -> dict[str, tuple[Tensor, Callable[[Tensor], Any]]]:
    """The ways to convolve a part of a tensor's channels, and the tensor that each reads."""
    form, layout = FORMATS[memory_format]
    x = torch.randn(batch, shape.held, shape.size, shape.size).contiguous(memory_format=layout)
    weight = torch.randn(shape.outputs, shape.read, 1, 1).contiguous(memory_format=layout)
    added = torch.randn(shape.outputs) if bias else None
    start, places = (shape.held - shape.read) // 2, torch.randperm(shape.held)[: shape.read].sort().values
    dense = x[:, start : start + shape.read].contiguous(memory_format=layout)
    product = as_products(form, bias).forward
    gathered = functools.partial(_gathered, places=places, form=form)

    def multiplied(t: Tensor) -> Tensor:
        part = t.narrow(1, start, shape.read)
        return product(part, weight, added) if bias else product(part, weight)

    return {
        "slice": (x, lambda t: F.conv2d(t.narrow(1, start, shape.read), weight, added)),
        "dense": (dense, lambda t: F.conv2d(t, weight, added)),
        "gather": (x, lambda t: F.conv2d(gathered(t), weight, added)),
        "product": (x, multiplied),
    }


def _gathered(x: Tensor, places: Tensor, form: str) -> Tensor:
    if form == "planes":
        return x.index_select(1, places)
    last = x.movedim(1, -1)
    return last.flatten(0, 2).index_select(1, places).unflatten(0, last.shape[:3]).movedim(-1, 1)


def networks(
    names: Sequence[str], method: Any, amount: float, memory_format: str, batch: int, seconds: float
) -> Iterator[tuple[str, ...]]:
    """A line for each network."""
    from support.oracle import randomise
    from support.vision import build

    for name in names:
        layout = FORMATS[memory_format][1]
        model = randomise(build(name)).to(memory_format=layout)
        x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
        upscale.MaskingManager(model, "input", method, example_inputs=x).importance("l2").mask(amount)
        made, count = {}, 0
        for way, rates in (("convolutions", Rates(product=math.inf)), ("products", Rates())):
            target = Target(batch=batch, memory_format=memory_format, rates=rates)  # type: ignore[arg-type]
            made[way] = upscale.export(model, (x,), target=target, verify=False).requires_grad_(False)
            count = sum(bool(c.product) for c in made[way].report.plan.contractions.values())
        made["again"] = copy.deepcopy(made["convolutions"])  # with weights of its own: none are in a cache already
        times = timings(made, (x,), runs=MOST, seconds=seconds)
        base = times["convolutions"]
        ratios = [statistics.median(a / b for a, b in zip(times[w], base, strict=True)) for w in ("products", "again")]
        yield name, str(count), f"{statistics.median(base):.1f}", *(f"{ratio:.3f}" for ratio in ratios)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each layer or network (default 0.5)")
    parser.add_argument("--bias", action="store_true", help="layers with a bias")
    parser.add_argument("--nets", nargs="+", help="networks of torchvision instead of layers")
    parser.add_argument("--method", default="contiguous", help="how networks are masked (default: contiguous)")
    parser.add_argument("--amount", type=float, default=0.5, help="share of the inputs masked in networks (default .5)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for memory_format, batch in SETTINGS:
        print(f"\n{memory_format.replace('_', ' ')}, batch {batch}\n")
        if chosen.nets:
            header: tuple[str, ...] = ("network", "products", "convolutions ms", "products", "noise")
            lines = networks(chosen.nets, chosen.method, chosen.amount, memory_format, batch, chosen.seconds)
        else:
            header = ("layer", "slice µs", "dense", "gather", "product")
            lines = layers(memory_format, batch, chosen.seconds, chosen.bias)
        print(table(header, lines), flush=True)
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):  # read when the process starts
        command = [sys.executable, "-m", "benchmarks.pointwise", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ALLOCATOR})
    raise SystemExit(main())

"""Rates of one device: what elementary steps cost there, in nanoseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """Nanoseconds of elementary steps on one device, in float32.

    ``multiply``: a multiply-add of a convolution or matrix product. ``load``: a byte of weight. ``copy``: a byte copied
    in stretches, read and written. ``pick``: a byte gathered where channels are neighbours in memory. ``call``: an
    operator's call. ``piece``: one more tensor in a concatenation. ``stretch``: one more stretch of memory in a copy.
    ``strides``: whether some readers take a slice as it is. ``vector``: channels that a kernel works on at a time.
    ``product``: the time of a matrix product on a slice as it lies, over that of a 1x1 convolution on as many channels
    without gaps; infinite: such a product is never an option. ``issue``: what the host takes for a call of a device
    that works while the host calls on, so that the time is the greater of all calls and all work; 0: it is the host.
    ``view``: taking a slice, of which nothing is read yet.
    """

    multiply: float = 0.015
    load: float = 0.05
    copy: float = 0.03
    pick: float = 0.065
    call: float = 3000.0
    piece: float = 1000.0
    stretch: float = 1.4
    strides: bool = True
    vector: int = 16
    product: float = 1.0
    issue: float = 0.0
    view: float = 0.0


# One thread of an x86 server with AVX-512, torch 2.13 (`upscale.tune` measures them). The GPU's are of an H200: with
# them the work of eight networks on 64 images is 0.5 to 1.3 of what replayed CUDA graphs took; products on slices were
# not measured there.
CPU = Rates()
CUDA = Rates(0.00003, 0.0004, 0.0006, 0.0006, 2000.0, 300.0, 0.0, product=math.inf, issue=25000.0)
_BACKENDS: dict[str, dict[str, float | bool]] = {
    "eager": {},
    # Slices and gathers are fused into the loop that writes the tensor; convolutions want theirs dense all the same.
    "compile": {"call": 300.0, "piece": 100.0, "product": math.inf, "issue": 0.0},
    # Kernels start one after the other, without the host.
    "cudagraphs": {"issue": 0.0},
    # Slice, Gather and Concat are nodes of their own and copy.
    "onnxruntime": {"call": 2000.0, "piece": 2000.0, "strides": False, "product": math.inf},
}


def guessed_rates(device: str) -> Rates:
    """The rates of ``"cpu"`` or ``"cuda"`` before anything is measured there."""
    return CUDA if device == "cuda" else CPU


def on_backend(rates: Rates, backend: str) -> Rates:
    """A device's rates, measured in eager mode, as they are under another backend."""
    return replace(rates, **_BACKENDS[backend])  # type: ignore[arg-type]

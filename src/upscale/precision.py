"""Float32 that is float32: on GPUs torch's convolutions round their inputs to TF32 unless they are told not to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["full_precision"]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 in float32, so that a difference between two models is not TF32's rounding
    (10 bits). What was set before is set again. Without a GPU nothing changes."""
    saved = [(owner, name, getattr(owner, name)) for owner, name in _switches()]
    try:
        for owner, name, before in saved:
            setattr(owner, name, False if isinstance(before, bool) else "ieee")
        yield
    finally:
        for owner, name, before in saved:
            setattr(owner, name, before)


def _switches() -> list[tuple[Any, str]]:
    """Those of torch 2.9 and later, which do not go with the older ones once a user has set them."""
    if not torch.cuda.is_available():
        return []
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(convolutions, "conv"):
        return [(convolutions.conv, "fp32_precision"), (products, "fp32_precision")]
    return [(convolutions, "allow_tf32"), (products, "allow_tf32")]

"""Which machine this is, in a few words."""

from __future__ import annotations

import os

import torch

import upscale

from ..machine import processor
from .rows import Place


def describe(device: str) -> str:
    """The processor of ``device`` and how many cores there are."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return f"{processor()}, {os.cpu_count()} cores"


def place(device: str) -> Place:
    """Where rows are measured now."""
    return Place(upscale.__version__, torch.__version__, describe(device))

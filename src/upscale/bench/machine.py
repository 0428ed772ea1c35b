"""Which machine this is, in a few words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import upscale

from .rows import Place


def describe(device: str) -> str:
    """The processor of ``device`` and how many cores there are."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return f"{_processor()}, {os.cpu_count()} cores"


def place(device: str) -> Place:
    """Where rows are measured now."""
    return Place(upscale.__version__, torch.__version__, describe(device))


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()

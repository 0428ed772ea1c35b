"""Settings of every test."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler is silent; read when torch loads

import pytest
import torch

# Several test processes share few cores; more threads only make them wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same random state and with gradients on, alone or in any order."""
    torch.manual_seed(0)
    torch.set_grad_enabled(True)

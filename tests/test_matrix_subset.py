"""A part of the network x mask matrix small enough for every change; ``make matrix`` runs all of it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("torchvision") is None:  # importing it needs the helper that the matrix imports
    pytest.skip("torchvision is not installed", allow_module_level=True)

from benchmarks.matrix import CASES, CI_MASKS, CI_NETWORKS, TOLERANCE, Subject

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("network", CI_NETWORKS)
def test_exported_equals_masked(network: str) -> None:
    """Equal to 1e-10 in float64 at two batch sizes, and really smaller, for every mask of the subset."""
    torch.set_num_threads(1)
    subject = Subject(network)
    for case in CASES:
        if case.name in CI_MASKS:
            row = subject.examine(case)
            assert row.outcome == "same", f"{network} {case.name}: {row.detail}"
            assert row.error <= TOLERANCE
            assert row.parameters < 1 and row.flops < 1, f"{network} {case.name}: nothing became smaller ({row})"

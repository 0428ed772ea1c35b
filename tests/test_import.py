"""``import upscale`` is cheap: what only some calls need is imported by them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
LATER = (
    "sympy networkx matplotlib rich.progress onnx onnxscript onnxruntime torchvision timm transformers typer psutil "
    "sklearn ray torch_pruning openvino torch._dynamo torch._inductor"
).split()


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """The modules that ``import upscale`` loads beyond ``import torch``, in a fresh process."""
    program = "import sys, torch\nbefore = set(sys.modules)\nimport upscale\nprint(*(set(sys.modules) - before))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@pytest.mark.parametrize("name", LATER)
def test_not_with_the_package(name: str, imported: set[str]) -> None:
    assert "upscale.exporting" in imported and name not in imported

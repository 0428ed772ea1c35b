"""``docs/converting.md``, section by section where what it needs is installed, and the INT8 example."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = (Path(__file__).parent.parent / "docs" / "converting.md").read_text()
COMPILER = "g++ c++ clang++"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


START, *SECTIONS = re.split(r"^## ", GUIDE, flags=re.MULTILINE)
TEXTS = {section.splitlines()[0]: section for section in SECTIONS}


@pytest.fixture(scope="module")
def start() -> dict[str, Any]:
    """The names of the first block."""
    names: dict[str, Any] = {"__name__": "example"}
    for code in blocks(START):
        exec(compile(code, "docs/converting.md", "exec"), names)
    return names


def compiler() -> None:
    if not any(map(shutil.which, COMPILER.split())):
        pytest.skip("no C++ compiler for inductor")


def packages(*names: str) -> Callable[[], None]:
    def need() -> None:
        for name in names:
            pytest.importorskip(name, reason=f"{name} is not installed")

    return need


ONNX = ("onnx", "onnxscript", "onnxruntime")
NEEDS: dict[str, Callable[[], None]] = {
    "torch.compile": compiler,
    "AOTInductor": compiler,
    "ONNX": packages(*ONNX),
    "INT8": packages(*ONNX),
    "OpenVINO": packages(*ONNX, "openvino"),
}


def test_every_section_is_run() -> None:
    assert list(NEEDS) == list(TEXTS)


@pytest.mark.parametrize("section", NEEDS)
@pytest.mark.filterwarnings("ignore")  # what the converters say to each other
def test_section(section: str, start: dict[str, Any]) -> None:
    NEEDS[section]()
    codes = blocks(TEXTS[section])
    assert codes
    names = dict(start)
    torch._dynamo.reset()
    # As where one compiles in earnest, but for the optimiser of the wrapper, which takes most of the time.
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        for code in codes:
            exec(compile(code, "docs/converting.md", "exec"), names)


def test_int8_keeps_the_accuracy_on_digits() -> None:
    packages("sklearn", *ONNX)()
    from examples import quantise

    figures = quantise.main(epochs=2)
    assert figures["pruned"] > 90 and abs(figures["ONNX"] - figures["pruned"]) < 0.5
    assert figures["INT8"] > figures["pruned"] - 3
    assert figures["INT8 kB"] < 0.8 * figures["ONNX kB"]

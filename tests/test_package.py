"""The wheel: built from the checkout, it works where the checkout is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77")
pytest.importorskip("wheel")

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import torch, upscale
from torch import nn
assert upscale.__file__.startswith({folder!r}), upscale.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
x = torch.randn(2, 3, 8, 8)
upscale.MaskingManager(model, example_inputs=x).importance().mask(0.5)
pruned = upscale.export(model, (x,))
assert pruned.get_submodule("0").out_channels == 4
assert torch.allclose(pruned(x), model(x), atol=1e-5)
print("works")
"""


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves files beside the sources
    source.mkdir()
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("upscale_pruning-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    packages = {path.parent.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("__init__.py")}
    assert {name.rsplit("/", 1)[0] for name in names if name.endswith("__init__.py")} == packages
    assert {"upscale/py.typed", "upscale/zoo/timm_models.json"} <= set(names)
    assert {"upscale/reporting/page.css", "upscale/reporting/page.html.j2"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "upscale = upscale.cli:main" in scripts
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    script = SCRIPT.format(folder=str(tmp_path / "site"))
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0 and ran.stdout.strip() == "works", ran.stderr

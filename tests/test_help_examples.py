"""The first example of every command's help runs as it stands."""

from __future__ import annotations

import os
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("psutil")

from support.command import in_process
from upscale.cli import bench, coverage, inspect, prune, reproduce, zoo

ROOT = Path(__file__).resolve().parents[1]
HELPS = {
    "inspect": inspect.HELP,
    "prune": prune.HELP,
    "zoo": zoo.HELP,
    "bench": bench.HELP,
    "reproduce": reproduce.HELP,
    "coverage": coverage.HELP,
}


def first_example(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("  upscale "))
    return shlex.split(line)[1:]


@pytest.mark.parametrize("command", HELPS)
def test_the_first_example_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("torchvision") is None or find_spec("matplotlib") is None:
        pytest.skip("torchvision or matplotlib is not installed")
    shared = Path(os.environ.get("UPSCALE_SHARED") or ROOT.parent / "shared").resolve()
    if command == "reproduce" and not (shared / "weights").is_dir():
        pytest.skip(f"{shared} is not there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPSCALE_SHARED", str(shared))
    if command == "coverage":  # of tables that another example writes
        assert in_process("zoo", "--suite", "torchvision", "alexnet", "--out", "torchvision.csv") == 0
        shutil.copy("torchvision.csv", "timm.csv")
    assert in_process(*first_example(HELPS[command])) == 0

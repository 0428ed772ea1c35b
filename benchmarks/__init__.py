"""Measurements on real networks; run from the repository's root: ``python -m benchmarks.results``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# torch's profiler, which counts the copies, reports its start and stop on stderr otherwise; read when torch
# loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# The helper that makes torchvision importable lies with the tests.
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

"""``python -m benchmarks.cuda``: many models prepared side by side, timed one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import cuda
from upscale.bench.models import Source
from upscale.bench.rows import Setting, read_rows
from upscale.bench.worker import Budget, Job


def job(model: str, backend: str = "eager") -> Job:
    setting = Setting(amount=0.5, batch=2, size=8, backend=backend)
    return Job(Source("", f"support.bench_models:{model}"), setting, ("unpruned", "auto"), Budget(5, 1, 1.0), 120.0)


def test_all_are_timed_and_what_fails_keeps_nobody_waiting() -> None:
    jobs = [job("small"), job("missing"), job("small", "cudagraphs")]
    found = {(rows[0].model, rows[0].backend): rows for rows in cuda.measured(jobs, at_once=3)}
    assert len(found) == 3
    timed, missing, none = (found[(j.source.model, j.setting.backend)] for j in jobs)
    assert all(row.median_ms and row.ratio and not row.reason for row in timed)
    assert all("missing" in row.reason and row.median_ms is None for row in missing)
    assert all("need a GPU" in row.reason for row in none)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cuda.main(["--out", str(tmp_path / "rows.csv")])
    assert "no CUDA device" in capsys.readouterr().out
    assert read_rows(tmp_path / "rows.csv") == []

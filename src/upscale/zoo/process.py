"""A worker process with a limit on time and on memory; whatever happens to it becomes a row."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from .rows import Row
from .worker import Job

_POLL = 0.2  # seconds
_GRACE = 15.0  # seconds more than its limit that a worker has before it ends itself


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time and GB of resident memory, for one model."""

    timeout: float = 600.0
    memory_gb: float = 8.0


def run_job(job: Job, blank: Row, limits: Limits, stopped: Callable[[], bool] = lambda: False) -> Row:
    """The row of one model from a process of its own. Never raises but for KeyboardInterrupt."""
    with tempfile.TemporaryDirectory(prefix="upscale-zoo-") as folder:
        files = Path(folder)
        (files / "job.json").write_text(job.to_json(), encoding="utf-8")
        started = time.monotonic()
        with (files / "errors.txt").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "upscale.zoo.worker", str(files / "job.json"), str(files / "row.json")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=_environment(job),
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
            )
        try:
            ended, peak = _watch(process, limits, started, stopped)
        finally:
            _end(process)
        row = _read(files / "row.json", blank)
        if ended or process.returncode:
            row.reason = ended or _death(process.returncode, (files / "errors.txt").read_text(errors="replace"))
            row.peak_mb = max(row.peak_mb or 0.0, round(peak / 2**20, 1))
        return row


def _environment(job: Job) -> dict[str, str]:
    """The parent's import path, so that a worker imports this very package and the user's own modules."""
    folders = [str(Path(job.suite).resolve().parent)] if Path(job.suite).is_file() else []
    path = os.pathsep.join([*folders, *(entry or os.getcwd() for entry in sys.path)])
    return {**os.environ, "PYTHONPATH": path, "KINETO_LOG_LEVEL": "6", "HF_HUB_OFFLINE": "1"}


def _watch(
    process: subprocess.Popen[bytes], limits: Limits, started: float, stopped: Callable[[], bool]
) -> tuple[str, float]:
    """Wait for the end; why the process has to be ended ("" if it ended by itself), and its peak resident size."""
    peak = 0.0
    while process.poll() is None:
        size = resident(process.pid)
        peak = max(peak, size)
        if size > limits.memory_gb * 2**30:
            return f"OutOfMemory: more than {limits.memory_gb:g} GB resident", peak
        if time.monotonic() - started > limits.timeout:
            return f"Timeout: more than {limits.timeout:g} s", peak
        if stopped():
            return "Interrupted: the run was stopped", peak
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
    return "", peak


def resident(pid: int) -> float:
    """Resident bytes of a process and its children; 0 once it is gone."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a worker and of its children."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait()


def _read(path: Path, blank: Row) -> Row:
    try:
        return Row(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return blank


def _death(status: int, errors: str) -> str:
    """What a worker died of, which wrote no more than these errors."""
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"Crash: {signal.Signals(-status).name}"
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    return f"Crash: exit status {status}: {lines[-1] if lines else 'no message'}"[:600]


def worker_limit(limits: Limits) -> float:
    """Seconds after which a worker ends itself, should nobody be left to do it."""
    return limits.timeout + _GRACE

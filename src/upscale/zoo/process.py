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
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Ended:
    """What a worker left: the last text that it wrote (None: nothing), why it failed ("": it did not), and its peak
    resident size."""

    text: str | None
    reason: str
    peak_mb: float


def run_job(job: Job, blank: Row, limits: Limits, stopped: Callable[[], bool] = lambda: False) -> Row:
    """The row of one model from a process of its own. Never raises but for KeyboardInterrupt."""
    ended = run_worker("upscale.zoo.worker", job.to_json(), limits, stopped, near=job.suite)
    row = blank
    with contextlib.suppress(ValueError):
        row = Row(**json.loads(ended.text or ""))
    if ended.reason:
        row.reason = ended.reason
        row.peak_mb = max(row.peak_mb or 0.0, ended.peak_mb)
    return row


def run_worker(
    module: str,
    job: str,
    limits: Limits,
    stopped: Callable[[], bool] = lambda: False,
    near: str = "",
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Run ``python -m MODULE JOB RESULT`` with the text ``job`` in the first file, and read the second.

    ``near``: a file whose folder goes on the import path. ``variables``: of the environment.
    """
    with tempfile.TemporaryDirectory(prefix="upscale-") as folder:
        files = Path(folder)
        (files / "job.json").write_text(job, encoding="utf-8")
        started = time.monotonic()
        with (files / "errors.txt").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(files / "job.json"), str(files / "row.json")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**_environment(near), **(variables or {})},
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
            )
        try:
            ended, peak = _watch(process, limits, started, stopped)
        finally:
            _end(process)
        reason = ended
        if not reason and process.returncode:
            reason = _death(process.returncode, (files / "errors.txt").read_text(errors="replace"))
        return Ended(_read(files / "row.json"), reason, round(peak / 2**20, 1))


def _environment(near: str) -> dict[str, str]:
    """The parent's import path, so that a worker imports this very package and the user's own modules."""
    folders = [str(Path(near).resolve().parent)] if Path(near).is_file() else []
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


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


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

"""The command ``upscale`` in tests: in this process, or in one of its own that is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def in_process(*arguments: object) -> int:
    """The status of the command, run here: cheaper than a process."""
    from upscale.cli.app import run

    before = signal.getsignal(signal.SIGTERM)
    try:
        return run([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def command(*arguments: object) -> list[str]:
    """What to start a process with."""
    return [sys.executable, "-m", "upscale.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of such a process: it finds the package and the tests' modules."""
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def interrupted(arguments: Iterable[object], folder: Path, until: Callable[[], bool]) -> tuple[int, int, str]:
    """Run the command in ``folder``, press Ctrl-C once ``until`` holds: (its process group, status, what it said).

    As a terminal does it, the signal goes to the command and to what it has started.
    """
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_ctrl_c,
    )
    wait_until(until)
    time.sleep(1)  # the next piece of work has begun
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    return process.pid, process.returncode, output


def _heed_ctrl_c() -> None:
    """What a shell starts in its background ignores Ctrl-C, and so does all that comes of it, tests too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(holds: Callable[[], bool], seconds: float = 100) -> None:
    """Wait for something to hold, so long at most."""
    started = time.monotonic()
    while not holds() and time.monotonic() - started < seconds:
        time.sleep(0.1)

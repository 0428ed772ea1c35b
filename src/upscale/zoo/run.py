"""A whole run: which models are left to do, their processes, and a table that is valid at every moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import upscale

from .nearest import did_you_mean
from .process import Limits, run_job, worker_limit
from .rows import Row, Settings, merged, read_rows, write_rows
from .suites import Suite, load_suite
from .worker import Job, first_line


@dataclass(frozen=True)
class Trial:
    """One model to be tried."""

    job: Job
    blank: Row


class UnknownModelError(Exception):
    """Names that no chosen suite has; the message has near matches."""


def choose(suites: Sequence[str], models: Sequence[str], settings: Settings, limits: Limits) -> list[Trial]:
    """The trials of ``models`` (of all, if none is named), in the suites' order.

    Raises ``SuiteError`` and ``UnknownModelError``.
    """
    loaded = [(which, load_suite(which)) for which in suites]
    _check_known(models, [suite for _, suite in loaded])
    trials = []
    for which, suite in loaded:
        listed = list(suite.names())
        if models:
            known = {*listed, *suite.others()}
            listed = [name for name in dict.fromkeys(models) if name in known]
        for name in listed:
            job = Job(which, name, settings, worker_limit(limits))
            trials.append(Trial(job, Row.blank(suite.name, name, settings, upscale.__version__)))
    return trials


def _check_known(models: Sequence[str], suites: Sequence[Suite]) -> None:
    known = {name for suite in suites for name in (*suite.names(), *suite.others())}
    complaints = []
    for name in models:
        if name not in known:
            hint = did_you_mean(name, known) or "see --list for the names"
            complaints.append(f"no model {name!r} in {', '.join(suite.name for suite in suites)}: {hint}")
    if complaints:
        raise UnknownModelError("\n".join(complaints))


def left(trials: Sequence[Trial], out: Path, resume: bool) -> list[Trial]:
    """The trials whose rows are not in the table yet; all of them, unless the run is resumed."""
    if not resume:
        return list(trials)
    done = {row.key for row in read_rows(out)}
    return [trial for trial in trials if trial.blank.key not in done]


class Run:
    """The processes of a run, ``jobs`` at a time. A new row takes the place of the old one of the same settings."""

    def __init__(self, out: Path, limits: Limits, jobs: int = 1) -> None:
        self.out, self.limits, self.jobs = out, limits, jobs
        self._stop = threading.Event()

    def rows(self, trials: Sequence[Trial], started: Callable[[str], None] = lambda name: None) -> Iterator[Row]:
        """Every row once it is in the table. ``started`` is told what is tried now.

        When the caller is interrupted (Ctrl-C), the processes are ended, and what they did is in no row.
        """
        rows = read_rows(self.out)

        def one(trial: Trial) -> Row | None:
            if self._stop.is_set():
                return None
            started(trial.job.model)
            try:
                row = run_job(trial.job, trial.blank, self.limits, self._stop.is_set)
            except Exception as error:  # no process could be started, say: that too is a row
                row = replace(trial.blank, reason=first_line(error))
            return None if self._stop.is_set() else row

        with ThreadPoolExecutor(self.jobs) as pool:
            futures: list[Future[Row | None]] = [pool.submit(one, trial) for trial in trials]
            try:
                for future in as_completed(futures):
                    row = future.result()
                    if row is not None:
                        rows = merged(rows, row)
                        write_rows(self.out, rows)
                        yield row
            finally:
                self._stop.set()
                for future in futures:
                    future.cancel()

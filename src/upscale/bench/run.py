"""A whole run: what is left to measure, one process after the other, and a table that is valid at every moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..zoo.process import Limits, run_worker, worker_limit
from .models import DEFAULT_SIZE, Source
from .rows import Row, Setting, merged, read_rows, write_rows
from .worker import Budget, Job

#: glibc gives large blocks back to the system when they are freed, and gets them again page by page: at batch 8 that is
#: up to twice the time of a convolution, depending on what stands at the heap's end. With these it keeps them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def plan_jobs(
    sources: Sequence[Source],
    settings: Sequence[Setting],
    size: int | None,
    variants: Sequence[str],
    budget: Budget,
    limits: Limits,
) -> list[Job]:
    """One job for each model and setting. ``size``: of images; None: 224, or as a suite file has them."""
    jobs = []
    for source in sources:
        pixels = size if size is not None else DEFAULT_SIZE if source.resized else 0
        for setting in settings:
            jobs.append(Job(source, replace(setting, size=pixels), tuple(variants), budget, worker_limit(limits)))
    return jobs


def left(jobs: Sequence[Job], out: Path, resume: bool) -> list[Job]:
    """The jobs that have a variant without a row in the table; all of them, unless the run is resumed."""
    if not resume:
        return list(jobs)
    done = {row.key for row in read_rows(out)}
    return [job for job in jobs if any(blank.key not in done for blank in job.blanks())]


def measured(jobs: Sequence[Job], out: Path, limits: Limits, started: Callable[[Job], None]) -> Iterator[list[Row]]:
    """The rows of each job once they are in the table. ``started`` is told what is measured now.

    When the caller is interrupted (Ctrl-C), the process is ended, and what it did is in no row.
    """
    rows = read_rows(out)
    for job in jobs:
        started(job)
        new = run_one(job, limits)
        rows = merged(rows, new)
        write_rows(out, rows)
        yield new


def run_one(job: Job, limits: Limits) -> list[Row]:
    """The rows of a job from a process of its own."""
    threads = str(job.setting.threads)
    ended = run_worker(
        "upscale.bench.worker",
        job.to_json(),
        limits,
        near=job.source.suite,
        variables={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **ALLOCATOR},
    )
    rows = [Row(**row) for row in json.loads(ended.text)] if ended.text else job.blanks()
    if ended.reason:
        for row in rows:
            row.reason = row.reason or ended.reason
            row.peak_mb = max(row.peak_mb or 0.0, ended.peak_mb)
    return rows

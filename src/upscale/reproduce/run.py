"""A whole sweep: which combinations are left, and a table that is valid at every moment."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from .executors import EXECUTORS
from .rows import EVEN, METHODS, Combination, Row, Source, merged, read_rows, write_rows
from .worker import Job

__all__ = ["combinations", "left", "plan_jobs", "sweep"]


def combinations(
    importances: Sequence[str],
    sides: Sequence[str],
    methods: Sequence[str],
    amounts: Sequence[float],
    repairs: Sequence[str] = ("",),
    rankings: Sequence[str] = (EVEN,),
) -> list[Combination]:
    """Every combination, the dense network first. There are no contiguous masks on the output side."""
    found = [Combination()]
    every = itertools.product(importances, sides, methods, rankings, repairs, sorted(amounts))
    for importance, side, method, ranking, repaired, amount in every:
        if (side, method) != ("output", METHODS[2]):
            found.append(Combination(importance, side, method, amount, repaired, ranking))
    return found


def plan_jobs(sources: Sequence[Source], wanted: Sequence[Combination]) -> list[Job]:
    """One network after the other: a process keeps what the combinations of one share."""
    return [Job(source, how) for source in sources for how in wanted]


def left(jobs: Sequence[Job], out: Path, resume: bool) -> list[Job]:
    """The jobs without a row in the table; all of them, unless the sweep is resumed. Failed ones are tried again."""
    if not resume:
        return list(jobs)
    done = {row.key for row in read_rows(out) if not row.reason}
    return [job for job in jobs if job.blank().key not in done]


def sweep(jobs: Sequence[Job], out: Path, executor: str, workers: int, address: str = "") -> Iterator[tuple[Job, Row]]:
    """Every row once it is in the table."""
    rows = read_rows(out)
    for job, row in EXECUTORS[executor](jobs, workers, address):
        rows = merged(rows, row)
        write_rows(out, rows)
        yield job, row

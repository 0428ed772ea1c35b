"""Where combinations are worked on: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..bench.run import ALLOCATOR
from .rows import Row
from .worker import Job, evaluate

__all__ = ["EXECUTORS", "local", "on_ray"]

_TRIES = 2  # of a job in whose process the worker died
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "6", **ALLOCATOR}


def local(jobs: Sequence[Job], workers: int, address: str = "") -> Iterator[tuple[Job, Row]]:
    """Rows as they are done, by ``workers`` processes of this machine. A process that dies is replaced, and the jobs
    that ran then are tried again one at a time, so that only the one that kills its process is given up.

    When the caller stops listening (Ctrl-C), the processes are ended, and what they did is in no row.
    """
    todo = deque(jobs)
    deaths: dict[Job, int] = {}
    while todo:
        running: dict[Future[Row], Job] = {}
        with _pool(workers) as pool:
            try:
                while todo or running:
                    while todo and len(running) < (1 if deaths.keys() & {todo[0], *running.values()} else workers):
                        running[pool.submit(evaluate, todo[0])] = todo[0]
                        todo.popleft()  # only now: a process that died meanwhile makes submit raise
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        row = future.result()
                        yield running.pop(future), row
            except BrokenProcessPool:
                for job in running.values():
                    deaths[job] = deaths.get(job, 0) + 1
                    if deaths[job] < _TRIES:
                        todo.appendleft(job)
                    else:
                        yield job, _died(job)


def _died(job: Job) -> Row:
    row = job.blank()
    row.reason = "its process died: out of memory?"
    return row


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    with _environment(_ENVIRONMENT):
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """In a new process: Ctrl-C is for the parent, and only rows are told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """New processes read these variables when they start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def on_ray(jobs: Sequence[Job], workers: int, address: str = "") -> Iterator[tuple[Job, Row]]:
    """Rows as they are done, by tasks of one CPU each on the Ray cluster at ``address``; where none is given, on one of
    ``workers`` CPUs that is started here. Weights and data must lie at the same paths on every node."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    where: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    variables = dict(_ENVIRONMENT)
    if not address:  # modules are found as they are here
        variables["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    ray.init(**where, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": variables})
    try:
        task = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(evaluate)
        window = max(workers, int(ray.cluster_resources().get("CPU", 1)))
        todo = deque(jobs)
        running: dict[Any, Job] = {}
        while todo or running:
            while todo and len(running) < window:
                job = todo.popleft()
                running[task.remote(job)] = job
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                job = running.pop(reference)
                try:
                    yield job, ray.get(reference)
                except ray.exceptions.RayError:
                    yield job, _died(job)
    finally:
        ray.shutdown()


Executor = Callable[[Sequence[Job], int, str], Iterator[tuple[Job, Row]]]

EXECUTORS: dict[str, Executor] = {"local": local, "ray": on_ray}

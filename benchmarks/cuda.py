"""The speed table on a GPU: ``upscale bench --device cuda``, with many models prepared at once.

``python -m benchmarks.cuda [MODEL ...] [--amounts 0.25 0.5] [--batches 1 64] [--dtypes float32 float16]
[--backends eager compile] [--seconds 2] [--at-once 16] [--out speed_cuda.csv] [--markdown docs/speed_cuda.md]``

Masking, exporting and compiling keep the CPU busy for minutes, the timing the GPU for seconds. So the processes of a
group do the former side by side, and when all are done (or a few minutes have passed) time their models one after the
other, with nothing else on the GPU. float32 is torch's default there: convolutions round to TF32. Where there is no GPU
it says so and ends with status 0, so that a script may call it anywhere."""

from __future__ import annotations

import argparse
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from upscale.bench.markdown import write_markdown
from upscale.bench.models import default_suites, find_models
from upscale.bench.rows import VARIANTS, Row, Setting, merged, read_rows, write_rows
from upscale.bench.run import ALLOCATOR, plan_jobs
from upscale.bench.show import line, tables
from upscale.bench.worker import Budget, Job, examine
from upscale.cli.bench import DEFAULT_MODELS
from upscale.zoo.process import Limits

_PATIENCE = 240.0  # seconds that a group waits for its slowest model


def measured(jobs: Sequence[Job], at_once: int) -> Iterator[list[Row]]:
    """The rows of each job, group by group."""
    context = torch.multiprocessing.get_context("spawn")
    for start in range(0, len(jobs), at_once):
        group = jobs[start : start + at_once]
        ready, turn, found = context.Barrier(len(group)), context.Lock(), context.Queue()
        processes = [context.Process(target=_one, args=(job, ready, turn, found), daemon=True) for job in group]
        for process in processes:
            process.start()
        for _ in processes:
            with suppress(Exception):  # a process that was killed: queue.Empty
                yield [Row(**row) for row in found.get(timeout=2 * _PATIENCE)]
        for process in processes:
            process.join(10)
            process.kill()


def _one(job: Job, ready: Barrier, turn: Lock, found: Any) -> None:
    """In a process of its own: prepare, wait for the others, then time alone."""
    torch.set_num_threads(1)
    waited = False

    def all_ready() -> None:
        nonlocal waited
        if not waited:
            waited = True
            torch.cuda.empty_cache()
            with suppress(threading.BrokenBarrierError):
                ready.wait(_PATIENCE)
            turn.acquire()

    rows = examine(job, lambda rows: all_ready() if any(row.stage == "time" for row in rows) else None)
    all_ready()
    turn.release()
    found.put([vars(row) for row in rows])


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """A job for each model and setting: the slow ones, of ``compile``, first."""
    settings = [
        Setting(amount, batch, form, backend, device="cuda", dtype=dtype, round_to=multiple)
        for backend, multiple, amount, batch, form, dtype in itertools.product(
            sorted(chosen.backends), chosen.round_to, chosen.amounts, chosen.batches, chosen.formats, chosen.dtypes
        )
    ]
    sources = find_models(chosen.models or DEFAULT_MODELS, default_suites())
    budget = Budget(rounds=200, warmup=5, seconds=chosen.seconds)
    return plan_jobs(sources, settings, None, chosen.variants, budget, Limits())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--formats", nargs="+", default=["contiguous"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    parser.add_argument("--backends", nargs="+", default=["eager"])
    parser.add_argument("--round-to", nargs="+", type=int, default=[1], help="multiples that channels are kept at")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed rounds, for each model and setting")
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("speed_cuda.csv"))
    parser.add_argument("--markdown", type=Path)
    chosen = parser.parse_args(arguments)
    console = Console(width=140)
    if not torch.cuda.is_available():
        console.print("torch finds no CUDA device here: nothing is measured")
        return
    os.environ.update(ALLOCATOR | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    rows: list[Row] = []
    for new in measured(jobs_of(chosen), chosen.at_once):
        rows += new
        write_rows(chosen.out, merged(read_rows(chosen.out), new))
        console.print(line(new), highlight=False)
    for table in tables(rows):
        console.print(table)
    if chosen.markdown:
        write_markdown(chosen.markdown, rows, "python -m benchmarks.cuda")


if __name__ == "__main__":
    main()

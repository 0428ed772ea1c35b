"""Fuzz the compiler: ``make fuzz SECONDS=60`` or ``python -m benchmarks.fuzz [--seconds 60] [--seed 0] [--count N]``.

Random networks over all operator families, random masks; masked and exported model must agree to 1e-10 in float64.
The seed of an example is ``--seed`` plus its number, so ``--seed 123 --count 1`` repeats one. Failures are shrunk and
written as standalone scripts to ``fuzz-failures/``; the exit status is 1 where there was one.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import ROOT
from .generate import FAMILIES
from .session import Session
from .verdict import BAD, GOOD, Verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, report, and say whether all went well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to draw examples (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first example (default 0)")
    parser.add_argument("--count", type=int, help="stop after so many examples")
    parser.add_argument("--longest", type=int, default=10, help="steps of the longest networks (default 10)")
    parser.add_argument("--focus", default="", help="draw families with this in their name ten times as often")
    parser.add_argument("--masks", type=int, default=4, help="further masks of each network, captured once (default 4)")
    parser.add_argument("--limit", type=float, default=30, help="seconds after which an example hangs (default 30)")
    parser.add_argument("--shrink", type=float, default=60, help="seconds for shrinking one failure (default 60)")
    parser.add_argument("--folder", type=Path, default=ROOT / "fuzz-failures", help="where the scripts go")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(file=sys.stdout)  # this very file: judging redirects what torch prints
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=200)
    session = Session(chosen.folder, chosen.limit, chosen.shrink, chosen.longest, chosen.focus, chosen.masks)
    seeds = itertools.count(chosen.seed) if chosen.count is None else range(chosen.seed, chosen.seed + chosen.count)
    _run(session, seeds, chosen.seconds, console)
    _report(session, console)
    return 1 if session.failures else 0


def _run(session: Session, seeds: Sequence[int] | itertools.count[int], seconds: float, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fuzzing", total=seconds)

        def tell(seed: int, verdict: Verdict) -> None:
            # A loop inside a C function hears no signal: the process then ends with a traceback.
            patience = session.limit * 10 + session.shrink_seconds * 2
            faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
            done = sum(session.outcomes.values())
            text = f"seed {seed}: {done} examples, {len(session.failures)} distinct failures"
            progress.update(task, description=text, completed=progress.tasks[0].elapsed or 0)
            if verdict.failed:
                line = f"seed {seed}: {verdict.outcome}: {verdict.mark} {verdict.detail}"
                console.print(line, markup=False, soft_wrap=True)

        session.run(seeds, seconds, tell)
        faulthandler.cancel_dump_traceback_later()


def _report(session: Session, console: Console) -> None:
    outcomes = [o for o in (*BAD, *GOOD) if session.outcomes[o]]
    table = Table(title="Examples by operator family and outcome")
    table.add_column("family")
    for outcome in outcomes:
        table.add_column(outcome, justify="right", style="red" if outcome in BAD else "")
    for family in FAMILIES:
        counts = session.families.get(family, {})
        table.add_row(family, *(str(counts.get(o, 0) or "") for o in outcomes))
    table.add_section()
    table.add_row("all", *(str(session.outcomes[o]) for o in outcomes))
    console.print(table)
    for note, count in session.notes.most_common():
        console.print(f"note in {count} reports: {note[:100]}", markup=False)
    for failure in sorted(session.failures, key=lambda f: (*BAD, *GOOD).index(f.verdict.outcome)):
        steps = ", ".join(step.op for step in failure.graph.steps)
        console.rule(f"{failure.verdict.outcome} ({failure.count}x)")
        console.print(f"{failure.verdict.mark}\n{failure.verdict.detail}\nsteps: {steps}\n{failure.path}", markup=False)
        console.print(failure.path.read_text(), markup=False, highlight=False, soft_wrap=True)
    count = sum(session.outcomes.values())
    console.print(f"{count} examples, {len(session.failures)} distinct failures", markup=False)


if __name__ == "__main__":
    raise SystemExit(main())

"""One fuzzing session: examples one after the other, outcomes counted, failures shrunk and written down."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from .build import Reject
from .generate import FAMILY_OF, draw
from .graph import Graph
from .judge import judge, judge_more
from .script import standalone
from .shrink import Shrinker
from .verdict import Verdict

#: Outcomes after which the network can be captured once more, for further masks.
CAPTURED = ("smaller", "same size", "nothing to prune", "constant output")


@dataclass
class Failure:
    """A failure with its smallest example."""

    seed: int
    verdict: Verdict
    graph: Graph
    path: Path
    count: int = 1


@dataclass
class Session:
    """The counts so far. ``folder`` takes a script for each distinct failure."""

    folder: Path
    limit: float = 30.0
    shrink_seconds: float = 60.0
    longest: int = 10
    focus: str = ""  # families drawn ten times as often
    masks: int = 4  # further masks of every network that was exported
    outcomes: Counter[str] = field(default_factory=Counter)
    families: dict[str, Counter[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def run(self, seeds: Iterable[int], seconds: float, tell: Callable[[int, Verdict], None]) -> None:
        """Draw and judge one example per seed until the time is up; ``tell`` hears of each."""
        stop = time.monotonic() + seconds
        for seed in seeds:
            if time.monotonic() > stop:
                return
            tell(seed, self.example(seed))

    def command(self, seed: int) -> str:
        """What to type to see the example of a seed again."""
        given = (("longest", self.longest), ("focus", self.focus), ("masks", self.masks))
        defaults = {f.name: f.default for f in fields(self)}
        options = [f" --{name} {value!r}" for name, value in given if value != defaults[name]]
        return f"python -m benchmarks.fuzz --seed {seed} --count 1{''.join(options)}"

    def example(self, seed: int) -> Verdict:
        """Judge the example of one seed."""
        graph = draw(seed, self.longest, self.focus)
        verdict = self._judge(graph)
        self._count(seed, graph, verdict)
        if verdict.outcome in CAPTURED and not graph.spatial:
            for masked, found in judge_more(graph, self.masks, self.limit):
                if found.failed:
                    found = self._judge(masked)  # by the public call
                self._count(seed, masked, found)
                if found.failed:
                    return found
        return verdict

    def _count(self, seed: int, graph: Graph, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        for family in graph.families(FAMILY_OF):
            self.families.setdefault(family, Counter())[verdict.outcome] += 1
        self.notes.update({_kind(note) for note in verdict.notes})
        if verdict.failed:
            self._record(seed, graph, verdict)

    def _judge(self, graph: Graph) -> Verdict:
        """The verdict; a fault of the fuzzer itself is one too, so that a long session goes on."""
        try:
            return judge(graph, self.limit)
        except Reject:
            return Verdict("invalid")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return Verdict("fuzzer error", f"{type(error).__name__} in {place.name}", traceback.format_exc())

    def _record(self, seed: int, graph: Graph, verdict: Verdict) -> None:
        """Shrink a failure and write its script, unless one like it was written before."""
        for known in self.failures:
            if known.verdict.like(verdict) and not verdict.vague:
                known.count += 1
                return
        small = Shrinker(graph, lambda g: self._judge(g).like(verdict), self.shrink_seconds).run()
        for known in self.failures:
            if known.verdict.like(verdict) and _ops(known.graph) == _ops(small):
                known.count += 1
                return
        verdict = self._judge(small)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{verdict.outcome.split(',')[0].replace(' ', '_')}_{seed}.py"
        path.write_text(standalone(small, verdict, self.command(seed)))
        self.failures.append(Failure(seed, verdict, small, path))


def _kind(note: str) -> str:
    """A note of a report without the names in it."""
    return "a weight is computed from others" if " is computed from " in note else note.split(":")[0]


def _ops(graph: Graph) -> list[str]:
    """The operators of a graph: two failures with the same ones are taken for the same."""
    return sorted(step.op for step in graph.steps)

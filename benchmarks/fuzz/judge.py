"""Judges an example: builds it, exports it, compares. Further masks of the same network are judged on one capture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from .build import Reject, rebuild
from .case import CapturedCase, Case
from .catalogue import CATALOGUE
from .graph import Graph
from .source import network
from .verdict import Hang, Verdict, mark_of, place_of, quiet, text_of, time_limit
from .zeros import Masker


def judge(graph: Graph, limit: float = 30.0) -> Verdict:
    """Build, export and compare. Raises Reject where the graph is no valid network."""
    builder, graph = rebuild(graph, CATALOGUE)
    source = network(builder, graph)
    try:
        with time_limit(limit), quiet(), torch.no_grad():
            return Case(graph, source).examine()
    except Hang as error:
        return Verdict("hang", place_of(error), f"more than {limit:g} seconds, in {place_of(error)}")


def judge_more(graph: Graph, count: int, limit: float = 30.0) -> Iterator[tuple[Graph, Verdict]]:
    """The same network with ``count`` other masks. Failures are found by the parts of the library, not by its public
    call: judge them again."""
    builder, graph = rebuild(replace(graph, zeros=()), CATALOGUE)
    rng = random.Random(graph.seed + 1)
    case = None
    for _ in range(count):
        masked = replace(graph, zeros=Masker(builder, rng).draw(), reads=(rng.choice(("auto", "gather", "baseline")),))
        try:
            with time_limit(limit), quiet(), torch.no_grad():
                case = CapturedCase(graph, network(builder, graph)) if case is None else case
                verdict = case.masked(masked.zeros, masked.reads[0])
        except Hang as error:
            verdict = Verdict("hang", place_of(error), f"more than {limit:g} seconds")
        except Reject:
            return
        except Exception as error:
            verdict = Verdict("fuzzer error", mark_of(error), text_of(error))
        if verdict is not None:
            yield masked, verdict

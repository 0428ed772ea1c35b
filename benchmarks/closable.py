"""How much of the gap between constrained and unconstrained masks any contiguous masks can close, without a network.

``python -m benchmarks.closable [--channels 24] [--readers 2 3 4 5] [--amounts 0.1 0.25 0.5]``

Readers of one tensor each score its channels at random and keep equally many. *Best*: of all places of all intervals,
each with its best order (a transportation problem, solved exactly), so no contiguous masks retain more. *Found*:
what ``MaskingManager(method="contiguous")`` would choose. Both are shares of the gap in retained importance, medians
over random families."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from upscale.contiguous import Chain, Piece, Reader, Space, agreed, arrange, free
from upscale.contiguous.transport import assign
from upscale.retained import Retained, SpaceRetained

MOST = 200_000  # combinations of intervals that are all tried


def family(random: np.random.Generator, channels: int, readers: int, keep: int, common: float) -> Space:
    """``common``: the correlation of two readers' scores before they are made positive."""
    shared = random.normal(size=channels) * np.sqrt(common)
    scores = np.exp((shared + random.normal(size=(readers, channels)) * np.sqrt(1 - common)) / 4)
    chain = Chain((np.arange(channels),), np.zeros(channels, dtype=bool))
    every = np.ones(channels, dtype=bool)
    return Space((chain,), tuple(Reader((Piece(0, row, every),), keep) for row in scores))


def best(space: Space) -> float:
    """The most that any order and any intervals retain: every combination of places is tried, but for mirrored ones."""
    scores = np.stack([reader.pieces[0].scores for reader in space.readers])
    (keep,) = {reader.keep for reader in space.readers}
    readers, channels = scores.shape
    slack, found = channels - keep, 0.0
    for starts in product(range(slack + 1), repeat=readers):
        if starts > tuple(slack - start for start in starts):
            continue  # the same, seen from the other end
        found = max(found, _ordered(scores, keep, starts))
    return found


def _ordered(scores: np.ndarray, keep: int, starts: Sequence[int]) -> float:
    """What the best order for given intervals retains."""
    places = np.arange(scores.shape[1])
    cover = np.array([(places >= start) & (places < start + keep) for start in starts])
    kinds = np.concatenate([[0], np.cumsum((cover[:, 1:] != cover[:, :-1]).any(0))])
    worth = scores.T @ cover[:, np.flatnonzero(np.diff(kinds, prepend=-1))].astype(np.float64)
    return float(worth[np.arange(len(places)), assign(worth, kinds)].sum())


def closed(space: Space, retained: float) -> float:
    """The share of the gap."""
    low, high = float(agreed(space).retained.sum()), float(free(space).sum())
    return Retained((SpaceRetained((), (), 0.0, low, retained, high),)).closed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=24)
    parser.add_argument("--readers", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="masked by each reader")
    parser.add_argument("--common", type=float, nargs="+", default=[0.0, 0.5], help="correlation of the scores")
    parser.add_argument("--families", type=int, default=5)
    chosen = parser.parse_args(arguments)
    if min(chosen.channels - 1, chosen.families, *chosen.readers) < 1 or not all(0 < a < 1 for a in chosen.amounts):
        parser.error("at least two channels, a family and a reader are needed, and amounts between 0 and 1")
    console = Console(width=100)
    table = Table(title=f"Gap closed, {chosen.channels} channels, median of {chosen.families} families")
    for title in ("readers", "masked", "correlation", "best", "found"):
        table.add_column(title, justify="right")
    settings = list(product(chosen.readers, chosen.amounts, chosen.common))
    for readers, amount, common in track(settings, "searching", console=Console(stderr=True), transient=True):
        keep = max(1, chosen.channels - max(1, round(amount * chosen.channels)))
        random = np.random.default_rng(0)
        spaces = [family(random, chosen.channels, readers, keep, common) for _ in range(chosen.families)]
        is_small = (chosen.channels - keep + 1) ** readers <= MOST
        most = f"{median(closed(s, best(s)) for s in spaces):.0%}" if is_small else "-"
        found = median(closed(s, float(arrange(s).retained.sum())) for s in spaces)
        table.add_row(str(readers), f"{amount:.0%}", f"{common:g}", most, f"{found:.0%}")
    console.print(table)


if __name__ == "__main__":
    main()

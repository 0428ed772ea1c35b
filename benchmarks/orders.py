"""Orders of channels on random families of readers, without a network: cost, lower bound, time.

Costs are shares of what all readers together would pay for gathers: of the original order, of the order planned, and
of the bound below which no order gets. ``python -m benchmarks.orders --channels 4096 --readers 60 --piece 200``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from upscale.plan.order import Wish, cost_of, order_space

Family = Callable[[np.random.Generator, int, int], list[np.ndarray]]


def independent(density: float) -> Family:
    """Every reader wants every channel with the same probability."""
    return lambda generator, count, readers: [generator.random(count) < density for _ in range(readers)]


def windows(noise: float, shortest: float = 0.05, longest: float = 0.7) -> Family:
    """Windows of a hidden order, a share ``noise`` of their channels flipped; lengths are shares of the channels."""

    def family(generator: np.random.Generator, count: int, readers: int) -> list[np.ndarray]:
        place = generator.permutation(count)
        found = []
        for _ in range(readers):
            length = max(2, int(count * generator.uniform(shortest, longest)))
            begin = int(generator.integers(0, count - length + 1))
            window = (begin <= place) & (place < begin + length)
            found.append(window ^ (generator.random(count) < noise))
        return found

    return family


def nested(generator: np.random.Generator, count: int, readers: int) -> list[np.ndarray]:
    """Every reader wants the most important channels, each another number of them."""
    importance = generator.random(count)
    return [importance < level for level in generator.uniform(0.05, 0.95, readers)]


def correlated(correlation: float, keep: float = 0.5) -> Family:
    """The share ``keep`` of greatest scores; scores of two readers correlate by ``correlation``, as L2 norms do."""

    def family(generator: np.random.Generator, count: int, readers: int) -> list[np.ndarray]:
        common = generator.normal(size=count) * np.sqrt(correlation)
        scores = [common + generator.normal(size=count) * np.sqrt(1 - correlation) for _ in range(readers)]
        return [s > np.quantile(s, 1 - keep) for s in scores]

    return family


FAMILIES: dict[str, Family] = {
    "independent, 90 %": independent(0.9),
    "independent, 50 %": independent(0.5),
    "independent, 10 %": independent(0.1),
    "independent, 2 %": independent(0.02),
    "nested": nested,
    "windows": windows(0.0),
    "windows, 0.01 % noise": windows(0.0001),
    "windows, 0.1 % noise": windows(0.001),
    "short windows, 0.02 % noise": windows(0.0002, 0.01, 0.1),
    "correlated 0.6": correlated(0.6),
    "correlated 0.99": correlated(0.99),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=4096, help="channels of the space (default: 4096)")
    parser.add_argument("--readers", type=int, default=60, help="readers of the space (default: 60)")
    parser.add_argument(
        "--piece",
        type=float,
        default=float("inf"),
        help="cost of one more slice, where a gather costs 1 to 8 per channel (default: slices are never joined)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random families (default: 0)")
    chosen = parser.parse_args()
    if chosen.channels < 2 or chosen.readers < 1 or not chosen.piece >= 0:
        parser.error("give at least 2 channels and 1 reader, and a piece cost of 0 or more")
    table = Table("family", "original", "planned", "bound", "proven", "seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, family in FAMILIES.items():
        generator = np.random.default_rng(chosen.seed)
        sets = family(generator, chosen.channels, chosen.readers)
        prices = generator.choice([1.0, 2.0, 4.0, 8.0], chosen.readers)
        wishes = [Wish(s, float(p * s.sum()), chosen.piece) for s, p in zip(sets, prices, strict=True)]
        begin = time.perf_counter()
        found = order_space([np.arange(chosen.channels)], wishes)
        seconds = time.perf_counter() - begin
        total = sum(w.gather for w in wishes) or 1.0
        costs = [cost_of(np.arange(chosen.channels), wishes), found.cost, found.bound]
        table.add_row(name, *(f"{c / total:.4f}" for c in costs), "yes" if found.proven else "no", f"{seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

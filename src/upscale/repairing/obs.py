"""Second-order masks: which input channels a network can do without, once each layer is fitted again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import InputError
from ..importance.batches import FromBatches, checked_batches
from ..importance.progress import progress_bar
from ..importance.subject import Subject, without_score
from ..mask_arguments import penalty
from ..observe import quietly_evaluated
from ..printing import listed
from ..program import Program
from .curve import along, increments
from .eliminate import Path, eliminate
from .moments import Moments
from .pair import collect, paired_with_itself
from .samples import Samples
from .sensitivity import Change, Sensitivity
from .sites import Site, find_sites
from .tape import Frontier, Tape

__all__ = ["OBS"]

_KEPT = 1 << 30  # bytes of activations
_CHANGES = 1 << 29  # bytes of changed weights that are held at once
# After which shares of the removals the error of the network's outputs is estimated.
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
# What layers behind, which are fitted again too, leave of an error: see `benchmarks.foretold`. What a classifier does
# wrong stays wrong.
_LEFT = 0.5


class OBS(FromBatches):
    """Optimal brain surgeon on input channels: what the outputs lose although the rest of the layer is fitted again.

    A layer's channels are removed one by one; each time it is the one whose removal, all remaining weights (and the
    constant) being fitted to the layer's output again, adds least to its mean square error, where each output counts as
    much as the network's outputs depend on it (Hassibi and Stork 1993, "Second order derivatives for network pruning";
    for blocks of weights Frantar and Alistarh 2022, arXiv 2208.11580, equation 5; for channels Kurtic, Frantar and
    Alistarh 2023, "ZipLM", arXiv 2302.04089, section 3). What that does to the network's outputs is estimated after six
    numbers of removals, to first order, on held-out examples; where other layers follow, half of it is taken to be left
    once they are fitted again. A channel's score is what its removal adds to the mean square error of the outputs,
    relative to theirs, along the greatest convex curve below these errors. So scores of different layers compare: with
    ``is_global=True``, or a budget, masks go where the network misses them least.

    These are the masks to repair afterwards, by :func:`upscale.repair` on the same batches: the weights are not changed
    by the score. Only for ``side="input"``. The groups of a layer are fitted on their own. A layer by which the outputs
    have no derivative is scored by the error of what it writes itself.

    Parameters
    ----------
    batches:
        What the model is called with; see :func:`upscale.importance.batches.feed`. Labels are ignored.
    seed:
        Of the places of the feature maps that are sampled, and of the directions in which outputs are differentiated.
    damping:
        What is added to the diagonal of the Gram matrix of what a layer reads, of its mean. The more, the less the
        other channels are taken to make up for what goes, and the more weights count beside these examples: for few
        examples of many kinds try 1.
    """

    compares_layers = True
    measures_error = True

    def __init__(self, batches: object, seed: int = 0, damping: float = 0.01) -> None:
        super().__init__(checked_batches(batches))
        self._seed: int = seed
        self._damping: float = penalty("damping", damping)

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`. Raises ``InputError`` for the output side, and for layers whose weights are
        computed or not all their own."""
        if subject.side != "input":
            raise InputError('OBS scores the channels that a layer reads: side="input"')
        inputs = collect(subject.model, self._batches, "OBS")
        with quietly_evaluated(subject.model):
            pair = paired_with_itself(subject.model, inputs)
            sites, left = find_sites(pair, subject.model)
            _check_all(subject, sites, left)
            tape = Tape(pair.masked, inputs.device)
            frontier = Frontier((tape, tape), inputs.leaves, _KEPT)
            with progress_bar("obs", len(sites) + 2) as advance:
                sensitivity = Sensitivity(pair.masked, inputs, sites, self._seed)
                found = _Curves(sensitivity, _followed(pair.masked, sites), self._damping)
                advance()
                for number, site in enumerate(sites):
                    if site.name in subject.layers:
                        found.add(site, Samples(site, frontier, inputs.sizes, self._seed + number).sums.used)
                    advance()
                scores = found.scores()
                advance()
            return scores


def _check_all(subject: Subject, sites: list[Site], left: Mapping[str, str]) -> None:
    names = {site.name for site in sites}
    missing = [name for name in subject.layers if name not in names]
    if missing:
        reason = left.get(missing[0], "no batch reaches it")
        raise InputError(
            f"OBS cannot score {listed(missing)} ({missing[0]}: {reason}): leave them alone with "
            f"{without_score(missing)}, or choose another score"
        )


def _followed(program: Program, sites: Sequence[Site]) -> frozenset[str]:
    """The layers whose results other layers read, directly or through other operators."""
    owners = {call.node: site.name for site in sites for call in site.calls}
    above: set[fx.Node] = set()  # what a layer's result depends on
    for node in reversed(program.graph.nodes):
        if node in owners or node in above:
            above.update(node.all_input_nodes)
    return frozenset(name for node, name in owners.items() if node in above)


@dataclass(frozen=True, eq=False)
class _Removed:
    """All channels of a layer, removed one by one, and the layer's changes after so many of the removals."""

    path: Path
    changes: dict[int, Change]


class _Curves:
    """The error curves of layers, of whose changed weights some are held until the network's errors are estimated."""

    def __init__(self, sensitivity: Sensitivity, followed: Set[str], damping: float) -> None:
        self._sensitivity, self._factors, self._followed = sensitivity, sensitivity.factors(), followed
        self._damping = damping
        self._pending: dict[str, _Removed] = {}
        self._found: dict[str, Tensor] = {}
        self._held = 0

    def add(self, site: Site, moments: Moments) -> None:
        """One more layer; ``moments``: of what it reads and writes."""
        factors = self._factors.get(site.name)
        if factors is None:
            self._found[site.name] = _scores_of_itself(site, moments, self._damping)
            return
        removed = _removed(site, moments, factors, self._damping)
        self._pending[site.name] = removed
        self._held += sum(change.weight.nbytes for change in removed.changes.values())
        if self._held > _CHANGES:
            self._estimate()

    def scores(self) -> dict[str, Tensor]:
        """Of all layers, by channel: float64, on the CPU."""
        if self._pending:
            self._estimate()
        return self._found

    def _estimate(self) -> None:
        errors = self._sensitivity.errors({name: list(one.changes.values()) for name, one in self._pending.items()})
        for name, one in self._pending.items():
            curve = along(one.path.costs.numpy(), list(one.changes), errors[name])
            self._found[name] = _by_channel(one.path, curve * (_LEFT if name in self._followed else 1.0))
        self._pending, self._held = {}, 0


def _by_channel(path: Path, curve: np.ndarray) -> Tensor:
    """Scores from the error after each removal."""
    scores = torch.empty(len(curve), dtype=torch.float64)
    scores[path.order.cpu()] = torch.from_numpy(increments(curve))
    return scores


def _problem(site: Site, moments: Moments) -> tuple[Tensor, Tensor, int]:
    """A layer's weight as rows, the Gram matrix of what it reads, and the size of its window."""
    rows = site.geometry.rows_of(site.weight.detach()).double()
    return rows, moments.regression(rows, site.shift is not None).gram, math.prod(site.geometry.window)


def _scores_of_itself(site: Site, moments: Moments, damping: float) -> Tensor:
    """By the error of what the layer writes, relative to that without any channel; none if it never changes."""
    rows, gram, window = _problem(site, moments)
    path = eliminate(gram, rows, window, torch.ones_like(rows[..., 0]), damping)
    costs, varies = path.costs.numpy(), bool(((rows @ gram) * rows).sum() > 0)
    return _by_channel(path, np.cumsum(costs) / costs.sum() if varies else np.zeros_like(costs))


def _removed(site: Site, moments: Moments, factors: Tensor, damping: float) -> _Removed:
    """``factors``: how much the error of each output counts."""
    rows, gram, window = _problem(site, moments)
    channels = len(gram) * (gram.shape[1] // window)
    counts = sorted({math.ceil(share * channels) for share in _SHARES})
    path = eliminate(gram, rows, window, factors.view(rows.shape[:2]).to(rows), damping, counts)
    changes = {}
    for count, weight in path.weights.items():
        change = weight - rows
        shift = torch.zeros_like(rows[..., 0])
        if site.shift is not None:  # the constant makes up for the mean of what is missing
            shift = -(change @ (moments.x / moments.count).unsqueeze(2)).squeeze(2)
        changed = site.geometry.weight_of(change, site.weight.shape).to(site.weight.dtype)
        changes[count] = Change(changed, shift.flatten())
    return _Removed(replace(path, weights={}), changes)

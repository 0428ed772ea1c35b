"""Second-order masks: which input channels a layer can do without, once its other weights have been fitted anew."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..importance.batches import FromBatches, checked_batches
from ..importance.progress import progress_bar
from ..importance.subject import Subject, listed, without_score
from ..observe import quietly_evaluated
from .moments import Moments
from .pair import collect, paired_with_itself
from .samples import Samples
from .sites import Site, find_sites
from .tape import Frontier, Tape

__all__ = ["OBS", "eliminated"]

_DAMPING = 1e-2  # of the mean of the Gram matrix's diagonal
_KEPT = 1 << 30  # bytes of activations


class OBS(FromBatches):
    """Optimal brain surgeon on blocks of input channels: what the layer's output loses although the rest is refitted.

    Channels are removed one by one; each time it is the one whose removal, all remaining weights (and the constant)
    being fitted to the layer's output again, adds least to the mean square error. A channel's score is the error after
    its removal, relative to the output's mean square about its mean. (Hassibi and Stork 1993, "Second order
    derivatives for network pruning"; for blocks of weights Frantar and Alistarh 2022, arXiv 2208.11580, equation 5;
    for channels Kurtic, Frantar and Alistarh 2023, "ZipLM", arXiv 2302.04089, section 3.)

    These are the masks to repair afterwards, by :func:`upscale.repair` on the same batches: the weights are not changed
    by the score. Only for ``side="input"``. Of a grouped layer, each group is taken on its own.

    Parameters
    ----------
    batches:
        What the model is called with; see :func:`upscale.importance.batches.feed`. Labels are ignored.
    seed:
        Of the places of the feature maps that are sampled.
    """

    compares_layers = True

    def __init__(self, batches: object, seed: int = 0) -> None:
        super().__init__(checked_batches(batches))
        self._seed = seed

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`. Raises ``InputError`` for the output side, and for layers whose weights are
        computed or not all their own."""
        if subject.side != "input":
            raise InputError('OBS scores the channels that a layer reads: side="input"')
        model = subject.model
        inputs = collect(model, self._batches)
        found: dict[str, Tensor] = {}
        with quietly_evaluated(model):
            pair = paired_with_itself(model, inputs)
            sites, left = find_sites(pair, model)
            tape = Tape(pair.masked, inputs.device)
            frontier = Frontier((tape, tape), inputs.leaves, _KEPT)
            with progress_bar("obs", len(sites)) as advance:
                for number, site in enumerate(sites):
                    if site.name in subject.layers:
                        moments = Samples(site, frontier, inputs.sizes, self._seed + number).sums.used
                        found[site.name] = _scores(site, moments)
                    advance()
        _check_all(subject, found, left)
        return found


def _check_all(subject: Subject, found: dict[str, Tensor], left: dict[str, str]) -> None:
    missing = [name for name in subject.layers if name not in found]
    if missing:
        reason = left.get(missing[0], "no batch reaches it")
        raise InputError(
            f"OBS cannot score {listed(missing)} ({missing[0]}: {reason}): leave them alone with "
            f"{without_score(missing)}, or choose another score"
        )


def _scores(site: Site, moments: Moments) -> Tensor:
    """One an input channel: float64, on the CPU."""
    rows = site.geometry.rows_of(site.weight.detach()).double()
    gram = moments.regression(rows, site.shift is not None).gram
    window = int(torch.tensor(site.geometry.window).prod()) if site.geometry.window else 1
    energy = float(((rows @ gram) * rows).sum()) or 1.0
    errors = [eliminated(one, weight, window) for one, weight in zip(gram, rows, strict=True)]
    return torch.cat(errors).cpu() / energy


def eliminated(gram: Tensor, weight: Tensor, window: int) -> Tensor:
    """The error after each channel's removal, (channels,), in the order that adds least each time.

    ``gram``: (channels x window, channels x window), float64; ``weight``: (outputs, channels x window).
    """
    size = len(gram)
    channels = size // window
    damping = _DAMPING * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    inverse = torch.linalg.inv(gram + damping * torch.eye(size, dtype=gram.dtype, device=gram.device))
    weight, places = weight.clone(), torch.arange(size, device=gram.device).view(channels, window)
    found = torch.zeros(channels, dtype=gram.dtype, device=gram.device)
    gone = torch.zeros(channels, dtype=torch.bool, device=gram.device)
    identity = torch.eye(window, dtype=gram.dtype, device=gram.device)
    total = torch.zeros((), dtype=gram.dtype, device=gram.device)
    for _ in range(channels):
        blocks = inverse[places.unsqueeze(2), places.unsqueeze(1)]
        blocks = torch.where(gone[:, None, None], identity, blocks)
        columns = weight.view(-1, channels, window).permute(1, 2, 0)  # (channels, window, outputs)
        costs = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2)).masked_fill(gone, torch.inf)
        chosen = int(costs.argmin())
        total = total + costs[chosen].clamp_min(0)
        found[chosen] = total
        here = places[chosen]
        change = torch.linalg.solve(blocks[chosen], inverse[here])  # (window, size)
        weight -= weight[:, here] @ change
        inverse -= inverse[:, here] @ change
        gone[chosen] = True
        weight[:, here] = 0
        inverse[here], inverse[:, here] = 0, 0
    return found

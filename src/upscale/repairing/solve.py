"""Ridge regression where every output may have zeros of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .moments import Regression

__all__ = ["changes"]

_SMALL = 64  # unknowns up to which all groups are solved in one batch, those that are zero standing in as the identity

_SINGULAR = 1e-12  # of the largest: eigenvalues of sums of products in float64 are no more exact


def changes(problem: Regression, kept: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """For each of ``ridges`` the change (groups, M, K) of the weights that fits best; zero where not ``kept``.

    ``kept``: bool (groups, M, K). A ridge is relative to the mean of the Gram matrix's diagonal over what is kept:
    the solution of ``(G + ridge * mean(diag G) I) d = right``, the change that a penalty on ``|d|^2`` leaves. So a
    large ridge keeps the weights that are there (Hoerl and Kennard 1970, "Ridge Regression", with the prior at the
    present weights in place of zero).
    """
    groups, _, unknowns = kept.shape
    alone = groups > 1 and unknowns <= _SMALL
    solvers = [_Batched(problem, kept)] if alone else [_ByPattern(problem, kept, group) for group in range(groups)]
    for ridge in ridges:
        parts = [solver.change(ridge) for solver in solvers]
        yield parts[0] if alone else torch.stack(parts)


class _ByPattern:
    """One group: the outputs that keep the same inputs share one matrix, of what they keep only."""

    def __init__(self, problem: Regression, kept: Tensor, group: int) -> None:
        self._gram, self._right, self._kept = problem.gram[group], problem.right[group], kept[group]
        patterns, which = torch.unique(self._kept, dim=0, return_inverse=True)
        self._parts = [
            (torch.nonzero(which == number).flatten(), torch.nonzero(pattern).flatten())
            for number, pattern in enumerate(patterns)
        ]

    def change(self, ridge: float) -> Tensor:
        """(M, K)."""
        found = torch.zeros_like(self._kept, dtype=self._gram.dtype)
        for rows, columns in self._parts:
            if len(columns):
                gram = self._gram[columns][:, columns]
                found[rows[:, None], columns] = _solved(gram, self._right[columns][:, rows], ridge).mT
        return found


class _Batched:
    """Many small groups: every output is a problem of its own, all of one size."""

    def __init__(self, problem: Regression, kept: Tensor) -> None:
        keeps = kept.double().unsqueeze(-1)  # (groups, M, K, 1)
        self._gram = problem.gram.unsqueeze(1) * keeps * keeps.mT
        self._right = problem.right.mT.unsqueeze(-1) * keeps
        self._size = keeps.sum((-1, -2), keepdim=True).clamp_min(1)
        self._absent = torch.diag_embed(1 - keeps.squeeze(-1))

    def change(self, ridge: float) -> Tensor:
        """(groups, M, K)."""
        scale = self._gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] / self._size
        absent = self._absent * scale.clamp_min(torch.finfo(torch.float64).tiny)
        return _solved(self._gram + absent, self._right, ridge, scale).squeeze(-1)


def _solved(gram: Tensor, right: Tensor, ridge: float, scale: Tensor | None = None) -> Tensor:
    """Solve with the ridge on the diagonal: by Cholesky; the least of all solutions where the matrix is singular."""
    if scale is None:
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    loaded = gram + ridge * scale * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(loaded)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    # A pivot that is all rounding error is no pivot, even where its square came out positive.
    small = pivots.square().amin(-1) <= _SINGULAR * pivots.square().amax(-1)
    if not bool((failed != 0).any() | small.any()):
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(loaded, hermitian=True, rtol=_SINGULAR) @ right

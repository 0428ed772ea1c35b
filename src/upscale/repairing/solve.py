"""Ridge regression where every output may have zeros of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .moments import Regression

__all__ = ["changes"]

_SMALL = 64  # unknowns up to which all groups are solved in one batch, those that are zero standing in as the identity

_AT_ONCE = 64  # outputs
_MANY = 8  # patterns from which on one inverse for all is worth it
_SCATTERED = 0.25  # of the unknowns: zeros that only some outputs have, at most

_SINGULAR = 1e-12  # of the largest: eigenvalues of sums of products in float64 are no more exact


def changes(problem: Regression, kept: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """For each of ``ridges`` the change (groups, M, K) of the weights that fits best; zero where not ``kept``.

    ``kept``: bool (groups, M, K). A ridge is relative to the mean of the Gram matrix's diagonal over what is kept (by
    any output, where each has few zeros of its own): the solution of ``(G + ridge * mean(diag G) I) d = right``, the
    change that a penalty on ``|d|^2`` leaves. So a large ridge keeps the weights that are there (Hoerl and Kennard
    1970, "Ridge Regression", with the prior at the present weights in place of zero).
    """
    groups, _, unknowns = kept.shape
    alone = groups > 1 and unknowns <= _SMALL
    solvers = [_Batched(problem, kept)] if alone else [_ByPattern(problem, kept, group) for group in range(groups)]
    for ridge in ridges:
        parts = [solver.change(ridge) for solver in solvers]
        yield parts[0] if alone else torch.stack(parts)


class _ByPattern:
    """One group. Outputs that lack few of the inputs that any keeps are solved from one inverse; of the others those
    that keep the same inputs share one matrix, of what they keep only."""

    def __init__(self, problem: Regression, kept: Tensor, group: int) -> None:
        self._gram, self._right, self._kept = problem.gram[group], problem.right[group], kept[group]
        self._union = self._kept.any(0)
        few = (self._union & ~self._kept).sum(1) <= _SCATTERED * self._union.sum()
        if len(torch.unique(self._kept[few], dim=0)) <= _MANY:
            few = torch.zeros_like(few)
        self._together, self._alone = torch.nonzero(few).flatten(), torch.nonzero(~few).flatten()
        self._parts = self._by_pattern(self._alone)

    def change(self, ridge: float) -> Tensor:
        """(M, K)."""
        found = torch.zeros_like(self._kept, dtype=self._gram.dtype)
        parts = self._parts
        if len(self._together):
            shared = self._constrained(self._together, ridge)
            if shared is None:
                parts = parts + self._by_pattern(self._together)
            else:
                found[self._together] = shared
        for outputs, columns in parts:
            found[outputs[:, None], columns] = self._unconstrained(outputs, columns, ridge)
        return found

    def _by_pattern(self, outputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of ``outputs`` those that keep the same inputs, and these inputs; none that keep nothing."""
        patterns, which = torch.unique(self._kept[outputs], dim=0, return_inverse=True)
        return [
            (outputs[which == number], torch.nonzero(pattern).flatten())
            for number, pattern in enumerate(patterns)
            if bool(pattern.any())
        ]

    def _constrained(self, outputs: Tensor, ridge: float) -> Tensor | None:
        """Of ``outputs``, (outputs, K), from one inverse for all. Each has few zeros of its own: constraints, whose
        multipliers are solved for (Boyd and Vandenberghe, "Convex Optimization", section 10.1.1). None where the matrix
        is singular."""
        columns = torch.nonzero(self._union).flatten()
        missing = ~self._kept[outputs][:, columns]
        factor = _factor(_loaded(self._gram[columns][:, columns], ridge))
        if factor is None:
            return None
        inverse = torch.cholesky_inverse(factor)
        free = self._right[columns][:, outputs].mT @ inverse  # (outputs, K'), without the constraints
        most = int(missing.sum(1).max())
        found = torch.zeros(len(outputs), len(self._gram), dtype=self._gram.dtype, device=self._gram.device)
        for part in torch.arange(len(missing), device=missing.device).split(_AT_ONCE):
            where = missing[part].int().argsort(dim=1, descending=True, stable=True)[:, :most]
            valid = missing[part].gather(1, where)
            both = valid.unsqueeze(2) & valid.unsqueeze(1)
            inner = torch.where(both, inverse[where.unsqueeze(2), where.unsqueeze(1)], 0.0)
            inner = inner + torch.diag_embed((~valid).to(inner.dtype))
            multipliers = torch.linalg.solve(inner, (free[part].gather(1, where) * valid).unsqueeze(2)).squeeze(2)
            spread = torch.zeros_like(free[part]).scatter(1, where, multipliers * valid)
            found[part[:, None], columns] = (free[part] - spread @ inverse).masked_fill(missing[part], 0.0)
        return found

    def _unconstrained(self, outputs: Tensor, columns: Tensor, ridge: float) -> Tensor:
        """Of ``outputs``, which keep ``columns`` and nothing else: (outputs, columns)."""
        return _solved(self._gram[columns][:, columns], self._right[columns][:, outputs], ridge).mT


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
    loaded = _loaded(gram, ridge, scale)
    factor = _factor(loaded)
    if factor is None:
        return torch.linalg.pinv(loaded, hermitian=True, rtol=_SINGULAR) @ right
    return torch.cholesky_solve(right, factor)


def _loaded(gram: Tensor, ridge: float, scale: Tensor | None = None) -> Tensor:
    """With ``ridge`` times ``scale`` (the mean of the diagonal) on the diagonal."""
    if scale is None:
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return gram + ridge * scale * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _factor(loaded: Tensor) -> Tensor | None:
    """The Cholesky factor; None where the matrix, or one of many, is singular."""
    factor, failed = torch.linalg.cholesky_ex(loaded)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    # A pivot that is all rounding error is no pivot, even where its square came out positive.
    small = pivots.square().amin(-1) <= _SINGULAR * pivots.square().amax(-1)
    return None if bool((failed != 0).any() | small.any()) else factor

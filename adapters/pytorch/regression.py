"""Ridge regression towards given weights: the one linear solve behind every refit.

    W' = (C_YX + lam W0) (C_XX + lam I + S)^-1          (methods, section 0)

with S = diag(p / (1 - p) C_kk) where input k vanishes with probability p. That is the optimum for inputs
that vanish independently and are scaled by 1 / (1 - p) while they live (dropout as ridge, Wager et al. 2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3
"""lam as a share of the mean diagonal."""
FLOOR = 1e-9
"""Added to the diagonal: a dead layer is singular."""


def ridge(covariance: Tensor, cross: Tensor, prior: Tensor, odds: Tensor | None, share: float = RIDGE) -> Tensor:
    """The weights above, separately for each slot.

    covariance (slots, n, n), cross (slots, m, n) = C_YX, prior (slots, m, n) = W0, odds (slots, n) =
    p / (1 - p) or None; all double precision. Raises FloatingPointError if something is not finite.
    """
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    lam = share * diagonal.mean(-1, keepdim=True) + FLOOR
    penalty = torch.zeros_like(diagonal) if odds is None else odds * diagonal
    missing = cross - prior @ covariance - prior * penalty.unsqueeze(1)
    factor = _factor(covariance + torch.diag_embed(lam + penalty))
    return prior + torch.cholesky_solve(missing.mT, factor).mT


def ridge_from_rows(x: Tensor, y: Tensor, prior: Tensor, odds: Tensor | None, share: float = RIDGE) -> Tensor:
    """The same weights from fewer rows than inputs, by a system of the size of the rows.

    x (slots, rows, n) and y (slots, rows, m), centred if the regression has an intercept.
    """
    count = x.shape[1]
    diagonal = x.square().mean(1)
    lam = share * diagonal.mean(-1, keepdim=True) + FLOOR
    penalty = torch.zeros_like(diagonal) if odds is None else odds * diagonal
    scale = (lam + penalty).unsqueeze(1)
    missing = (y - x @ prior.mT).mT @ x / count - prior * penalty.unsqueeze(1)
    scaled = x / scale
    kernel = scaled @ x.mT + count * torch.eye(count, dtype=x.dtype)
    step = missing / scale
    inner = torch.cholesky_solve((step @ x.mT).mT, _factor(kernel))
    return prior + step - inner.mT @ scaled


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky factor; with a ridge only NaN and infinity can defeat it."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any() or not matrix.isfinite().all():
        raise FloatingPointError("the covariance of a regression is not finite")
    return factor

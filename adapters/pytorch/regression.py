"""Ridge regression towards given weights: the one linear solve behind every refit.

    W' = (C_YX + lam W0) (C_XX + lam I + S)^-1          (methods, section 0)

with S = diag(p / (1 - p) C_kk) where input k vanishes with probability p. That is the optimum for inputs
that vanish independently and are scaled by 1 / (1 - p) while they live (dropout as ridge, Wager et al. 2013).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

RIDGE = 1e-3
"""lam as a share of the mean diagonal."""
GROWTH = 2.0
"""A layer's weights may have so many times the norm that they had if every removed input were a copy of a kept
one. A MobileNetV3 at a tenth of its MACs, whose classifier grew from 10 to 225 (the limit is 90), was 0.6 points
better as it stood, and fell from 78% to 56% in 1.5 epochs; with the limit it rose to 81%."""
STRONGER = tuple(10 ** (k / 4) for k in range(1, 25))
"""Factors of the ridge, rising, where weights would grow beyond that."""
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


def bounded_share(norm: Callable[[float], float], share: float, largest: float) -> float:
    """`share`, or the weakest of its `STRONGER` ones whose weights have at most the norm `largest`.

    `norm`: of the weights with a given share. The stronger the ridge, the closer it is to the prior's.
    """

    def bounded(factor: float) -> bool:
        return norm(factor * share) <= largest

    if largest == inf or bounded(1.0):
        return share
    return share * STRONGER[min(bisect_left(STRONGER, True, key=bounded), len(STRONGER) - 1)]


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky factor; with a ridge only NaN and infinity can defeat it."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any() or not matrix.isfinite().all():
        raise FloatingPointError("the covariance of a regression is not finite")
    return factor

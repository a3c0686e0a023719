"""What a layer is regressed on, in folds of images: the strength of the ridge is judged on the others.

Rows of one image resemble each other, so a fold holds whole images. With few images the strength decides
(EfficientNet-Lite0, 192 photographs: a weak ridge fits the classifier to them exactly and to nothing else);
with many, a weak ridge is best, and the search for it ends at once. Few inputs that say nearly the same are
told apart by large weights, which predict well and cannot be trained: those have a limit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from math import inf

from torch import Tensor

from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.regression import RIDGE, bounded_share, ridge, ridge_from_rows

SHARES = (RIDGE, 1e-2, 1e-1, 1.0)
"""Ridges to choose from, as shares of the mean diagonal."""
BEARABLE = 1e-3
"""The survival term may cost so much of what a layer's outputs explain of those that are wanted. At 1e-2 a
MobileNetV3 that goes to 10% of its MACs in three rounds ends 17 points lower, without any bound at chance."""
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Factors of the survival term, falling; the largest that is bearable counts."""
UNCHANGED = 1e-5
"""Weights whose outputs differ from the wanted ones by less, relatively, are right already."""


class RegressionData(ABC):
    """Inputs (slots, rows, n) and targets (slots, rows, m) of a layer, in one form or another."""

    mean: Tensor
    """(slots, n)"""
    target_mean: Tensor
    """(slots, m)"""

    def fit(self, prior: Tensor, odds: Tensor | None, share: float | None, largest: float = inf) -> Tensor:
        """`ridge` on all rows, towards `prior` (slots, m, n), with `share` or, if None, the one of `SHARES`
        that predicts held-out images best, made stronger until the weights' norm is at most `largest`.
        `prior` itself where it fits already and `odds` are None.

        `odds` act as strongly as the layer can bear while all its inputs are still there: `STRENGTHS`, `BEARABLE`.
        """
        if odds is None and self.explained_by(prior):
            return prior
        if share is None:
            share = bounded_share(
                lambda s: float(self.solve(prior, None, s).norm()), self.best_share(prior), largest
            )
        free = self.solve(prior, None, share)
        if odds is None:
            return free
        least = (1 - BEARABLE) * self.explained(free)
        graded = [factor * odds for factor in STRENGTHS]
        # weaker ones explain more: the first that is enough is found by halving
        first = bisect_left(graded, True, key=lambda o: self.explained(self.solve(prior, o, share)) >= least)
        return self.solve(prior, graded[first], share) if first < len(graded) else free

    def best_share(self, prior: Tensor) -> float:
        """The share up to which the held-out error falls: it has one minimum, from weak to strong."""
        best, least = SHARES[0], self.held_out_error(prior, SHARES[0])
        for share in SHARES[1:]:
            error = self.held_out_error(prior, share)
            if not error < least:
                break
            best, least = share, error
        return best

    @abstractmethod
    def explained_by(self, prior: Tensor) -> bool:
        """True if no refit would change anything but constants."""

    @abstractmethod
    def solve(self, prior: Tensor, odds: Tensor | None, share: float) -> Tensor:
        """(slots, m, n), from all rows."""

    @abstractmethod
    def explained(self, weights: Tensor) -> float:
        """How much of the targets' power the outputs of `weights` take away, up to one factor."""

    @abstractmethod
    def held_out_error(self, prior: Tensor, share: float) -> float:
        """Summed over the folds: the error on each of weights fitted to the others, up to a constant that
        does not depend on the weights. 0 with a single fold."""


class MomentData(RegressionData):
    """Second moments: for more rows than inputs."""

    def __init__(self, folds: Sequence[Moments], intercept: bool) -> None:
        """Without `intercept`, no constant can be added to the outputs: moments are about zero."""
        folds = [fold for fold in folds if fold.count]
        self._intercept = intercept
        together = _merged(folds)
        self.mean, self.target_mean = together.mean, together.target_mean
        self._all = self._about(together, together)
        self._judged: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]] = []
        """For each fold: moments of the others, its own about their means, its rows."""
        if len(folds) > 1:
            for k, held in enumerate(folds):
                others = _merged([*folds[:k], *folds[k + 1 :]])
                self._judged.append((self._about(others, others), self._about(held, others), held.count))

    def _about(self, moments: Moments, centre: Moments) -> tuple[Tensor, Tensor]:
        """Covariance and cross-covariance about the means of `centre`, or about zero."""
        shift, target_shift = moments.mean, moments.target_mean
        if self._intercept:
            shift, target_shift = shift - centre.mean, target_shift - centre.target_mean
        covariance = moments.covariance + shift.unsqueeze(2) * shift.unsqueeze(1)
        return covariance, moments.cross_covariance + target_shift.unsqueeze(2) * shift.unsqueeze(1)

    def explained_by(self, prior: Tensor) -> bool:
        return _close(prior @ self._all[0], self._all[1])

    def solve(self, prior: Tensor, odds: Tensor | None, share: float) -> Tensor:
        return ridge(*self._all, prior, odds, share)

    def explained(self, weights: Tensor) -> float:
        covariance, cross = self._all
        return float((weights * (2 * cross - weights @ covariance)).sum())

    def held_out_error(self, prior: Tensor, share: float) -> float:
        total = 0.0
        for others, (covariance, cross), count in self._judged:
            weights = ridge(*others, prior, None, share)
            error = (weights * (weights @ covariance - 2 * cross)).sum()
            total += count * float(error)
        return total


class RowData(RegressionData):
    """The rows themselves: for fewer rows than inputs, or more inputs than a covariance can have."""

    def __init__(self, x: Tensor, y: Tensor, fold_of_row: Tensor, intercept: bool) -> None:
        """x (slots, rows, n), y (slots, rows, m) in double precision, `fold_of_row` (rows,)."""
        self._x, self._y, self._intercept = x, y, intercept
        self._fold_of_row = fold_of_row
        self.mean, self.target_mean = x.mean(1), y.mean(1)

    def explained_by(self, prior: Tensor) -> bool:
        x, y = self._centred(self._x, self._y, self._x, self._y)
        return _close(x @ prior.mT, y)

    def solve(self, prior: Tensor, odds: Tensor | None, share: float) -> Tensor:
        return ridge_from_rows(*self._centred(self._x, self._y, self._x, self._y), prior, odds, share)

    def explained(self, weights: Tensor) -> float:
        x, y = self._centred(self._x, self._y, self._x, self._y)
        found = x @ weights.mT
        return float((found * (2 * y - found)).sum())

    def held_out_error(self, prior: Tensor, share: float) -> float:
        folds = self._fold_of_row.unique()
        total = 0.0
        for fold in folds if len(folds) > 1 else ():
            mine = self._fold_of_row == fold
            x, y = self._x[:, ~mine], self._y[:, ~mine]
            weights = ridge_from_rows(*self._centred(x, y, x, y), prior, None, share)
            held, wanted = self._centred(self._x[:, mine], self._y[:, mine], x, y)
            total += float((wanted - held @ weights.mT).square().sum())
        return total

    def _centred(self, x: Tensor, y: Tensor, about: Tensor, target_about: Tensor) -> tuple[Tensor, Tensor]:
        if not self._intercept:
            return x, y
        return x - about.mean(1, keepdim=True), y - target_about.mean(1, keepdim=True)


def _merged(parts: Sequence[Moments]) -> Moments:
    if len(parts) == 1:
        return parts[0]
    together = parts[0].copy()
    for part in parts[1:]:
        together.merge(part)
    return together


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= UNCHANGED * wanted.norm())

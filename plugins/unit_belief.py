"""A Gaussian belief over every unit's log discrepancy per cost, carried from round to round.

A Kalman filter per unit with shared noise per group (methods.md, section 3.2):

    predict   m- = m + d + b      P- = P + Q     d: change caused by the last round's removals and refit
    observe   e = z - m-          K = P- / (P- + R)          m = m- + K e      P = (1 - K) P-
    learn     b <- .7 b + .3 mean(e)             Q <- .7 Q + .3 max(var(e) - R, 0)

R is at least half of the innovations' variance: the variance between folds alone would make every gain 1.
The probability that a unit goes is Phi((tau - m) / sqrt(P + Q)), tau such that the expected cost is the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr
from scipy.stats import rankdata

from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.graph import ChannelGraph

PROCESS_NOISE = 0.05
"""Q before any innovation was seen: the squared log-discrepancy that one round changes unforeseen."""
_KEEP, _LEARN = 0.7, 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Belief:
    """What is believed of one group's units."""

    mean: FloatArray
    """(units,)"""
    variance: float
    bias: float = 0.0
    """b: the group's mean innovation."""
    noise: float = PROCESS_NOISE
    """Q"""

    @classmethod
    def first(cls, observed: FloatArray, fold_variance: float) -> Belief:
        """After the first observation, without any prior."""
        return cls(np.asarray(observed), fold_variance)

    def predicted(self, change: FloatArray) -> Belief:
        """One step ahead, `change` (units,) the d of the last removals."""
        return replace(self, mean=self.mean + change + self.bias, variance=self.variance + self.noise)

    def observed(self, z: FloatArray, fold_variance: float) -> Belief:
        """Corrected by an observation; call on a prediction."""
        innovation = z - self.mean
        spread = float(innovation.var())
        error = max(fold_variance, 0.5 * spread)
        gain = self.variance / max(self.variance + error, 1e-12)
        return Belief(
            mean=self.mean + gain * innovation,
            variance=(1 - gain) * self.variance,
            bias=_KEEP * self.bias + _LEARN * float(innovation.mean()),
            noise=_KEEP * self.noise + _LEARN * max(spread - error, 0.0),
        )

    @property
    def spread(self) -> float:
        """Standard deviation of what the round will find: the belief's own and the round's noise."""
        return float(np.sqrt(self.variance + self.noise))

    def kept(self, units: IntArray) -> Belief:
        return replace(self, mean=self.mean[units])


def pruning_probabilities(
    graph: ChannelGraph, budget: Budget, beliefs: Mapping[str, Belief]
) -> tuple[dict[str, FloatArray], float]:
    """(group -> (units,) probability that the unit goes, tau), the expected cost being the budget.

    Expected counts respect the floors; where even these exceed the budget, tau is the upper end.
    """
    if not beliefs:
        return {}, 0.0
    means = np.concatenate([belief.mean for belief in beliefs.values()])
    margin = 8.0 * max(belief.spread for belief in beliefs.values()) + 1.0
    low, high = float(means.min()) - margin, float(means.max()) + margin
    for _ in range(60):
        tau = (low + high) / 2
        if budget.met(graph.cost_model.at(_expected_counts(graph, _at(tau, beliefs)))):
            high = tau
        else:
            low = tau
    return _at(high, beliefs), high


def _at(tau: float, beliefs: Mapping[str, Belief]) -> dict[str, FloatArray]:
    return {name: np.asarray(ndtr((tau - b.mean) / max(b.spread, 1e-6))) for name, b in beliefs.items()}


def _expected_counts(graph: ChannelGraph, gone: Mapping[str, FloatArray]) -> FloatArray:
    return np.array(
        [
            max(float((1 - gone[name]).sum()), float(group.min_kept)) if name in gone else float(group.units)
            for name, group in graph.groups.items()
        ]
    )


@dataclass(frozen=True, slots=True)
class PredictionQuality:
    """How well predicted scores foretold what went."""

    auc: float
    """Probability that a unit that went was ranked more likely than one that stayed; .5 is chance."""
    overlap: float
    """Share of the k units that went which are among the k most likely."""
    chance: float
    """The overlap of a random ranking: the share of units that went."""
    brier: float | None = None
    """Mean squared error of the probabilities."""


def prediction_quality(likelihood: FloatArray, went: FloatArray, probabilities: bool) -> PredictionQuality:
    """Compare `likelihood` (units,), higher is likelier to go, with `went` (units,) of zeros and ones."""
    positive = went > 0
    k, n = int(positive.sum()), len(went)
    ranks = rankdata(likelihood)
    auc = float((ranks[positive].sum() - k * (k + 1) / 2) / (k * (n - k))) if 0 < k < n else 0.5
    top = np.argsort(-likelihood, kind="stable")[:k]
    overlap = float(positive[top].mean()) if k else 1.0
    brier = float(np.mean((likelihood - went) ** 2)) if probabilities else None
    return PredictionQuality(auc, overlap, k / max(n, 1), brier)

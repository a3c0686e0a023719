"""ThreshNet: the network that generates every group's pruning threshold, trained by reward.

After X. T. Lu et al. (IJCAI 2020, TPAMI 2023), in the bounded form of methods.md, section 1.2: all groups
share one small perceptron (22-32-32), whose output is a distribution over a few *offsets* around the shared
threshold that meets the budget. It learns by REINFORCE (Williams 1992) with a moving-average baseline.

    features (groups, 22)    offsets: geometric from 1/limit to limit, the middle one is 1
"""

from __future__ import annotations

import numpy as np

from prunus.core.cost import FloatArray, IntArray

QUANTILES = 16
FEATURES = QUANTILES + 6
_HIDDEN = 32
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


def describe(masses: FloatArray, depth: float, cost_share: float, load: float, progress: float) -> FloatArray:
    """What ThreshNet knows of one group, shape (22,).

    `masses` (units,): the units' shares p of their group, any order. `depth` 0..1 through the network,
    `cost_share` 0..1 of the cost's slope, `load` how many times the budget is exceeded, `progress` 0..1.
    """
    units = len(masses)
    ordered = np.sort(masses)[::-1]
    quantiles = np.quantile(ordered * units, np.linspace(0, 1, QUANTILES))
    entropy = -float((masses * np.log(masses + 1e-12)).sum()) / max(float(np.log(units)), 1e-12)
    rest = [entropy, np.log(units) / 5.0, depth, cost_share, np.log(max(load, 1e-6)), progress]
    return np.concatenate([np.log1p(quantiles), rest])


class ThreshNet:
    """A policy over threshold offsets: 22-32-32 with rectifiers, and one logit per offset."""

    def __init__(
        self, rng: np.random.Generator, choices: int = 7, limit: float = 2.0, lr: float = 5e-3, floor: float = 0.5
    ) -> None:
        """`limit`: the largest offset; `floor`: below this share of the full entropy, entropy is rewarded."""
        self.offsets: FloatArray = np.geomspace(1 / limit, limit, choices)
        sizes = (FEATURES, _HIDDEN, _HIDDEN, choices)
        self.parameters: list[FloatArray] = []
        for k in range(3):
            # a small last layer: the first proposals are uniform over the offsets
            scale = np.sqrt(2 / sizes[k]) * (0.01 if k == 2 else 1.0)
            self.parameters += [rng.normal(size=(sizes[k], sizes[k + 1])) * scale, np.zeros(sizes[k + 1])]
        self._lr, self._floor = lr, floor * float(np.log(choices))
        self._first = [np.zeros_like(p) for p in self.parameters]
        self._second = [np.zeros_like(p) for p in self.parameters]
        self._steps = 0
        self._baseline: float | None = None
        self._scale = 0.0

    def probabilities(self, features: FloatArray) -> FloatArray:
        """(groups, choices)"""
        return _softmax(self._forward(features)[-1])

    def sample(self, features: FloatArray, rng: np.random.Generator) -> IntArray:
        """One choice per group, (groups,)."""
        cumulative = self.probabilities(features).cumsum(axis=1)
        draws = rng.random((len(features), 1))
        return np.asarray(np.minimum((draws > cumulative).sum(axis=1), len(self.offsets) - 1), dtype=np.int64)

    def best(self, features: FloatArray) -> IntArray:
        """The most probable choice per group, (groups,)."""
        return np.asarray(np.argmax(self.probabilities(features), axis=1), dtype=np.int64)

    def entropy(self, features: FloatArray) -> float:
        """Mean over groups, as a share of the full entropy."""
        return float(_entropies(self.probabilities(features)).mean() / np.log(len(self.offsets)))

    def learn(self, features: FloatArray, choices: IntArray, reward: float) -> None:
        """One REINFORCE step on one episode: ascend (reward - baseline) sum_g log pi(choice_g)."""
        if self._baseline is None:
            self._baseline = reward
        advantage = reward - self._baseline
        self._scale = max(0.9 * self._scale + 0.1 * abs(advantage), 0.1 * abs(advantage), 1e-8)
        self._baseline = 0.9 * self._baseline + 0.1 * reward
        gradient = self.gradient(features, choices, float(np.clip(advantage / self._scale, -3, 3)))
        self._ascend(gradient)

    def gradient(self, features: FloatArray, choices: IntArray, advantage: float) -> list[FloatArray]:
        """d/d parameters of  advantage sum_g log pi(choice_g) - sum_g max(0, floor - H_g)."""
        values = self._forward(features)
        p = _softmax(values[-1])
        picked = np.zeros_like(p)
        picked[np.arange(len(p)), choices] = 1.0
        entropy = _entropies(p)[:, None]
        # dH/dlogit_k = -p_k (log p_k + H)
        uncertain = np.where(entropy < self._floor, -p * (np.log(p + 1e-12) + entropy), 0.0)
        slope = advantage * (picked - p) + uncertain
        gradients: list[FloatArray] = []
        for k in (2, 1, 0):
            gradients = [values[k].T @ slope, slope.sum(axis=0), *gradients]
            slope = (slope @ self.parameters[2 * k].T) * (values[k] > 0)
        return gradients

    def _forward(self, features: FloatArray) -> list[FloatArray]:
        values = [features]
        for k in range(3):
            z = values[-1] @ self.parameters[2 * k] + self.parameters[2 * k + 1]
            values.append(z if k == 2 else np.maximum(z, 0.0))
        return values

    def _ascend(self, gradients: list[FloatArray]) -> None:
        """Adam (Kingma & Ba 2015)."""
        self._steps += 1
        for k, gradient in enumerate(gradients):
            self._first[k] = _BETA1 * self._first[k] + (1 - _BETA1) * gradient
            self._second[k] = _BETA2 * self._second[k] + (1 - _BETA2) * gradient**2
            mean = self._first[k] / (1 - _BETA1**self._steps)
            spread = np.sqrt(self._second[k] / (1 - _BETA2**self._steps)) + _EPSILON
            self.parameters[k] = self.parameters[k] + self._lr * mean / spread


def _softmax(logits: FloatArray) -> FloatArray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _entropies(p: FloatArray) -> FloatArray:
    return np.asarray(-(p * np.log(p + 1e-12)).sum(axis=1))

"""Deterministic annealing of keep probabilities under an exact cost (methods, section 2.3; Rose 1998).

Minimise over pi    sum[(1 - pi) Lambda + mu c pi] - T sum H(pi)
which gives         pi_i = sigmoid((Lambda_i - mu c_i) / T),
with mu such that the exact cost at the expected widths is the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import entr, expit

from prunus.core.allocation import ladders
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGraph

_FAR = 40.0
"""sigmoid(40) is 1 in double precision."""


_SPARE = 1.5
"""With less than so many times its floor, a group cannot help to be narrow."""


class Lattice:
    """All units that can go, as one vector, and the cost of their expected widths."""

    def __init__(self, graph: ChannelGraph, budget: Budget) -> None:
        self.graph, self.budget = graph, budget
        self.names = tuple(graph.prunable)
        sizes = [graph.groups[name].units for name in self.names]
        self._splits = np.cumsum(sizes)[:-1]
        column = {name: i for i, name in enumerate(graph.groups)}
        self._columns = np.repeat([column[name] for name in self.names], sizes).astype(np.int64)
        self._full = graph.cost_model.counts(graph.units)
        self._floor = self._full.copy()
        self._tied = []
        for ladder in ladders(graph):
            self._floor[ladder.columns] = ladder.counts[0]
            if len(ladder.groups) > 1:
                self._tied.append(ladder.columns)

    def vector(self, values: Mapping[str, FloatArray]) -> FloatArray:
        return np.concatenate([values[name] for name in self.names])

    def named(self, vector: FloatArray) -> dict[str, FloatArray]:
        return dict(zip(self.names, np.split(vector, self._splits), strict=True)) if self.names else {}

    def widths(self, probabilities: FloatArray) -> FloatArray:
        """Expected widths of all groups, (groups,): never under a floor, equal where groups are tied."""
        counts = self.bare_widths(probabilities)
        for columns in self._tied:
            counts[columns] = counts[columns].mean()
        return np.clip(counts, self._floor, self._full)

    def bare_widths(self, probabilities: FloatArray) -> FloatArray:
        """Expected widths as the probabilities have them, floors and ties aside."""
        summed = np.bincount(self._columns, weights=probabilities, minlength=len(self._full))
        counts = self._full.copy()
        counts[self._columns] = summed[self._columns]
        return counts

    def load(self, probabilities: FloatArray) -> float:
        """Exact cost at the expected widths over the budget."""
        return self.budget.load(self.graph.cost_model.at(self.widths(probabilities)))

    def prices(self, probabilities: FloatArray, power: float) -> FloatArray:
        """c: what one more unit costs at these widths, to `power`, with mean 1."""
        slope = self.budget.gradient(self.graph, self.widths(probabilities))[self._columns]
        slope = np.maximum(slope, 1e-9 * float(slope.max(initial=1e-300))) ** power
        return np.asarray(slope / slope.mean(), dtype=np.float64)

    def worth(self, probabilities: FloatArray, layers: Mapping[str, Collection[str]]) -> dict[str, float]:
        """Layer -> what it costs at the expected widths, counted in units of the groups that it is made of."""
        slope = self.budget.gradient(self.graph, self.widths(probabilities))
        column = {name: i for i, name in enumerate(self.graph.groups)}
        worth = {}
        for layer, groups in layers.items():
            units = np.array([self._full[column[name]] for name in groups if name in self.names])
            costs = np.array([slope[column[name]] for name in groups if name in self.names])
            mean = float(units @ costs / units.sum()) if len(units) else 0.0
            worth[layer] = max(float(slope[column[layer]]) / mean, 1e-9) if mean > 0 else 1.0
        return worth

    def even(self) -> FloatArray:
        """The same probability for every unit, at which the expected cost is the budget."""
        return self._even(np.zeros(len(self._columns), dtype=bool))

    def _even(self, certain: NDArray[np.bool_]) -> FloatArray:
        """Probability 1 where `certain`, the same for every other unit."""

        def at(share: float) -> FloatArray:
            return np.where(certain, 1.0, share)

        return at(_root(lambda p: self.load(at(p)) - 1, 0.0, 1.0) if self.load(at(1.0)) > 1 else 1.0)

    def solve(self, coefficient: FloatArray, price: FloatArray, temperature: float) -> tuple[FloatArray, float]:
        """(pi, mu) at a temperature, with the expected cost on the budget."""

        def probabilities(mu: float) -> FloatArray:
            return np.asarray(expit((coefficient - mu * price) / temperature))

        low = float(((coefficient - _FAR * temperature) / price).min())
        high = float(((coefficient + _FAR * temperature) / price).max())
        mu = _root(lambda m: self.load(probabilities(m)) - 1, low, high)
        return probabilities(mu), mu

    def collapsed(self, probabilities: FloatArray) -> dict[str, float]:
        """group -> expected width, for groups that the probabilities leave fewer units than their floor.

        Not those that the budget leaves no choice: at the same share for every unit they are close to it, too,
        as long as no layer goes as a whole.
        """
        bare, even = self.bare_widths(probabilities), self.bare_widths(self._even(self._floor[self._columns] == 0))
        under = (bare < self._floor - 0.5) & (even >= _SPARE * self._floor)
        return {name: float(bare[i]) for i, name in enumerate(self.graph.groups) if under[i]}

    def weight_of(self, groups: Collection[str]) -> float:
        """The share of the cost that rests on some groups: sum of n dF/dn over theirs against all that can go."""
        rests = self._full * self.budget.gradient(self.graph, self._full)
        of = dict(zip(self.graph.groups, rests.tolist(), strict=True))
        whole = sum(of[name] for name in self.names)
        return sum(of[name] for name in groups) / whole if whole > 0 else 0.0


def mean_entropy(probabilities: FloatArray, units: int | None = None) -> float:
    """Mean of H(pi) over `units` (default: all given) as a share of log 2: 1 when nothing is decided."""
    count = len(probabilities) if units is None else units
    total = float(np.sum(entr(probabilities) + entr(1 - probabilities)))
    return total / (max(count, 1) * math.log(2))


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a cost that falls or rises monotonically crosses its budget; an end if it never does."""
    at_low, at_high = excess(low), excess(high)
    if at_low * at_high >= 0:
        return low if abs(at_low) <= abs(at_high) else high
    return float(brentq(excess, low, high, xtol=1e-12, rtol=1e-10, maxiter=200))

"""Which units go in a round: the most probable one, again and again, everything recomputed after each pick.

Chosen once by rank without downdating, correlated units go together and the network collapses (methods.md,
section 3.1: 54-58% instead of 86%).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from prunus.core.allocation import Ladder, global_keep, ladders
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.graph import ChannelGraph
from prunus.plugins.discrepancy import Discrepancy
from prunus.plugins.unit_belief import Belief

_LEAST = 1e-12
"""Discrepancies and prices below this count as this: their logarithms must stay finite."""


def log_prices(graph: ChannelGraph, budget: Budget, counts: FloatArray) -> dict[str, float]:
    """group -> log c: what one unit costs of the binding budget, c of mean 1 over all units that are left."""
    slope = np.maximum(budget.gradient(graph, counts), 0.0)
    mean = float(slope @ counts) / max(float(counts.sum()), 1.0)
    logs = np.log(np.maximum(slope / max(mean, 1e-300), _LEAST))
    return {name: float(value) for name, value in zip(graph.groups, logs, strict=True)}


def log_discrepancies(discrepancy: Discrepancy, group: str) -> FloatArray:
    """(units,)"""
    return np.asarray(np.log(np.maximum(discrepancy.of(group), _LEAST)))


def log_scores(graph: ChannelGraph, budget: Budget, discrepancy: Discrepancy) -> dict[str, FloatArray]:
    """group -> (units,): z = log(D / c) while nothing is removed."""
    prices = log_prices(graph, budget, graph.cost_model.counts(graph.units))
    return {name: log_discrepancies(discrepancy, name) - prices[name] for name in graph.prunable}


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What a round keeps, and what the round did to the scores."""

    keep: dict[str, IntArray]
    """group -> kept units, of every group."""
    change: dict[str, FloatArray]
    """group -> (units,): d, how log(D / c) of each unit changed until the end or until its own removal."""
    ranks: dict[str, FloatArray]
    """group -> (units,): what went first ranks lowest."""


def select(
    graph: ChannelGraph,
    budget: Budget,
    discrepancy: Discrepancy,
    beliefs: Mapping[str, Belief],
    scores: Mapping[str, FloatArray],
    tau: float,
) -> Selection:
    """Remove the unit with the highest probability Phi((tau - m_i - d_i) / sqrt(P_i)) until the budget is met.

    `scores` are the z at the start of the round, `beliefs` the m and P. Uses up `discrepancy`. Groups move
    by the steps that floors, multiples and equal counts allow; the last steps are fitted to the budget.
    """
    greedy = _Greedy(graph, budget, discrepancy, beliefs, scores, tau)
    while not budget.met(graph.cost_model.at(greedy.counts)):
        greedy.step()
    ranks = greedy.ranks()
    keep = global_keep(graph, budget, ranks)
    return Selection(keep, {name: greedy.log_now[name] - scores[name] for name in scores}, ranks)


class _Greedy:
    def __init__(
        self,
        graph: ChannelGraph,
        budget: Budget,
        discrepancy: Discrepancy,
        beliefs: Mapping[str, Belief],
        scores: Mapping[str, FloatArray],
        tau: float,
    ) -> None:
        self.graph, self.budget, self.discrepancy = graph, budget, discrepancy
        self.beliefs, self.scores, self.tau = beliefs, scores, tau
        self.counts = graph.cost_model.counts(graph.units)
        self.log_now = {name: np.array(values) for name, values in scores.items()}
        self._log_d = {name: log_discrepancies(discrepancy, name) for name in scores}
        self._alive = {name: np.ones(len(values), dtype=bool) for name, values in scores.items()}
        self._when = {name: np.full(len(values), np.inf) for name, values in scores.items()}
        self._picked = 0
        self._ladders = [ladder for ladder in ladders(graph) if len(ladder.counts) > 1]
        self._level = [len(ladder.counts) - 1 for ladder in self._ladders]
        self._lowest = [self._low(ladder, self._size(k)) for k, ladder in enumerate(self._ladders)]
        self._ladder_of = {name: k for k, ladder in enumerate(self._ladders) for name in ladder.groups}

    def step(self) -> None:
        """One step down the ladder whose units are the most probable to go."""
        prices = log_prices(self.graph, self.budget, self.counts)
        best, most = -1, -np.inf
        for k, ladder in enumerate(self._ladders):
            if self._level[k] > 0:
                probit = self._probit(ladder, self._lowest[k], prices)
                if probit > most:
                    best, most = k, probit
        ladder, size = self._ladders[best], self._size(best)
        self._level[best] -= 1
        touched = {best}
        for name in ladder.groups:
            for _ in range(size):
                touched |= self._remove(name, self._weakest(name, 1)[0], prices[name])
        self.counts[ladder.columns] = ladder.counts[self._level[best]]
        for k in touched:
            if self._level[k] > 0:
                self._lowest[k] = self._low(self._ladders[k], self._size(k))
        self._finish(prices)

    def ranks(self) -> dict[str, FloatArray]:
        """Scores for the final fit: what went first ranks lowest, what never went by its own probability."""
        prices = log_prices(self.graph, self.budget, self.counts)
        ranks = {}
        for name, when in self._when.items():
            mean = self._shifted(name) - prices[name]
            standing = self._picked + 1.0 + expit((mean - self.tau) / 4.0)
            ranks[name] = np.where(np.isinf(when), standing, when)
        return ranks

    def _size(self, k: int) -> int:
        counts = self._ladders[k].counts
        return int(counts[self._level[k]] - counts[self._level[k] - 1])

    def _shifted(self, name: str) -> FloatArray:
        """(units,): m + log D now - z at the start; less log c it is the belief after the picks so far."""
        return np.asarray(self.beliefs[name].mean + self._log_d[name] - self.scores[name])

    def _weakest(self, name: str, size: int) -> IntArray:
        values = np.where(self._alive[name], self._shifted(name), np.inf)
        return np.argsort(values, kind="stable")[:size]

    def _low(self, ladder: Ladder, size: int) -> list[float]:
        """For each tied group: the mean of what its next step removes."""
        return [float(self._shifted(name)[self._weakest(name, size)].mean()) for name in ladder.groups]

    def _probit(self, ladder: Ladder, low: list[float], prices: Mapping[str, float]) -> float:
        each = [
            (self.tau - value + prices[name]) / max(self.beliefs[name].spread, 1e-6)
            for name, value in zip(ladder.groups, low, strict=True)
        ]
        return sum(each) / len(each)

    def _remove(self, name: str, unit: int, price: float) -> set[int]:
        self.log_now[name][unit] = self._log_d[name][unit] - price
        self._alive[name][unit] = False
        self._when[name][unit] = self._picked
        self._picked += 1
        changed = self.discrepancy.remove(name, int(unit))
        for other in changed:
            self._log_d[other] = log_discrepancies(self.discrepancy, other)
        return {self._ladder_of[other] for other in changed if other in self._ladder_of}

    def _finish(self, prices: Mapping[str, float]) -> None:
        for name, alive in self._alive.items():
            self.log_now[name][alive] = self._log_d[name][alive] - prices[name]

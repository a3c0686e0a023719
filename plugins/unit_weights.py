"""Learnable unit weights alpha: what the search ranks by, learned on the hold-out (methods.md, 1.1).

alpha starts at 1 and scales whatever reads the unit. Between pieces of training it descends the held-out
loss minus the variance within each group, which drives units apart; clipped to [0, 2].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGraph
from prunus.core.signals import Signal, SignalReader

_LARGEST_VARIANCE = 0.25


class UnitWeights:
    """alpha of every unit of the groups that may shrink, group -> (units,)."""

    def __init__(
        self,
        graph: ChannelGraph,
        kind: Literal["learned", "random", "none"],
        rate: float,
        variance_reward: float,
        rng: np.random.Generator,
    ) -> None:
        self.learned = kind == "learned"
        self._rate, self._reward = rate, variance_reward
        self._random = kind == "random"
        sizes = {name: group.units for name, group in graph.prunable.items() if group.gateable}
        self.alpha: dict[str, FloatArray] = {
            name: rng.uniform(0.05, 2.0, units) if self._random else np.ones(units)
            for name, units in sizes.items()
        }

    @property
    def gates(self) -> dict[str, FloatArray] | None:
        """alpha as the network's gates; None unless it is learned."""
        return {name: alpha.copy() for name, alpha in self.alpha.items()} if self.learned else None

    def learn(self, signals: SignalReader) -> None:
        """One step down the held-out loss minus the groups' variance; steps are scaled to `rate`."""
        slopes = {name: signals.read(Signal.GATE_GRADIENT, name) for name in self.alpha}
        everything = np.concatenate([*slopes.values(), np.zeros(1)])
        scale = max(float(np.sqrt(np.mean(everything**2))), 1e-12)
        for name, alpha in self.alpha.items():
            apart = alpha - alpha.mean() if alpha.var() < _LARGEST_VARIANCE else np.zeros_like(alpha)
            step = np.clip(slopes[name] / scale, -3, 3) - 2 * self._reward * apart
            self.alpha[name] = np.clip(alpha - self._rate * step, 0.0, 2.0)

    def weighted(self, energies: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Energies as alpha sees them: learned weights are folded into the readers and count already."""
        if not self._random:
            return dict(energies)
        return {name: e * self.alpha[name] ** 2 if name in self.alpha else e for name, e in energies.items()}

    def spread(self) -> dict[str, float]:
        """Standard deviation within each group, for the report."""
        return {f"std/{name}": float(alpha.std()) for name, alpha in self.alpha.items()}


def output_energies(graph: ChannelGraph, signals: SignalReader) -> dict[str, FloatArray]:
    """group -> (units,): the share of its readers' output variance that each unit carries, others apart.

    sum over readers of ||W_i||^2 Var(x_i), each reader's total divided out; without a reader's variance
    every input counts 1; without any reader the share of the writing weights' energy.
    """
    energies = {}
    for name, group in graph.prunable.items():
        total = np.zeros(group.units)
        pieces = group.with_role("reads") or group.with_role("writes")
        for piece in pieces:
            matrix = np.moveaxis(signals.read(Signal.WEIGHT, piece.tensor), piece.axis, 0)
            energy = (matrix.reshape(len(matrix), -1) ** 2).sum(axis=1)
            if piece.role == "reads" and signals.has(Signal.ACTIVATION_VARIANCE, piece.tensor):
                variance = signals.read(Signal.ACTIVATION_VARIANCE, piece.tensor)
                energy = energy * variance if len(variance) == len(energy) else energy
            member = piece.unit_of >= 0
            share = np.bincount(piece.unit_of[member], weights=energy[member], minlength=group.units)
            total += share / max(float(share.sum()), 1e-300)
        energies[name] = np.asarray(total / max(len(pieces), 1))
    return energies

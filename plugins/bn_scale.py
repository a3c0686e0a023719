"""Importance by the scale of the normalisation (Liu et al., Network Slimming, ICCV 2017)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGroup, Slice
from prunus.core.importance import ImportanceEstimator
from prunus.core.signals import Signal, SignalReader
from prunus.plugins.magnitude import power_sum


class BnScale(ImportanceEstimator):
    """The mean |gamma| of all norms over a unit.

    A group without a norm (the squeeze of a squeeze-excite block) is ranked by the norm of its writing
    weights instead. Both are compared only after division by the group's mean.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})
    comparable_across_groups: ClassVar[bool] = False

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        """(units,): mean absolute scale, or the L2 norm of the writing weights where nothing normalises."""
        norms = norm_scales(group, signals)
        if norms:
            found = [power_sum(signals.read(Signal.WEIGHT, s.tensor), s, group.units, 1.0) for s in norms]
            return np.asarray(np.mean(found, axis=0), dtype=np.float64)
        total = np.zeros(group.units)
        for piece in group.with_role("writes") or group.slices:
            total += power_sum(signals.read(Signal.WEIGHT, piece.tensor), piece, group.units)
        return np.sqrt(total)


def norm_scales(group: ChannelGroup, signals: SignalReader) -> list[Slice]:
    """The gammas of a group: scaling vectors named "weight" beside running statistics, or else beside a bias.

    A convolution's bias stands beside a writing weight and a PReLU's slope beside nothing, so neither counts.
    """
    scaling = {piece.tensor: piece for piece in group.with_role("scales")}
    vectors = [
        piece
        for tensor, piece in scaling.items()
        if tensor.rpartition(".")[2] == "weight" and signals.read(Signal.WEIGHT, tensor).ndim == 1
    ]
    for companion in ("running_var", "bias"):
        found = [p for p in vectors if f"{p.tensor.rpartition('.')[0]}.{companion}" in scaling]
        if found:
            return found
    return []

"""Importance by the first-order change of the loss (Molchanov et al., CVPR 2019)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGroup
from prunus.core.importance import ImportanceEstimator, PluginConfig
from prunus.core.signals import Signal, SignalReader


class TaylorConfig(PluginConfig):
    average: Literal["squares", "signed"] = "squares"
    """`squares`: root of the mean over batches of (dLoss/dgate)^2, the paper's eq. 8 on gates;
    `signed`: |mean dLoss/dgate|, which cancels where a model has converged."""


class Taylor(ImportanceEstimator):
    """How much the loss changes, to first order, when a unit's gate closes: |dLoss/dgate * (1 - 0)|.

    All groups share the loss's unit, yet policies divide by the group's mean: one ranking of the raw figures
    leaves stages at their floors (ResNet-14, Fashion-MNIST, 10% of the MACs, sequential refit, no training:
    45.5% raw, 80.3% divided).
    """

    Config: ClassVar[type[PluginConfig]] = TaylorConfig
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.GATE_GRADIENT, Signal.GATE_FISHER})
    comparable_across_groups: ClassVar[bool] = False

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        """(units,): in units of the loss; gates of a group act on all layers that read it."""
        config = self.config
        assert isinstance(config, TaylorConfig)
        if config.average == "signed":
            return np.asarray(np.abs(signals.read(Signal.GATE_GRADIENT, group.name)), dtype=np.float64)
        return np.asarray(np.sqrt(signals.read(Signal.GATE_FISHER, group.name)), dtype=np.float64)

"""Importance by the size of the weights (Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGroup, Role, Slice
from prunus.core.importance import ImportanceEstimator, PluginConfig
from prunus.core.signals import Signal, SignalReader


class MagnitudeConfig(PluginConfig):
    p: float = Field(default=2.0, gt=0)
    """The order of the norm."""
    weights: Literal["writes", "reads", "both"] = "writes"
    """Which weights count: those that make a channel, those that consume it, or both."""


class Magnitude(ImportanceEstimator):
    """The Lp norm of all weights of a unit, over all layers that share it."""

    Config: ClassVar[type[PluginConfig]] = MagnitudeConfig
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})
    comparable_across_groups: ClassVar[bool] = False

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        """(units,): `(sum |w|^p)^(1/p)`; where a group has no weights of that side, those of the other."""
        config = self.config
        assert isinstance(config, MagnitudeConfig)
        roles: tuple[Role, ...] = ("writes", "reads") if config.weights == "both" else (config.weights,)
        slices = [s for role in roles for s in group.with_role(role)] or list(group.slices)
        total = np.zeros(group.units)
        for piece in slices:
            total += power_sum(signals.read(Signal.WEIGHT, piece.tensor), piece, group.units, config.p)
        return np.asarray(total ** (1 / config.p), dtype=np.float64)


def power_sum(weight: FloatArray, piece: Slice, units: int, p: float = 2.0) -> FloatArray:
    """(units,): sum of |w|^p over everything in `weight` that belongs to each unit along the slice's axis."""
    others = tuple(axis for axis in range(weight.ndim) if axis != piece.axis)
    along = np.sum(np.abs(weight) ** p, axis=others)
    mine = piece.unit_of >= 0
    return np.bincount(piece.unit_of[mine], weights=along[mine], minlength=units).astype(np.float64)

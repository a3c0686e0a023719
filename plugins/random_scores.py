"""Random importance: the control that every other estimator must beat."""

from __future__ import annotations

import zlib
from typing import ClassVar

import numpy as np
from pydantic import Field

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGroup
from prunus.core.importance import ImportanceEstimator, PluginConfig
from prunus.core.signals import Signal, SignalReader


class RandomConfig(PluginConfig):
    seed: int = Field(default=0, ge=0)
    """Equal seeds, equal scores."""


class RandomScores(ImportanceEstimator):
    """Uniform scores that depend on the seed, the group's name and its width alone."""

    Config: ClassVar[type[PluginConfig]] = RandomConfig
    needs: ClassVar[frozenset[Signal]] = frozenset()
    comparable_across_groups: ClassVar[bool] = True

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        """(units,) in [0, 1)."""
        config = self.config
        assert isinstance(config, RandomConfig)
        rng = np.random.default_rng([config.seed, zlib.crc32(group.name.encode()), group.units])
        return rng.random(group.units)

"""The interface of importance estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGroup
from prunus.core.signals import Signal, SignalReader


class PluginConfig(BaseModel):
    """Base of every plugin's settings: frozen, unknown keys refused, a description beside each field.

    Defaults are validated, too: they are what run.toml gives back, so that a resumed run has the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ImportanceEstimator(ABC):
    """Says how much each unit of a group matters. Higher stays longer.

    Implementations hold only their config and keep no state between calls.
    """

    Config: ClassVar[type[PluginConfig]] = PluginConfig
    needs: ClassVar[frozenset[Signal]]
    """The adapter collects these signals and nothing else."""
    comparable_across_groups: ClassVar[bool] = False
    """True if scores of different groups share one scale; otherwise policies normalise by the group's mean."""

    def __init__(self, config: PluginConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        """One score per unit: shape (units,), float64, finite."""

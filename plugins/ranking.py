"""Scores of a whole graph by an estimator, and the units that they choose."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import numpy as np

from prunus.core.allocation import global_keep, mean_normalised, uniform_keep
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Directive, Measure, Observation
from prunus.core.errors import ConfigError, PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.importance import ImportanceEstimator
from prunus.core.policy import PruningTask
from prunus.core.signals import NEEDS_DATA, NEEDS_LABELS, Signal, SignalReader

Scope = Literal["global", "uniform"]


def rank(
    task: PruningTask, graph: ChannelGraph, images: int
) -> Generator[Directive, Observation, dict[str, FloatArray]]:
    """Measure what the estimator needs and score every group that can shrink, on one scale."""
    estimator = estimator_of(task)
    if estimator.needs:
        observation = yield Measure(signals=estimator.needs, images=images)
    else:
        observation = NO_SIGNALS
    reader = signals_of(observation)
    scores = {}
    for name, group in graph.prunable.items():
        score = np.asarray(estimator.score(group, reader), dtype=np.float64)
        if score.shape != (group.units,) or not np.isfinite(score).all():
            raise PluginError(
                type(estimator).__name__,
                "scores are finite, one per unit",
                f"Group {name!r} of {group.units} units got shape {score.shape}, "
                f"{int(np.size(score) - np.isfinite(score).sum())} not finite.",
            )
        scores[name] = score
    return scores if estimator.comparable_across_groups else mean_normalised(scores)


def choose(
    graph: ChannelGraph, budget: Budget, scores: dict[str, FloatArray], scope: Scope
) -> dict[str, IntArray]:
    """The kept units: one ranking over the whole network, or the same share of every group."""
    return (global_keep if scope == "global" else uniform_keep)(graph, budget, scores)


def estimator_of(task: PruningTask) -> ImportanceEstimator:
    """The run's estimator, checked against the run's data."""
    estimator = task.estimator
    if estimator is None:
        raise ConfigError("this method ranks by an estimator; choose one with --importance", key="importance")
    name = type(estimator).__name__
    if not task.has_data and estimator.needs & NEEDS_DATA:
        wanted = ", ".join(sorted(estimator.needs & NEEDS_DATA))
        raise ConfigError(
            f"importance {name!r} needs images ({wanted}); give --data, or --importance magnitude",
            key="importance",
        )
    if not task.has_labels and estimator.needs & NEEDS_LABELS:
        wanted = ", ".join(sorted(estimator.needs & NEEDS_LABELS))
        raise ConfigError(f"importance {name!r} needs labels ({wanted})", key="importance")
    return estimator


def signals_of(observation: object) -> SignalReader:
    """The answer to a measurement, or PluginError if it is something else."""
    if not (hasattr(observation, "read") and hasattr(observation, "has")):
        raise PluginError("ranking", "Measure is answered by a SignalReader", repr(type(observation).__name__))
    return observation


class _NoSignals:
    def read(self, signal: Signal, name: str) -> FloatArray:
        raise ConfigError(f"signal {signal} of {name!r} was not asked for: the estimator does not declare it")

    def has(self, signal: Signal, name: str) -> bool:
        return False


NO_SIGNALS = _NoSignals()
"""What an estimator that declares no signals may read: nothing."""

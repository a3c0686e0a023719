"""Means and covariances of what weights read, merged from disjoint folds of the calibration images."""

from __future__ import annotations

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGraph
from prunus.core.signals import Signal, SignalReader
from prunus.plugins.discrepancy import reading_axes

MOMENTS = frozenset({Signal.ACTIVATION_MEAN, Signal.ACTIVATION_VARIANCE, Signal.ACTIVATION_COVARIANCE})


class PooledMoments:
    """Means and centred covariances of equal folds, merged into those of all images."""

    def __init__(self) -> None:
        self._folds = 0
        self._mean: dict[str, FloatArray] = {}
        self._second: dict[str, FloatArray] = {}
        self.without_covariance: set[str] = set()

    def add(self, graph: ChannelGraph, reader: SignalReader) -> dict[str, FloatArray]:
        """The fold's own moments: covariance, else variances, by the name of the reading weight."""
        self._folds += 1
        moments = {}
        for tensor, _ in reading_axes(graph):
            if reader.has(Signal.ACTIVATION_COVARIANCE, tensor):
                moments[tensor] = reader.read(Signal.ACTIVATION_COVARIANCE, tensor)
            else:
                self.without_covariance.add(tensor)
                if not reader.has(Signal.ACTIVATION_VARIANCE, tensor):
                    continue
                moments[tensor] = reader.read(Signal.ACTIVATION_VARIANCE, tensor)
            mean = reader.read(Signal.ACTIVATION_MEAN, tensor)
            self._mean[tensor] = self._mean.get(tensor, 0.0) + mean
            self._second[tensor] = self._second.get(tensor, 0.0) + moments[tensor] + _square(mean, moments[tensor])
        return moments

    def moments(self) -> dict[str, FloatArray]:
        n = self._folds
        return {t: second / n - _square(self._mean[t] / n, second) for t, second in self._second.items()}


def _square(mean: FloatArray, like: FloatArray) -> FloatArray:
    return np.asarray(np.outer(mean, mean) if like.ndim == 2 else mean**2)

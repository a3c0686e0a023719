"""Means and covariances of what weights read, merged from disjoint folds of the calibration images."""

from __future__ import annotations

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGraph
from prunus.core.signals import Signal, SignalReader
from prunus.plugins.discrepancy import reading_axes

MOMENTS = frozenset({Signal.ACTIVATION_MEAN, Signal.ACTIVATION_VARIANCE, Signal.ACTIVATION_COVARIANCE})


class PooledMoments:
    """Means and centred covariances of equal folds, merged into those of all images.

    Few images make every input of a wide reader look like a combination of the others, so off-diagonals are
    shrunk towards 0 by the share of them that is noise: rho = sum Var(c_ij) / sum c_ij^2 over i != j, the
    optimum of Ledoit & Wolf (2004) for a diagonal target (Schaefer & Strimmer 2005), with the variance of
    the mean of the folds taken from the folds themselves, on the scale of correlations.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[FloatArray]] = {}
        self._sum: dict[str, FloatArray] = {}
        """Of the folds' centred moments: the only thing that is as large as they are."""
        self._scale: dict[str, FloatArray] = {}
        self._squares: dict[str, float] = {}
        self.without_covariance: set[str] = set()

    def add(self, graph: ChannelGraph, reader: SignalReader) -> dict[str, FloatArray]:
        """The fold's own moments: covariance, else variances, by the name of the reading weight."""
        moments = {}
        for tensor, _ in reading_axes(graph):
            if reader.has(Signal.ACTIVATION_COVARIANCE, tensor):
                moments[tensor] = reader.read(Signal.ACTIVATION_COVARIANCE, tensor)
                squares = float((self._correlation(tensor, moments[tensor]) ** 2).sum())
                self._squares[tensor] = self._squares.get(tensor, 0.0) + squares
            else:
                self.without_covariance.add(tensor)
                if not reader.has(Signal.ACTIVATION_VARIANCE, tensor):
                    continue
                moments[tensor] = reader.read(Signal.ACTIVATION_VARIANCE, tensor)
            self._means.setdefault(tensor, []).append(reader.read(Signal.ACTIVATION_MEAN, tensor))
            if tensor in self._sum:
                self._sum[tensor] += moments[tensor]
            else:
                self._sum[tensor] = np.array(moments[tensor])
        return moments

    def moments(self) -> dict[str, FloatArray]:
        """Of all folds together; covariances shrunk."""
        pooled = {}
        for tensor, total in self._sum.items():
            means = np.array(self._means[tensor])
            apart = means - means.mean(axis=0)
            moment = total / len(means)
            moment += apart.T @ apart / len(means) if moment.ndim == 2 else (apart**2).mean(axis=0)
            if moment.ndim == 2:
                diagonal = np.diag(moment).copy()
                moment *= 1.0 - self.noise_share(tensor)
                np.fill_diagonal(moment, diagonal)
            pooled[tensor] = moment
        return pooled

    def noise_share(self, tensor: str) -> float:
        """rho, 0..1; 0 with a single fold, which says nothing about noise."""
        folds = len(self._means[tensor])
        if folds < 2:
            return 0.0
        mean_square = float((self._correlation(tensor, self._sum[tensor]) ** 2).sum()) / folds**2
        spread = max(self._squares[tensor] / folds - mean_square, 0.0)
        variance = spread / (folds - 1)
        return min(variance / max(mean_square, 1e-300), 1.0)

    def _correlation(self, tensor: str, covariance: FloatArray) -> FloatArray:
        """On the scale of the first fold, without the diagonal."""
        if tensor not in self._scale:
            deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
            self._scale[tensor] = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        scale = self._scale[tensor]
        correlation = covariance * scale[:, None] * scale
        np.fill_diagonal(correlation, 0.0)
        return np.asarray(correlation)

from __future__ import annotations

import numpy as np
import pytest

from prunus.core.cost import FloatArray
from prunus.core.signals import Signal
from prunus.core.testing.graphs import mlp_graph
from prunus.plugins.pooled_moments import PooledMoments


class Samples:
    """Signals of the reader "fc1.weight", from samples (images, n)."""

    def __init__(self, x: FloatArray) -> None:
        self.x = x

    def has(self, signal: Signal, name: str) -> bool:
        return True

    def read(self, signal: Signal, name: str) -> FloatArray:
        if signal == Signal.ACTIVATION_MEAN:
            return np.asarray(self.x.mean(axis=0))
        return np.cov(self.x.T, bias=True)


def pooled(x: FloatArray, folds: int) -> PooledMoments:
    found = PooledMoments()
    graph = mlp_graph([3, x.shape[1], 2])
    for k in range(folds):
        found.add(graph, Samples(x[k::folds]))
    return found


def test_equal_folds_merge_into_the_moments_of_all_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 1)) + 0.1 * rng.normal(size=(4000, 3)) + 5.0
    found = pooled(x, 4)
    whole = np.cov(x.T, bias=True)
    assert found.moments()["fc1.weight"] == pytest.approx(whole, rel=1e-2)
    assert np.diag(found.moments()["fc1.weight"]) == pytest.approx(np.diag(whole), rel=1e-12)


def test_one_fold_is_not_shrunk() -> None:
    x = np.random.default_rng(0).normal(size=(20, 8))
    assert pooled(x, 1).moments()["fc1.weight"] == pytest.approx(np.cov(x.T, bias=True))


def test_off_diagonals_that_are_noise_are_shrunk_away() -> None:
    x = np.random.default_rng(0).normal(size=(80, 40))
    assert pooled(x, 4).noise_share("fc1.weight") > 0.85


def test_shrinking_brings_few_samples_nearer_to_the_truth() -> None:
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(10):
        root = 0.2 * rng.normal(size=(60, 5))
        truth = root @ root.T + np.eye(60)
        x = rng.multivariate_normal(np.zeros(60), truth, size=48)
        shrunk = pooled(x, 4).moments()["fc1.weight"]
        errors.append([np.linalg.norm(shrunk - truth), np.linalg.norm(np.cov(x.T, bias=True) - truth)])
    mean = np.mean(errors, axis=0)
    assert mean[0] < 0.7 * mean[1]

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.budget import Budget, Target
from prunus.core.testing.graphs import mlp_graph
from prunus.plugins.unit_belief import Belief, prediction_quality, pruning_probabilities


def budget_of(graph, *targets: str) -> Budget:  # type: ignore[no-untyped-def]
    return Budget.resolve([Target.parse(t) for t in targets], graph.cost())


@given(st.floats(0.2, 0.9), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_probabilities_meet_the_budget_in_expectation_and_fall_with_the_belief(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = mlp_graph([6, 20, 15, 3]).with_floors(0.05)
    budget = budget_of(graph, f"macs={100 * share:.3f}%")
    beliefs = {n: Belief(rng.normal(size=g.units), float(rng.uniform(0, 0.2))) for n, g in graph.groups.items()}
    probabilities, _ = pruning_probabilities(graph, budget, beliefs)
    for name, p in probabilities.items():
        assert ((p >= 0) & (p <= 1)).all()
        assert (np.diff(p[np.argsort(beliefs[name].mean)]) <= 1e-12).all()
    expected = {name: float((1 - p).sum()) for name, p in probabilities.items()}
    load = budget.load(graph.cost(expected))
    assert load == pytest.approx(1.0, abs=1e-3)


def test_a_repeated_observation_is_believed_more_and_more() -> None:
    truth = np.array([0.0, 1.0, 2.0])
    rng = np.random.default_rng(0)
    belief = Belief.first(truth + rng.normal(size=3), 1.0)
    first = np.abs(belief.mean - truth).mean()
    for _ in range(200):
        belief = belief.predicted(np.zeros(3)).observed(truth + 0.1 * rng.normal(size=3), 0.01)
    assert np.abs(belief.mean - truth).mean() < first
    assert belief.variance < 0.05


def test_half_of_the_innovation_variance_counts_as_observation_noise() -> None:
    belief = Belief(np.zeros(2), variance=0.5)
    corrected = belief.observed(np.array([1.0, -1.0]), fold_variance=0.0)
    # var(e) = 1, so R = .5 and the gain is .5
    assert corrected.mean == pytest.approx([0.5, -0.5])
    assert corrected.variance == pytest.approx(0.25)


def test_the_mean_innovation_of_a_layer_is_expected_again() -> None:
    belief = Belief(np.zeros(4), variance=1.0).observed(np.full(4, 2.0), fold_variance=1.0)
    assert belief.bias == pytest.approx(0.6)
    assert belief.predicted(np.zeros(4)).mean == pytest.approx(np.full(4, 1.0 + 0.6))


def test_prediction_quality_by_hand() -> None:
    quality = prediction_quality(
        np.array([0.9, 0.8, 0.3, 0.1]), np.array([1.0, 0.0, 1.0, 0.0]), probabilities=True
    )
    assert quality.auc == pytest.approx(0.75)
    assert quality.overlap == pytest.approx(0.5)
    assert quality.chance == pytest.approx(0.5)
    assert quality.brier == pytest.approx((0.01 + 0.64 + 0.49 + 0.01) / 4)

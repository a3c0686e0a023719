from __future__ import annotations

import numpy as np
import pytest

from prunus.plugins.threshnet import FEATURES, ThreshNet, describe


def objective(net: ThreshNet, features: np.ndarray, choices: np.ndarray, advantage: float, floor: float) -> float:
    p = net.probabilities(features)
    entropy = -(p * np.log(p)).sum(axis=1)
    chosen = np.log(p[np.arange(len(p)), choices]).sum()
    return float(advantage * chosen - np.maximum(0, floor * np.log(p.shape[1]) - entropy).sum())


@pytest.mark.parametrize("floor", [0.2, 0.9999])
def test_the_gradient_is_that_of_the_objective(floor: float) -> None:
    rng = np.random.default_rng(0)
    net = ThreshNet(rng, floor=floor)
    net.parameters = [p + 0.05 * rng.normal(size=p.shape) for p in net.parameters]
    features, choices = rng.normal(size=(5, FEATURES)), rng.integers(0, 7, 5)
    gradients = net.gradient(features, choices, 0.7)
    for k, gradient in enumerate(gradients):
        for _ in range(10):
            at = tuple(int(rng.integers(n)) for n in gradient.shape)
            values = []
            for shift in (1e-5, -1e-5):
                net.parameters[k][at] += shift
                values.append(objective(net, features, choices, 0.7, floor))
                net.parameters[k][at] -= shift
            assert gradient[at] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_offsets_are_bounded_around_one() -> None:
    net = ThreshNet(np.random.default_rng(0), choices=7, limit=1.25)
    assert net.offsets[0] == pytest.approx(0.8)
    assert net.offsets[3] == pytest.approx(1.0)
    assert net.offsets[-1] == pytest.approx(1.25)


def test_before_learning_proposals_are_nearly_uniform() -> None:
    rng = np.random.default_rng(0)
    net = ThreshNet(rng)
    assert net.entropy(rng.normal(size=(9, FEATURES))) > 0.99


def test_the_mean_reward_rises_and_settles_where_groups_want_different_offsets() -> None:
    """A reward of the kind of the search: the first groups must shrink, the last must grow; 200 episodes."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(6, FEATURES)) * 0.3
    features[:, 18] = np.linspace(-1, 1, 6)
    wanted = np.array([0, 0, 1, 5, 6, 6])
    net = ThreshNet(rng, floor=0.05)
    rewards = []
    for _ in range(300):
        choices = net.sample(features, rng)
        rewards.append(-float(np.abs(choices - wanted).mean()) + 0.1 * rng.normal())
        net.learn(features, choices, rewards[-1])
    assert np.mean(rewards[-50:]) > np.mean(rewards[:50]) + 1.0
    assert np.abs(net.best(features) - wanted).mean() < 1.0


def test_the_entropy_floor_keeps_exploring() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(4, FEATURES))
    entropy = {}
    for floor in (0.0, 0.6):
        net = ThreshNet(np.random.default_rng(3), floor=floor)
        for _ in range(300):
            choices = net.sample(features, rng)
            net.learn(features, choices, -float(choices.mean()))
        entropy[floor] = net.entropy(features)
    assert entropy[0.6] > 0.4 > entropy[0.0]


def test_a_group_is_described_by_22_finite_numbers() -> None:
    for units in (2, 7, 512):
        masses = np.full(units, 1 / units)
        features = describe(masses, 0.5, 0.1, 1.4, 0.25)
        assert features.shape == (FEATURES,)
        assert np.isfinite(features).all()
        assert features[16] == pytest.approx(1.0)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.signals import Signal
from prunus.core.testing.simulation import SimulatedSignals
from prunus.plugins.energies import SIGNALS, Energies, spd_inverse


def network(unit_of: np.ndarray, units: int, seed: int) -> tuple[ChannelGraph, np.ndarray, np.ndarray]:
    """One group read by one layer; its weight and the covariance of what it sees."""
    rng = np.random.default_rng(seed)
    n = len(unit_of)
    mixing = rng.normal(size=(n, n))
    group = ChannelGroup("g", units, (Slice("w", 1, "reads", unit_of),))
    return ChannelGraph([group], [], {"w": (5, n)}), rng.normal(size=(5, n)), mixing @ mixing.T / n


def signals(weight: np.ndarray, covariance: np.ndarray) -> SimulatedSignals:
    arrays = {
        (Signal.WEIGHT, "w"): weight,
        (Signal.ACTIVATION_COVARIANCE, "w"): covariance,
        (Signal.ACTIVATION_VARIANCE, "w"): np.diag(covariance).copy(),
    }
    return SimulatedSignals(SIGNALS["conditional"], arrays)


def noise_of(covariance: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """What is added to every input that survives with these probabilities."""
    variance = np.diag(covariance)
    return variance * (1 - alive) / alive + 1e-4 * variance.mean()


def conditional(covariance: np.ndarray, mine: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Var(x_mine | the others, each with its noise): the Schur complement, written out."""
    rest = np.setdiff1d(np.arange(len(covariance)), mine)
    cross = covariance[np.ix_(mine, rest)]
    seen = covariance[np.ix_(rest, rest)] + np.diag(noise[rest])
    return covariance[np.ix_(mine, mine)] - cross @ np.linalg.solve(seen, cross.T)


@given(st.integers(0, 10**6), st.integers(2, 7))
@settings(max_examples=40, deadline=None)
def test_conditional_energy_is_the_schur_complement_with_noise_on_who_may_go(seed: int, units: int) -> None:
    graph, weight, covariance = network(np.arange(units), units, seed)
    pi = np.random.default_rng(seed).uniform(0.05, 1, units)
    got = Energies(graph, signals(weight, covariance), "conditional").at({"g": pi})["g"]
    noise = noise_of(covariance, pi)
    wanted = [
        (weight[:, i] ** 2).sum() * conditional(covariance, np.array([i]), noise)[0, 0] for i in range(units)
    ]
    assert got == pytest.approx(np.array(wanted), rel=1e-6, abs=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_flattened_unit_has_the_energy_of_its_block_given_the_rest(seed: int) -> None:
    unit_of = np.array([0, 1, 2, 0, 1, 2])
    graph, weight, covariance = network(unit_of, 3, seed)
    pi = np.random.default_rng(seed).uniform(0.1, 1, 3)
    got = Energies(graph, signals(weight, covariance), "conditional").at({"g": pi})["g"]
    noise = noise_of(covariance, pi[unit_of])
    for i in range(3):
        mine = np.flatnonzero(unit_of == i)
        block = weight[:, mine] @ conditional(covariance, mine, noise) @ weight[:, mine].T
        assert got[i] == pytest.approx(np.trace(block), rel=1e-6, abs=1e-9)


def test_a_duplicate_is_worthless_while_its_twin_survives_and_precious_when_the_twin_goes() -> None:
    covariance = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    graph, _, _ = network(np.arange(3), 3, 0)
    energies = Energies(graph, signals(np.ones((5, 3)), covariance), "conditional")
    both = energies.at({"g": np.ones(3)})["g"]
    alone = energies.at({"g": np.array([1.0, 0.0, 1.0])})["g"]
    assert both[0] < 0.01 * both[2]
    assert alone[0] > 0.98 * both[2]


def _lost(weight: np.ndarray, covariance: np.ndarray, mine: np.ndarray, noise: np.ndarray) -> float:
    """Output variance that least squares leaves without x_mine, less what it leaves with it; the others noisy."""

    def left(seen: np.ndarray, own: np.ndarray) -> float:
        cross = covariance[np.ix_(seen, np.arange(len(covariance)))] @ weight.T
        moment = covariance[np.ix_(seen, seen)] + np.diag(own)
        explained = np.trace(cross.T @ np.linalg.solve(moment, cross))
        return float(np.trace(weight @ covariance @ weight.T) - explained)

    everyone = np.arange(len(covariance))
    rest = np.setdiff1d(everyone, mine)
    with_it = np.where(np.isin(everyone, mine), 0.0, noise)
    return (left(rest, noise[rest]) - left(everyone, with_it)) / float(np.trace(weight @ covariance @ weight.T))


@given(st.integers(0, 10**6), st.integers(2, 7))
@settings(max_examples=40, deadline=None)
def test_refitted_energy_is_what_least_squares_loses_with_the_unit(seed: int, units: int) -> None:
    graph, weight, covariance = network(np.arange(units), units, seed)
    pi = np.random.default_rng(seed).uniform(0.05, 1, units)
    covariance += 0.1 * np.eye(units)
    got = Energies(graph, signals(weight, covariance), "refitted").at({"g": pi})["g"]
    noise = noise_of(covariance, pi)
    wanted = [_lost(weight, covariance, np.array([i]), noise) for i in range(units)]
    assert got == pytest.approx(np.array(wanted), rel=1e-3, abs=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_refitted_energy_of_a_flattened_unit_is_that_of_its_block(seed: int) -> None:
    unit_of = np.array([0, 1, 2, 0, 1, 2])
    graph, weight, covariance = network(unit_of, 3, seed)
    covariance += 0.1 * np.eye(6)
    pi = np.random.default_rng(seed).uniform(0.1, 1, 3)
    got = Energies(graph, signals(weight, covariance), "refitted").at({"g": pi})["g"]
    noise = noise_of(covariance, pi[unit_of])
    wanted = [_lost(weight, covariance, np.flatnonzero(unit_of == i), noise) for i in range(3)]
    assert got == pytest.approx(np.array(wanted), rel=1e-3, abs=1e-6)


def test_the_last_of_many_that_say_the_same_is_worth_all_of_them_once_refitted() -> None:
    covariance = np.ones((4, 4)) + 1e-3 * np.eye(4)
    graph, _, _ = network(np.arange(4), 4, 0)
    alone = {"g": np.array([1.0, 0, 0, 0])}
    energies = {
        s: Energies(graph, signals(np.ones((5, 4)), covariance), s).at(alone)["g"]
        for s in ("refitted", "conditional")
    }
    assert energies["refitted"][0] > 0.95  # of the whole output
    assert energies["conditional"][0] < 0.1 * 5 * 16  # its own weights alone: a sixteenth


def test_weight_energy_is_squared_norm_times_variance() -> None:
    graph, weight, covariance = network(np.arange(4), 4, 3)
    got = Energies(graph, signals(weight, covariance), "weight").at({"g": np.full(4, 0.3)})["g"]
    assert got == pytest.approx((weight**2).sum(axis=0) * np.diag(covariance))


def test_a_reader_without_covariance_uses_the_variance_and_without_activations_one() -> None:
    graph, weight, covariance = network(np.arange(4), 4, 3)
    variance = {
        (Signal.WEIGHT, "w"): weight,
        (Signal.ACTIVATION_VARIANCE, "w"): np.diag(covariance).copy(),
    }
    wide = Energies(graph, SimulatedSignals(SIGNALS["conditional"], variance), "conditional")
    assert not wide.assumed_variance
    assert wide.at({"g": np.ones(4)})["g"] == pytest.approx((weight**2).sum(axis=0) * np.diag(covariance))
    blind = Energies(graph, SimulatedSignals(frozenset({Signal.WEIGHT}), {(Signal.WEIGHT, "w"): weight}), "weight")
    assert blind.assumed_variance
    assert blind.at({"g": np.ones(4)})["g"] == pytest.approx((weight**2).sum(axis=0))


def test_a_group_that_no_weight_reads_has_the_energy_of_its_writers() -> None:
    group = ChannelGroup("g", 2, (Slice("w", 0, "writes", np.arange(2)),))
    graph = ChannelGraph([group], [], {"w": (2, 3)})
    weight = np.array([[1.0, 2, 2], [0, 0, 1]])
    found = Energies(graph, SimulatedSignals(SIGNALS["weight"], {(Signal.WEIGHT, "w"): weight}), "weight")
    assert found.at({"g": np.ones(2)})["g"].tolist() == [9, 1]


def test_energies_of_all_readers_add_up() -> None:
    units = np.arange(2)
    group = ChannelGroup("g", 2, (Slice("w", 1, "reads", units), Slice("v", 1, "reads", units[::-1].copy())))
    graph = ChannelGraph([group], [], {"w": (1, 2), "v": (1, 2)})
    arrays = {(Signal.WEIGHT, "w"): np.array([[1.0, 2]]), (Signal.WEIGHT, "v"): np.array([[3.0, 5]])}
    found = Energies(graph, SimulatedSignals(frozenset({Signal.WEIGHT}), arrays), "weight").at({"g": np.ones(2)})
    assert found["g"].tolist() == [1 + 25, 4 + 9]


def test_the_inverse_by_cholesky_is_the_inverse() -> None:
    _, _, covariance = network(np.arange(6), 6, 1)
    assert spd_inverse(covariance + np.eye(6)) @ (covariance + np.eye(6)) == pytest.approx(np.eye(6), abs=1e-9)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.plugins.scale_mixture import coefficients, objective, scale

C1 = 4.0


@given(st.floats(0.01, 100), st.integers(1, 500), st.floats(1e-4, 2))
@settings(max_examples=200)
def test_theta_is_the_brute_force_minimum_of_the_objective(per_number: float, n: int, noise: float) -> None:
    energy = per_number * n
    theta = float(scale(np.array([energy]), np.array([float(n)]), noise, C1)[0])
    theta0 = np.sqrt(max(per_number - noise, 0.0))
    if theta0 < 1e-6:
        assert theta < 1e-6
        return

    def smooth(t: np.ndarray) -> np.ndarray:
        # the closed form is the stationary point for epsilon -> 0 (the group's own code drops it there too)
        return energy * (t / theta0) ** 2 - 2 * energy * t / theta0 + C1 * noise * np.log(t)

    if theta > 0:
        around = np.linspace(theta0 / 2, 1.5 * theta0, 20001)
        best = around[np.argmin(smooth(around))]
        assert theta == pytest.approx(best, abs=theta0 * 1e-3)
        values = objective(np.array([theta, 0.0]), np.array([energy] * 2), np.array([theta0] * 2), noise, C1)
        assert values[0] < values[1]
    elif energy >= 2 * C1 * noise:
        root = theta0 / 2 * (1 + np.sqrt(1 - 2 * C1 * noise / energy))
        values = objective(np.array([root, 0.0]), np.array([energy] * 2), np.array([theta0] * 2), noise, C1)
        assert values[0] >= values[1]


def test_theta_by_hand() -> None:
    # e = 9, n = 1, sigma^2 = 1: theta0 = sqrt 8, theta = sqrt 8 / 2 (1 + sqrt(1 - 8/9))
    assert scale(np.array([9.0]), np.array([1.0]), 1.0)[0] == pytest.approx(2**0.5 * (4 / 3))


def test_a_unit_within_the_noise_has_theta_zero() -> None:
    assert scale(np.array([0.9, 7.9, 0.0]), np.ones(3), 1.0).tolist() == [0, 0, 0]


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=30, unique=True))
def test_coefficients_grow_with_energy_and_separate_units_below_the_noise(energies: list[float]) -> None:
    values = np.sort(np.array(energies)) + 1e-3
    found = coefficients({"g": values}, {"g": np.full(len(values), 16.0)}, kappa=0.5)
    assert np.all(np.diff(found.value["g"]) >= 0)
    gaps = np.diff(np.log(values)) > 1e-3
    assert np.all(np.diff(found.value["g"])[gaps & (values[1:] > 1e-9)] > 0)


def test_coefficients_do_not_depend_on_the_scale_or_width_of_a_group() -> None:
    energy = np.array([1.0, 2, 3, 6])
    found = coefficients(
        {"narrow": energy, "loud": energy * 1e4, "wide": energy},
        {"narrow": np.full(4, 144.0), "loud": np.full(4, 144.0), "wide": np.full(4, 576.0)},
    )
    assert found.value["narrow"] == pytest.approx(found.value["loud"])
    assert found.value["narrow"] == pytest.approx(found.value["wide"], rel=0.05)


def test_without_normalisation_the_loud_group_takes_everything() -> None:
    energy = np.array([1.0, 2, 3, 6])
    sizes = {"quiet": np.full(4, 144.0), "loud": np.full(4, 144.0)}
    found = coefficients({"quiet": energy, "loud": energy * 1e4}, sizes, normalise=False)
    assert found.value["loud"].min() > found.value["quiet"].max() + 3


def test_decay_is_full_for_units_of_theta_zero_and_fades_for_strong_ones() -> None:
    found = coefficients({"g": np.array([1e-6, 1.0, 100.0])}, {"g": np.ones(3)})
    decay = found.decay(5e-4)["g"]
    assert decay[0] == pytest.approx(5e-4)
    assert decay[2] < 1e-2 * decay[0]


def test_a_dead_group_gives_numbers() -> None:
    found = coefficients({"dead": np.zeros(3), "alive": np.ones(3)}, {"dead": np.ones(3), "alive": np.ones(3)})
    assert np.isfinite(found.value["dead"]).all()
    assert found.value["dead"].max() < found.value["alive"].min()

"""The global group-sparsity coefficient: a Gaussian scale mixture over units (methods, section 2.2).

A unit's contribution is v = theta beta with beta ~ N(0, I) and p(theta) ~ 1/theta (Dong et al., Image
Restoration via Simultaneous Sparse Coding, IJCV 2015). With e the energy of v in n numbers and sigma^2 the
noise floor, theta minimises

    f(theta) = e (theta/theta0)^2 - 2 e (theta/theta0) + c1 sigma^2 log(theta + epsilon),
    theta0 = sqrt(max(e/n - sigma^2, 0)).

epsilon is sigma: nothing below the noise floor is told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prunus.core.cost import FloatArray

_TIE = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """Per group: how strongly the mixture wants each unit."""

    value: dict[str, FloatArray]
    """Lambda = log(1 + theta^2/sigma^2); units of theta 0 follow below 0, in the order of their energy."""
    theta: dict[str, FloatArray]
    noise: float
    """sigma^2"""

    def decay(self, rate: float) -> dict[str, FloatArray]:
        """Each unit's own weight decay while training: rate * sigma^2 / (theta^2 + sigma^2)."""
        return {name: rate * self.noise / (theta**2 + self.noise) for name, theta in self.theta.items()}


def scale(energy: FloatArray, size: FloatArray, noise: float, c1: float = 4.0) -> FloatArray:
    """theta where f has its minimum, epsilon left out of the slope; 0 where the energy is below 2 c1 sigma^2, or
    0 has the lower objective."""
    theta0 = np.sqrt(np.maximum(energy / size - noise, 0.0))
    real = (energy >= 2 * c1 * noise) & (theta0 > 0)
    root = np.sqrt(np.where(real, 1 - 2 * c1 * noise / np.where(real, energy, 1.0), 0.0))
    theta = np.where(real, theta0 / 2 * (1 + root), 0.0)
    gain = objective(theta, energy, np.where(real, theta0, 1.0), noise, c1)
    nothing = objective(np.zeros_like(theta), energy, np.where(real, theta0, 1.0), noise, c1)
    return np.asarray(np.where(real & (gain < nothing), theta, 0.0), dtype=np.float64)


def objective(theta: FloatArray, energy: FloatArray, theta0: FloatArray, noise: float, c1: float) -> FloatArray:
    """f(theta); see the top of the file."""
    ratio = theta / theta0
    return np.asarray(energy * ratio**2 - 2 * energy * ratio + c1 * noise * np.log(theta + np.sqrt(noise)))


def coefficients(
    energies: Mapping[str, FloatArray],
    sizes: Mapping[str, FloatArray],
    *,
    kappa: float = 0.05,
    c1: float = 4.0,
    normalise: bool = True,
) -> Coefficients:
    """Lambda of every unit, comparable over the whole network.

    Energies are brought to mean 1 per number *inside each group* first; without it (`normalise=False`, for
    ablation) groups with large maps or weights take everything. sigma^2 = kappa * median of energy per number.
    """
    scaled = {name: _mean_one(e, sizes[name]) if normalise else e for name, e in energies.items()}
    per_number = np.concatenate([scaled[name] / sizes[name] for name in scaled])
    noise = max(kappa * float(np.median(per_number)), 1e-12 * float(per_number.mean()), 1e-300)
    theta = {name: scale(e, sizes[name], noise, c1) for name, e in scaled.items()}
    value = {}
    for name, t in theta.items():
        below = np.log(np.maximum(scaled[name] / sizes[name], 1e-12 * noise) / noise)
        # a unit of theta 0 has at most this: e/n <= sigma^2 or e <= 2 c1 sigma^2
        below = np.minimum(below - np.log(2 * c1), 0.0)
        value[name] = np.where(t > 0, np.log1p(t**2 / noise), _TIE * below)
    return Coefficients(value, theta, noise)


def _mean_one(energy: FloatArray, size: FloatArray) -> FloatArray:
    mean = float((energy / size).mean())
    return np.asarray(energy / mean if mean > 0 else np.zeros_like(energy), dtype=np.float64)

"""A multilayer perceptron in numpy, with gates on what layers read: just enough to run any method on.

x       (samples, inputs)      weights   {"fc0.weight": (out, in), "fc0.bias": (out,), ...}
gates   one (in,) per layer, scaling what the layer reads
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunus.core.cost import FloatArray, IntArray

Weights = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled vectors."""

    x: FloatArray
    y: IntArray

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: IntArray | slice) -> Dataset:
        return Dataset(self.x[index], self.y[index])


def clustered_data(inputs: int, classes: int, samples: int, rng: np.random.Generator) -> Dataset:
    """Classes as overlapping pairs of clusters in a few correlated directions, so that depth and width help."""
    centres = rng.normal(size=(2 * classes, inputs)) * 1.5
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    cluster = rng.integers(0, 2 * classes, samples)
    x = centres[cluster] + rng.normal(size=(samples, inputs)) @ mixing
    return Dataset(x, (cluster % classes).astype(np.int64))


def random_weights(widths: Sequence[int], rng: np.random.Generator) -> dict[str, FloatArray]:
    """He initialisation of layers `widths[k] -> widths[k + 1]`."""
    weights = {}
    for k, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        weights[f"fc{k}.weight"] = rng.normal(size=(fan_out, fan_in)) * np.sqrt(2 / fan_in)
        weights[f"fc{k}.bias"] = np.zeros(fan_out)
    return weights


def depth(weights: Weights) -> int:
    return len(weights) // 2


def no_gates(weights: Weights) -> list[FloatArray]:
    return [np.ones(weights[f"fc{k}.weight"].shape[1]) for k in range(depth(weights))]


def forward(weights: Weights, x: FloatArray, gates: Sequence[FloatArray] | None = None) -> list[FloatArray]:
    """What every layer reads (before its gates), then the logits."""
    scales = no_gates(weights) if gates is None else gates
    seen = [x]
    for k in range(depth(weights)):
        z = (seen[-1] * scales[k]) @ weights[f"fc{k}.weight"].T + weights[f"fc{k}.bias"]
        seen.append(z if k == depth(weights) - 1 else np.maximum(z, 0.0))
    return seen


def softmax(logits: FloatArray) -> FloatArray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float64)


def cross_entropy(logits: FloatArray, y: IntArray) -> FloatArray:
    """(samples,)"""
    return np.asarray(-np.log(softmax(logits)[np.arange(len(y)), y] + 1e-300), dtype=np.float64)


def backward(
    weights: Weights, seen: Sequence[FloatArray], gates: Sequence[FloatArray], slope: FloatArray
) -> tuple[dict[str, FloatArray], list[FloatArray]]:
    """Gradients of all weights, and dLoss/dgate of every layer per sample: (samples, in) each.

    `seen` is the answer of `forward`, `slope` dLoss/dlogits per sample, (samples, classes), of the mean loss.
    """
    gradients: dict[str, FloatArray] = {}
    of_gates: list[FloatArray] = [np.zeros(0)] * depth(weights)
    for k in reversed(range(depth(weights))):
        weight = weights[f"fc{k}.weight"]
        gradients[f"fc{k}.weight"] = slope.T @ (seen[k] * gates[k])
        gradients[f"fc{k}.bias"] = slope.sum(axis=0)
        upstream = slope @ weight
        of_gates[k] = upstream * seen[k]
        slope = upstream * gates[k] * (seen[k] > 0)
    return gradients, of_gates


def refitted(
    pruned: dict[str, FloatArray],
    dense: Weights,
    kept_rows: Sequence[IntArray],
    kept_inputs: Sequence[IntArray],
    x: FloatArray,
    *,
    sequential: bool = True,
    survival: Sequence[FloatArray] | None = None,
    ridge: float = 1e-3,
) -> dict[str, FloatArray]:
    """Weights regressed, layer by layer, onto what the dense network's layers produced (methods, section 0).

    `kept_rows`, `kept_inputs`: per layer, the dense indices that are left. `survival`: per layer the
    probability that an input goes next.
    """
    result = dict(pruned)
    dense_seen = forward(dense, x)
    for k in range(depth(pruned)):
        target = dense_seen[k] @ dense[f"fc{k}.weight"].T + dense[f"fc{k}.bias"]
        target = target[:, kept_rows[k]]
        given = forward(result, x)[k] if sequential else dense_seen[k][:, kept_inputs[k]]
        mean_in, mean_out = given.mean(axis=0), target.mean(axis=0)
        centred = given - mean_in
        covariance = centred.T @ centred / len(x)
        lam = ridge * float(np.diag(covariance).mean())
        cross = (target - mean_out).T @ centred / len(x)
        system = covariance + (lam + 1e-9) * np.eye(len(covariance))
        if survival is not None:
            gone = np.minimum(survival[k], 0.9)
            system += np.diag(gone / (1 - gone) * np.diag(covariance))
        weight = np.linalg.solve(system, (cross + lam * pruned[f"fc{k}.weight"]).T).T
        result[f"fc{k}.weight"] = weight
        result[f"fc{k}.bias"] = mean_out - weight @ mean_in
    return result


def bias_shifted(
    weights: dict[str, FloatArray], dense: Weights, rows: Sequence[IntArray], x: FloatArray
) -> dict[str, FloatArray]:
    """Only biases are moved, so that the mean of every layer's output is the dense model's."""
    result, seen = dict(weights), forward(dense, x)
    for k in range(depth(weights)):
        wanted = (seen[k] @ dense[f"fc{k}.weight"].T + dense[f"fc{k}.bias"]).mean(axis=0)[rows[k]]
        given = forward(result, x)[k].mean(axis=0)
        result[f"fc{k}.bias"] = wanted - weights[f"fc{k}.weight"] @ given
    return result

"""An adapter without a framework: a small trained numpy network that answers every directive.

It lets a method, the run engine or the contract kit run end to end in milliseconds:

    adapter = SimulatedAdapter((8, 24, 16, 4), seed=0)
    transcript = drive(policy, adapter.task("macs=50%"), adapter)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunus.core.adapter import Watcher
from prunus.core.budget import Budget, Target
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import (
    Changed,
    Directive,
    Distillation,
    Evaluate,
    Evaluated,
    Gates,
    Grow,
    Measure,
    Merge,
    Observation,
    Remove,
    Snapshot,
    Train,
    Trained,
    Verification,
)
from prunus.core.errors import ConfigError, JournalError, PlanError, TrainingError, VerificationError
from prunus.core.graph import Axis, ChannelGraph, Keep
from prunus.core.importance import ImportanceEstimator
from prunus.core.plan import ModelSource, PruningPlan
from prunus.core.policy import PruningTask
from prunus.core.signals import Signal, SignalReader
from prunus.core.testing.graphs import mlp_graph
from prunus.core.testing.network import (
    backward,
    bias_shifted,
    clustered_data,
    cross_entropy,
    depth,
    forward,
    random_weights,
    refitted,
    softmax,
)

BATCH = 32
LR = 0.05


class SimulatedSignals:
    """Measured arrays by (signal, name)."""

    def __init__(self, asked: frozenset[Signal], arrays: Mapping[tuple[Signal, str], FloatArray]) -> None:
        self._asked, self._arrays = asked, arrays

    def read(self, signal: Signal, name: str) -> FloatArray:
        if signal not in self._asked:
            raise ConfigError(f"signal {signal} was not asked for", key=name)
        if (signal, name) not in self._arrays:
            raise PlanError(f"there is no {signal} of {name!r}", group=name)
        array = self._arrays[signal, name].view()
        array.flags.writeable = False
        return array

    def has(self, signal: Signal, name: str) -> bool:
        return (signal, name) in self._arrays


@dataclass(slots=True, eq=False)
class _State:
    """A model as it is now: its weights, its graph, and how it came to be."""

    weights: dict[str, FloatArray]
    graph: ChannelGraph
    plan: PruningPlan


class SimulatedAdapter:
    """`ModelAdapter` over a multilayer perceptron; the dense model is trained at construction."""

    def __init__(
        self,
        widths: Sequence[int] = (8, 24, 16, 4),
        *,
        seed: int = 0,
        samples: int = 768,
        dense_epochs: float = 12.0,
        min_share: float = 0.05,
        covariances: bool = True,
        **options: Mapping[str, Any],
    ) -> None:
        """`options` override fields of groups, `covariances=False` withholds them as for very wide readers."""
        rng = np.random.default_rng(seed)
        self._seed, self._trainings, self._covariances = seed, 0, covariances
        self._watcher: Watcher | None = None
        self._original = mlp_graph(widths, **options).with_floors(min_share)
        data = clustered_data(widths[0], widths[-1], samples, rng)
        parts = {"holdout": slice(0, samples // 4), "train": slice(samples // 4, None)}
        self._data = {name: data.take(part) for name, part in parts.items()}
        self._data["calibration"] = self._data["train"]
        plan = PruningPlan.begin(ModelSource(name="simulated"), self._original, {})
        self._state = _State(random_weights(widths, rng), self._original, plan)
        if dense_epochs > 0:
            self.train(Train(epochs=dense_epochs, label="dense"))
        self._snapshots = {"dense": self._copy(self._state)}

    @property
    def graph(self) -> ChannelGraph:
        return self._state.graph

    @property
    def images(self) -> dict[str, int]:
        """Number of samples per split."""
        return {name: len(data) for name, data in self._data.items()}

    @property
    def weights(self) -> dict[str, FloatArray]:
        """The model as it is now."""
        return self._state.weights

    def watch(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def trace(self) -> ChannelGraph:
        return self._original

    def task(
        self,
        *targets: str,
        epochs: float = 0.0,
        seed: int = 0,
        estimator: ImportanceEstimator | None = None,
        has_data: bool = True,
        has_labels: bool = True,
    ) -> PruningTask:
        """A task on this model."""
        dense = self.evaluate(Evaluate(model="dense")) if has_data and has_labels else None
        return PruningTask(
            graph=self._original,
            budget=Budget.resolve([Target.parse(t) for t in targets], self._original.cost()),
            rng=np.random.default_rng(seed),
            estimator=estimator,
            epochs=epochs,
            has_data=has_data,
            has_labels=has_labels,
            dense_accuracy=dense.accuracy if dense else None,
            held_out=dense.samples if dense else None,
            calibration=self.images["calibration"] if has_data else None,
            classes=len(np.unique(self._data["train"].y)),
        )

    def answer(self, directive: Directive) -> Observation:
        """The observation that belongs to a directive."""
        match directive:
            case Measure():
                return self.measure(directive)
            case Train():
                return self.train(directive)
            case Evaluate():
                return self.evaluate(directive)
            case Grow():
                return self.grow(directive)
            case Merge():
                return self.merge(directive)
            case Remove():
                return self.remove(directive)
            case Snapshot():
                self.snapshot(directive)
        return None

    def measure(self, directive: Measure) -> SignalReader:
        state, (part, parts) = self._state, directive.fold
        data = self._data[directive.split].take(slice(0, directive.images)).take(slice(part, None, parts))
        gates = self._layer_gates(state.graph, directive.gates)
        arrays: dict[tuple[Signal, str], FloatArray] = {
            (Signal.WEIGHT, name): weight for name, weight in state.weights.items()
        }
        seen = forward(state.weights, data.x, gates)
        for k in range(depth(state.weights)):
            name, x = f"fc{k}.weight", seen[k]
            arrays[Signal.ACTIVATION_MEAN, name] = x.mean(axis=0)
            arrays[Signal.ACTIVATION_VARIANCE, name] = x.var(axis=0)
            if self._covariances:
                arrays[Signal.ACTIVATION_COVARIANCE, name] = np.cov(x.T, bias=True).reshape(x.shape[1], -1)
        _, of_gates = backward(state.weights, seen, gates, self._slope(seen[-1], data.y))
        for name, group in state.graph.groups.items():
            per_batch = [np.zeros(group.units) for _ in range(0, len(data), BATCH)]
            for piece in group.with_role("reads"):
                samples = of_gates[_layer(piece.tensor)] * len(data)
                for b in range(len(per_batch)):
                    mean = samples[b * BATCH : (b + 1) * BATCH].mean(axis=0)
                    np.add.at(per_batch[b], piece.unit_of, mean)
            arrays[Signal.GATE_GRADIENT, name] = np.mean(per_batch, axis=0)
            arrays[Signal.GATE_FISHER, name] = np.mean(np.square(per_batch), axis=0) * BATCH
        asked = {key: value for key, value in arrays.items() if key[0] in directive.signals}
        return SimulatedSignals(directive.signals, asked)

    def train(self, directive: Train) -> Trained:
        if directive.within is not None:
            return self._train_within(directive, directive.within)
        state, data = self._state, self._data["train"]
        self._trainings += 1
        rng = np.random.default_rng([self._seed, self._trainings])
        gates = self._layer_gates(state.graph, directive.gates)
        per_epoch = -(-len(data) // BATCH)
        steps = max(1, round(directive.epochs * per_epoch))
        losses, hits = [], []
        average = dict(state.weights)
        for step in range(steps):
            if step % per_epoch == 0:
                order = rng.permutation(len(data))
            batch = data.take(order[(step % per_epoch) * BATCH :][:BATCH])
            at = directive.start + (directive.stop - directive.start) * step / steps
            rate = (directive.lr or LR) * (
                0.5 * (1 + np.cos(np.pi * at)) if directive.schedule == "cosine" else 1.0
            )
            seen = forward(state.weights, batch.x, gates)
            slope = self._slope(seen[-1], batch.y, batch.x, directive.distil)
            gradients, _ = backward(state.weights, seen, gates, slope)
            self._decay(state, gradients, directive.decay)
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
            shorter = min(1.0, (directive.clip or math.inf) / max(norm, 1e-12))
            for name, gradient in gradients.items():
                state.weights[name] = state.weights[name] - rate * shorter * gradient
            if directive.ema is not None:
                average = {
                    name: directive.ema * average[name] + (1 - directive.ema) * weight
                    for name, weight in state.weights.items()
                }
            losses.append(float(cross_entropy(seen[-1], batch.y).mean()))
            hits.append(float((seen[-1].argmax(axis=1) == batch.y).mean()))
            if not np.isfinite(losses[-1]):
                raise TrainingError(f"the loss is {losses[-1]} at step {step}; lower --lr", step=step)
            if self._watcher is not None:
                self._watcher.progress(directive.label, step + 1, steps, losses[-1], rate)
        if directive.ema is not None:
            self._snapshots["ema"] = _State(average, state.graph, state.plan)
        macs = 3.0 * state.graph.cost().macs * steps * BATCH
        last, accuracy = float(np.mean(losses[-per_epoch:])), float(np.mean(hits[-per_epoch:]))
        least = min(last, *(float(np.mean(losses[i : i + per_epoch])) for i in range(0, steps, per_epoch)))
        return Trained(last, accuracy, macs, steps, least)

    def evaluate(self, directive: Evaluate) -> Evaluated:
        state = self._state if directive.model is None else self._snapshots[directive.model]
        data = self._data[directive.split].take(slice(0, directive.images))
        gates = directive.gates
        if directive.within is not None:
            state = self._removed(state, Remove(directive.within, gates=gates, refit=directive.refit))
            gates = None
        logits = forward(state.weights, data.x, self._layer_gates(state.graph, gates))[-1]
        loss = float(cross_entropy(logits, data.y).mean())
        return Evaluated(loss, float((logits.argmax(axis=1) == data.y).mean()), len(data))

    def grow(self, directive: Grow) -> Changed:
        state = self._state
        graph, growth = state.graph.widen(directive.widths, seed=self._seed)
        plan = state.plan.after_growth(state.graph, growth)
        weights = {name: _gathered(weight, name, growth.sources) for name, weight in state.weights.items()}
        rng = np.random.default_rng([self._seed, len(growth.copies)])
        for name, copied in growth.copies.items():
            old = state.graph.units[name]
            source = np.concatenate([np.arange(old), copied])
            shared = np.bincount(source, minlength=old)[source]
            for piece in graph.groups[name].with_role("reads"):
                noise = directive.noise * rng.normal(size=len(source))
                totals = np.bincount(source, weights=noise, minlength=old)
                even = noise - (totals / np.bincount(source, minlength=old))[source]
                weights[piece.tensor] = weights[piece.tensor] * ((1 + even) / shared)[piece.unit_of]
        self._state = _State(weights, graph, plan)
        return Changed(graph, plan, self._verified(state, self._state, None))

    def merge(self, directive: Merge) -> Changed:
        raise PlanError("a multilayer perceptron has no convolutions, and so no branches to merge")

    def remove(self, directive: Remove) -> Changed:
        before = self._state
        bare = self._removed(before, Remove(directive.keep, gates=directive.gates))
        alive = {
            name: np.isin(np.arange(group.units), directive.keep[name]).astype(np.float64)
            if name in directive.keep
            else np.ones(group.units)
            for name, group in before.graph.groups.items()
        }
        scaled = {name: a * (directive.gates or {}).get(name, 1.0) for name, a in alive.items()}
        verification = self._verified(before, bare, scaled)
        self._state = bare if directive.refit == "none" else self._removed(before, directive)
        return Changed(self._state.graph, self._state.plan, verification)

    def snapshot(self, directive: Snapshot) -> None:
        self._snapshots[directive.name] = self._copy(self._state)

    def checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        states = {"": self._state, **self._snapshots}
        arrays = {f"{name}/{k}": w for name, state in states.items() for k, w in state.weights.items()}
        np.savez(folder / "weights.npz", allow_pickle=False, **arrays)
        plans = {name: state.plan.model_dump(mode="json", by_alias=True) for name, state in states.items()}
        (folder / "state.json").write_text(json.dumps({"trainings": self._trainings, "plans": plans}))

    def restore(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / "state.json").read_text())
            with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
                weights = {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError) as error:
            raise JournalError(f"checkpoint {folder} cannot be read: {error}") from error
        states = {}
        for name, raw in facts["plans"].items():
            plan = PruningPlan.model_validate(raw)
            mine = {k.rpartition("/")[2]: w for k, w in weights.items() if k.rpartition("/")[0] == name}
            graph = self._original.widen(plan.grow, seed=self._seed)[0].restrict(plan.keep)
            states[name] = _State(mine, graph, plan)
        self._trainings = int(facts["trainings"])
        self._state = states.pop("")
        self._snapshots = states

    @staticmethod
    def _copy(state: _State) -> _State:
        return _State(dict(state.weights), state.graph, state.plan)

    @staticmethod
    def _layer_gates(graph: ChannelGraph, gates: Gates | None) -> list[FloatArray]:
        """The gates of every layer's input axis, in the order of the layers."""
        shapes = sorted((_layer(name), shape) for name, shape in graph.tensors.items() if len(shape) == 2)
        scales = [np.ones(shape[1]) for _, shape in shapes]
        for name, values in (gates or {}).items():
            for piece in graph.groups[name].with_role("reads"):
                scales[_layer(piece.tensor)] = scales[_layer(piece.tensor)] * values[piece.unit_of]
        return scales

    def _slope(
        self, logits: FloatArray, y: IntArray, x: FloatArray | None = None, distil: Distillation | None = None
    ) -> FloatArray:
        """d(mean loss)/d(logits), (samples, classes)."""
        hard = softmax(logits)
        hard[np.arange(len(y)), y] -= 1.0
        if distil is None or x is None:
            return hard / len(y)
        answers = [forward(self._snapshots[t].weights, x)[-1] for t in distil.teachers]
        trust = softmax(np.stack([-cross_entropy(a, y) / 0.5 for a in answers], axis=1))
        soft = np.zeros_like(hard)
        for k, teacher in enumerate(answers):
            share = trust[:, k : k + 1] if distil.per_sample else 1.0 / len(answers)
            soft += share * (softmax(logits / distil.temperature) - softmax(teacher / distil.temperature))
        weight = distil.weight
        return np.asarray(((1 - weight) * hard + weight * distil.temperature * soft) / len(y), dtype=np.float64)

    @staticmethod
    def _decay(state: _State, gradients: dict[str, FloatArray], decay: Gates | None) -> None:
        for name, rates in (decay or {}).items():
            for piece in state.graph.groups[name].slices:
                if piece.role == "scales":
                    continue
                shape = [1] * gradients[piece.tensor].ndim
                shape[piece.axis] = -1
                rate = rates[piece.unit_of].reshape(shape)
                gradients[piece.tensor] = gradients[piece.tensor] + rate * state.weights[piece.tensor]

    def _train_within(self, directive: Train, within: Keep) -> Trained:
        whole = self._state
        keep = whole.graph.check_keep(within)
        self._state = self._removed(whole, Remove(within, gates=directive.gates))
        answer = self.train(Train(directive.epochs, lr=directive.lr, distil=directive.distil, clip=directive.clip))
        part, indices = self._state, whole.graph.kept_indices(keep)
        for name, weight in part.weights.items():
            where = [indices.get((name, axis), np.arange(n)) for axis, n in enumerate(whole.weights[name].shape)]
            merged = whole.weights[name].copy()
            merged[np.ix_(*where)] = weight
            whole.weights[name] = merged
        self._state = whole
        return answer

    def _removed(self, state: _State, directive: Remove) -> _State:
        graph, gates = state.graph, self._layer_gates(state.graph, directive.gates)
        keep = graph.check_keep(directive.keep)
        indices = graph.kept_indices(keep)
        folded = {
            name: weight * gates[_layer(name)] if weight.ndim == 2 else weight
            for name, weight in state.weights.items()
        }
        weights = {name: _gathered(weight, name, indices) for name, weight in folded.items()}
        if directive.refit != "none":
            weights = self._refitted(state, weights, directive, indices)
        return _State(weights, graph.restrict(keep), state.plan.after_removal(graph, keep))

    def _refitted(
        self, state: _State, weights: dict[str, FloatArray], directive: Remove, indices: Mapping[Axis, IntArray]
    ) -> dict[str, FloatArray]:
        layers = [f"fc{k}.weight" for k in range(depth(weights))]
        shapes = {name: state.weights[name].shape for name in layers}
        rows = [indices.get((name, 0), np.arange(shapes[name][0])) for name in layers]
        inputs = [indices.get((name, 1), np.arange(shapes[name][1])) for name in layers]
        survival = None
        if directive.survival is not None:
            survival = [np.zeros(shapes[name][1]) for name in layers]
            for name, values in directive.survival.items():
                for piece in state.graph.groups[name].with_role("reads"):
                    survival[_layer(piece.tensor)] += values[piece.unit_of]
            survival = [s[i] for s, i in zip(survival, inputs, strict=True)]
        x = self._data["calibration"].x[: directive.images]
        sequential = directive.refit == "sequential"
        if directive.refit == "bias":
            return bias_shifted(weights, state.weights, rows, x)
        return refitted(weights, state.weights, rows, inputs, x, sequential=sequential, survival=survival)

    def _verified(self, before: _State, after: _State, gates: Gates | None) -> Verification:
        x = self._data["holdout"].x[:16]
        wanted = forward(before.weights, x, self._layer_gates(before.graph, gates))[-1]
        error = float(np.abs(forward(after.weights, x)[-1] - wanted).max())
        scale = float(np.abs(wanted).max())
        if error > 1e-6 * max(scale, 1.0):
            raise VerificationError(
                f"masked and pruned differ by {error:.2e} (outputs up to {scale:.2e})",
                max_error=error,
                scale=scale,
            )
        return Verification("exact", error, scale)


def _layer(tensor: str) -> int:
    return int(tensor.partition(".")[0].removeprefix("fc"))


def _gathered(weight: FloatArray, name: str, indices: Mapping[Axis, IntArray]) -> FloatArray:
    for axis in range(weight.ndim):
        if (name, axis) in indices:
            weight = np.take(weight, indices[name, axis], axis=axis)
    return weight.copy()

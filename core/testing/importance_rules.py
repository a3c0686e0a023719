"""The rules for importance estimators, tried on a small residual network with norms and known signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from prunus.core.cost import FloatArray, IntArray
from prunus.core.errors import PlanError, PluginError
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.importance import ImportanceEstimator
from prunus.core.registry import check_estimator
from prunus.core.signals import Signal
from prunus.core.testing.graphs import residual_graph

WIDE = frozenset({"flat.reader"})
"""Readers whose covariance nobody has, as of those with very many inputs."""


class KnownSignals:
    """Every signal of a graph, from a seed; refuses what the estimator did not declare."""

    def __init__(self, graph: ChannelGraph, declared: frozenset[Signal], plugin: str, seed: int = 0) -> None:
        self._declared, self._plugin = declared, plugin
        self.arrays: dict[tuple[Signal, str], FloatArray] = {}
        rng = np.random.default_rng(seed)
        for name, shape in graph.tensors.items():
            self.arrays[Signal.WEIGHT, name] = rng.normal(size=shape) + 0.1
        for name, group in graph.groups.items():
            self.arrays[Signal.GATE_GRADIENT, name] = rng.normal(size=group.units)
            self.arrays[Signal.GATE_FISHER, name] = rng.random(group.units) + 1e-3
            for piece in group.with_role("reads"):
                seen = rng.normal(size=(4 * len(piece.unit_of), len(piece.unit_of)))
                self.arrays[Signal.ACTIVATION_MEAN, piece.tensor] = seen.mean(axis=0)
                self.arrays[Signal.ACTIVATION_VARIANCE, piece.tensor] = seen.var(axis=0)
                if piece.tensor not in WIDE:
                    self.arrays[Signal.ACTIVATION_COVARIANCE, piece.tensor] = np.cov(seen.T, bias=True)

    def read(self, signal: Signal, name: str) -> FloatArray:
        if signal not in self._declared:
            declared = sorted(s.value for s in self._declared)
            rule = "an estimator reads only the signals it declares in `needs`"
            raise PluginError(self._plugin, rule, f"It read {signal!r} and declares {declared}.")
        if (signal, name) not in self.arrays:
            raise PlanError(f"there is no {signal.value} of {name!r}", group=name)
        array = self.arrays[signal, name].view()
        array.setflags(write=False)
        return array

    def has(self, signal: Signal, name: str) -> bool:
        return (signal, name) in self.arrays


def known_graph() -> ChannelGraph:
    """A residual network: a stream with several writers and readers, a group with a norm, one without.

    Beside it what other networks have: a reader that sees three positions of every unit ("flat"), one that reads
    other things, too ("joined"), and units that nobody reads ("silent").
    """
    graph = residual_graph(12, [8, 6])
    index = np.arange(8, dtype=np.int64)
    norm = [Slice(f"block0.bn1.{part}", 0, "scales", index) for part in ("weight", "bias", "running_mean")]
    norm.append(Slice("block0.bn1.running_var", 0, "scales", index))
    groups = [replace(g, slices=(*g.slices, *norm)) if name == "inner0" else g for name, g in graph.groups.items()]
    shapes = {**graph.tensors, **{piece.tensor: (8,) for piece in norm}}
    flat, joined = np.repeat(np.arange(4), 3), np.concatenate([np.full(3, -1), np.arange(5)])
    for name, units, reads in (("flat", 4, flat), ("joined", 5, joined), ("silent", 3, None)):
        slices = [Slice(f"{name}.writer", 0, "writes", np.arange(units, dtype=np.int64))]
        shapes[f"{name}.writer"] = (units, 6, 3, 3)
        if reads is not None:
            slices.append(Slice(f"{name}.reader", 1, "reads", reads.astype(np.int64)))
            shapes[f"{name}.reader"] = (7, len(reads))
        groups.append(ChannelGroup(name, units, tuple(slices)))
    return ChannelGraph(groups, graph.terms, shapes)


def _scores(estimator: type[ImportanceEstimator], name: str, seed: int = 0) -> dict[str, FloatArray]:
    graph, made = known_graph(), estimator()
    signals = KnownSignals(graph, estimator.needs, name, seed)
    return {key: made.score(group, signals) for key, group in graph.groups.items()}


def usable_class(estimator: type[ImportanceEstimator], name: str) -> None:
    check_estimator(name, estimator)


def one_finite_score_per_unit(estimator: type[ImportanceEstimator], name: str) -> None:
    for seed in range(3):
        for group, scores in _scores(estimator, name, seed).items():
            _check_scores(name, group, known_graph().groups[group].units, scores)


def finite_for_dead_units(estimator: type[ImportanceEstimator], name: str) -> None:
    graph = known_graph()
    signals = KnownSignals(graph, estimator.needs, name)
    for key in signals.arrays:
        signals.arrays[key] = np.zeros_like(signals.arrays[key])
    for name_of_group, group in graph.groups.items():
        _check_scores(name, name_of_group, group.units, estimator().score(group, signals))


def pure(estimator: type[ImportanceEstimator], name: str) -> None:
    graph, made = known_graph(), estimator()
    signals = KnownSignals(graph, estimator.needs, name)
    before = {key: array.copy() for key, array in signals.arrays.items()}
    first = {key: np.array(made.score(group, signals)) for key, group in graph.groups.items()}
    for key, group in reversed(list(graph.groups.items())):
        if not np.array_equal(first[key], made.score(group, signals)):
            raise PluginError(name, "score is pure: equal signals, equal scores", f"Group {key!r} changed.")
    for written, array in before.items():
        if not np.array_equal(array, signals.arrays[written]):
            raise PluginError(name, "an estimator leaves its signals as they are", f"It wrote {written}.")


def order_of_units_does_not_matter(estimator: type[ImportanceEstimator], name: str) -> None:
    if not estimator.needs:
        return  # one that reads nothing cannot tell units apart: their order is all it has
    graph = known_graph()
    signals = KnownSignals(graph, estimator.needs, name)
    for key, group in graph.groups.items():
        order = np.random.default_rng(1).permutation(group.units)
        plain = estimator().score(group, signals)
        other, moved = _permuted(graph, group, order, signals, name, estimator.needs)
        permuted = estimator().score(moved, other)
        if not np.allclose(permuted, np.asarray(plain)[order], rtol=1e-9, atol=1e-12):
            rule = "scores follow the units when these change places"
            raise PluginError(name, rule, f"Group {key!r}: {plain[order][:3]} became {permuted[:3]}.")


def _permuted(
    graph: ChannelGraph,
    group: ChannelGroup,
    order: IntArray,
    signals: KnownSignals,
    name: str,
    declared: frozenset[Signal],
) -> tuple[KnownSignals, ChannelGroup]:
    """The same group with unit order[i] renamed to i; weights stay where they are."""
    place = np.argsort(order)
    slices = tuple(replace(s, unit_of=np.where(s.unit_of < 0, -1, place[s.unit_of])) for s in group.slices)
    other = KnownSignals(graph, declared, name)
    other.arrays = dict(signals.arrays)
    for signal in (Signal.GATE_GRADIENT, Signal.GATE_FISHER):
        other.arrays[signal, group.name] = signals.arrays[signal, group.name][order]
    return other, replace(group, slices=slices)


def _check_scores(name: str, group: str, units: int, scores: object) -> None:
    rule = "score returns one finite float64 per unit"
    if not isinstance(scores, np.ndarray):
        raise PluginError(name, rule, f"Group {group!r}: it returned {type(scores).__name__}.")
    if scores.shape != (units,) or scores.dtype != np.float64:
        detail = f"Group {group!r} has {units} units: it returned shape {scores.shape}, {scores.dtype}."
        raise PluginError(name, rule, detail)
    if not np.isfinite(scores).all():
        raise PluginError(name, rule, f"Group {group!r}: it returned NaN or infinity.")


IMPORTANCE_RULES: dict[str, Callable[[type[ImportanceEstimator], str], None]] = {
    "it is a usable class whose Config has valid defaults": usable_class,
    "score returns one finite float64 per unit": one_finite_score_per_unit,
    "scores of dead units are finite": finite_for_dead_units,
    "score is pure and leaves its signals as they are": pure,
    "scores follow the units when these change places": order_of_units_does_not_matter,
}

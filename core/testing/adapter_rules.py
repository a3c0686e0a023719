"""The rules for framework adapters, tried on whatever model and data a fresh adapter brings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunus.core.adapter import ModelAdapter
from prunus.core.directives import Distillation, Evaluate, Grow, Measure, Remove, Snapshot, Train
from prunus.core.errors import ConfigError, JournalError, PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.signals import Signal

Fresh = Callable[[], ModelAdapter]
"""Opens the adapter anew: the same model, the same weights, the same data, every time."""
TOLERANCE = 1e-4
"""Relative difference that two ways to compute one loss may have."""


def traces_alike(fresh: Fresh, name: str) -> None:
    first, second = fresh(), fresh()
    if first.graph.fingerprint != second.graph.fingerprint or first.trace().units != first.graph.units:
        raise PluginError(name, "equal models have equal graphs", "Two fresh adapters differ.")
    if not first.graph.prunable:
        raise PluginError(name, "the model to test with has a group that may shrink")


def removes_as_the_graph_says(fresh: Fresh, name: str) -> None:
    adapter = fresh()
    before, keep = adapter.graph, _keep(adapter.graph)
    changed = adapter.remove(Remove(keep))
    expected = before.restrict(keep)
    if changed.graph.units != expected.units or adapter.graph.units != expected.units:
        raise PluginError(name, "after a removal the graph is the restricted one")
    if changed.graph.cost() != expected.cost():
        raise PluginError(name, "predicted cost is exact", f"{changed.graph.cost()} is not {expected.cost()}.")
    if changed.plan.kept_counts != expected.units:
        raise PluginError(name, "the plan says what was kept")
    check = changed.verification
    if check.max_error > TOLERANCE * max(check.scale, 1e-12):
        raise PluginError(name, "masked equals pruned", f"The outputs differ by {check.max_error:g}.")


def masked_equals_pruned(fresh: Fresh, name: str) -> None:
    """The same claim by another road: the loss with closed gates, and the loss after removal."""
    adapter = fresh()
    keep = _keep(adapter.graph)
    gates = {g: np.isin(np.arange(adapter.graph.units[g]), units).astype(np.float64) for g, units in keep.items()}
    masked = adapter.evaluate(Evaluate(gates=gates)).loss
    inside = adapter.evaluate(Evaluate(within=keep)).loss
    adapter.remove(Remove(keep))
    pruned = adapter.evaluate(Evaluate()).loss
    if not (_close(masked, pruned) and _close(inside, pruned)):
        detail = f"Loss: gates closed {masked:g}, inside {inside:g}, removed {pruned:g}."
        raise PluginError(name, "masked equals pruned", detail)


def blocks_go_as_the_graph_says(fresh: Fresh, name: str) -> None:
    """Of a model that has blocks: the loss with one gated to zero, and the loss and cost without it."""
    adapter = fresh()
    before = adapter.graph
    if not before.blocks:
        return
    block = next(iter(before.blocks))
    gated = adapter.evaluate(Evaluate(gates={block: np.zeros(1)})).loss
    changed = adapter.remove(Remove({}, blocks=(block,)))
    removed = adapter.evaluate(Evaluate()).loss
    if not _close(gated, removed):
        raise PluginError(name, "gated to zero equals removed", f"Loss: gated {gated:g}, removed {removed:g}.")
    expected = before.without_blocks([block])
    if changed.graph.fingerprint != expected.fingerprint or changed.plan.removed_blocks != [block]:
        raise PluginError(name, "after a block is removed, graph and plan are without it", f"Block {block!r}.")


def evaluation_changes_nothing(fresh: Fresh, name: str) -> None:
    adapter = fresh()
    before = adapter.evaluate(Evaluate())
    keep = _keep(adapter.graph)
    gates = {g: np.full(adapter.graph.units[g], 0.5) for g in keep}
    adapter.evaluate(Evaluate(gates=gates))
    adapter.evaluate(Evaluate(within=keep))
    adapter.measure(Measure(frozenset(Signal), gates=gates, images=64))
    after = adapter.evaluate(Evaluate())
    if before != after:
        raise PluginError(name, "measuring and evaluating leave the model as it was", f"{before} became {after}.")


def draws_nothing_of_trainings(fresh: Fresh, name: str) -> None:
    """Law 6: a training is the same whatever was looked at before it."""
    outcomes = []
    for looks in (False, True):
        adapter = fresh()
        if looks:
            keep = _keep(adapter.graph)
            adapter.measure(Measure(frozenset(Signal), images=64))
            adapter.evaluate(Evaluate(within=keep, refit="sequential", images=64))
        adapter.train(Train(epochs=1.0))
        outcomes.append(adapter.evaluate(Evaluate()))
    if outcomes[0] != outcomes[1]:
        rule = "measuring and evaluating draw no random numbers of a training"
        raise PluginError(name, rule, f"{outcomes[0]} became {outcomes[1]}.")


def gate_gradients_are_slopes(fresh: Fresh, name: str) -> None:
    """Law 4: along a direction, the gradient is what the loss does between two gates near 1."""
    adapter, step = fresh(), 0.05
    graph, rng = adapter.graph, np.random.default_rng(0)
    signals = adapter.measure(Measure(frozenset({Signal.GATE_GRADIENT}), split="holdout", images=10**6))
    groups = [g for g, group in graph.prunable.items() if group.gateable]
    slopes = {g: signals.read(Signal.GATE_GRADIENT, g) for g in groups}
    # downhill, and what chance adds to it: a wrong gradient is not excused by a direction in which nothing happens
    ways = {
        g: -slopes[g] / max(float(np.abs(slopes[g]).max()), 1e-12) + 0.3 * rng.normal(size=len(slopes[g]))
        for g in groups
    }
    losses = [
        adapter.evaluate(Evaluate(gates={g: np.clip(1 + s * ways[g], 0, 2) for g in groups})).loss
        for s in (step, -step)
    ]
    seen = (losses[0] - losses[1]) / (2 * step)
    told = sum(float(slopes[g] @ ways[g]) for g in groups)
    if abs(seen - told) > 0.2 * max(abs(seen), abs(told)):
        raise PluginError(
            name, "gate gradients are slopes of the loss", f"It falls by {-seen:.3g}, not {-told:.3g}."
        )


def hears_what_it_is_told(fresh: Fresh, name: str) -> None:
    """What a directive says besides its kind makes a difference."""
    graph = fresh().graph
    keep = _keep(graph)
    group = next(g for g in graph.prunable if graph.groups[g].gateable)
    half = {group: np.where(np.arange(graph.units[group]) % 2, 0.0, 1.0)}
    plain = Train(epochs=1.0)
    answers = {}
    for what, directive in {
        "": plain,
        "gates": replace(plain, gates=half),
        "decay": replace(plain, decay={group: np.full(graph.units[group], 50.0)}),
        "within": replace(plain, within=keep),
        "distil": replace(plain, distil=Distillation(("kit",), weight=0.9)),
        "clip": replace(plain, clip=1e-3),
    }.items():
        adapter = fresh()
        adapter.snapshot(Snapshot("kit"))
        adapter.train(directive)
        answers[what] = adapter.evaluate(Evaluate()).loss
        if what and answers[what] == answers[""]:
            raise PluginError(name, f"a training hears its `{what}`", "It ended as without.")
    adapter = fresh()
    gated = adapter.evaluate(Evaluate(gates=half)).loss
    adapter.remove(Remove({}, gates=half))
    folded = adapter.evaluate(Evaluate()).loss
    if not _close(gated, folded):
        raise PluginError(name, "a removal folds its gates", f"Loss: gated {gated:g}, folded {folded:g}.")
    reader = graph.groups[group].with_role("reads")[0].tensor
    asked = Measure(frozenset({Signal.ACTIVATION_MEAN}), images=64)
    means = [
        fresh().measure(replace(asked, fold=fold)).read(Signal.ACTIVATION_MEAN, reader)
        for fold in ((0, 2), (1, 2))
    ]
    if np.array_equal(means[0], means[1]):
        raise PluginError(name, "two folds are different images", f"Means of {reader!r} are the same.")


def grows_without_changing_the_function(fresh: Fresh, name: str) -> None:
    adapter = fresh()
    group = next((g for g in adapter.graph.prunable if adapter.graph.growable(g) is None), None)
    if group is None:
        return
    before, units = adapter.evaluate(Evaluate()).loss, adapter.graph.units[group]
    changed = adapter.grow(Grow({group: units + 2}))
    after = adapter.evaluate(Evaluate()).loss
    if changed.graph.units[group] != units + 2 or not _close(before, after):
        raise PluginError(name, "growth preserves the function", f"Loss {before:g} became {after:g}.")


def signals_have_their_shapes(fresh: Fresh, name: str) -> None:
    adapter = fresh()
    reader = adapter.measure(Measure(frozenset({Signal.WEIGHT, Signal.GATE_FISHER}), images=64))
    for group in adapter.graph.prunable.values():
        if not group.gateable:
            continue
        fisher = reader.read(Signal.GATE_FISHER, group.name)
        if fisher.shape != (group.units,) or fisher.dtype != np.float64 or not np.isfinite(fisher).all():
            raise PluginError(name, "a gate signal has one finite float64 per unit", f"Group {group.name!r}.")
    for tensor, shape in adapter.graph.tensors.items():
        if reader.read(Signal.WEIGHT, tensor).shape != shape:
            raise PluginError(name, "weights have the shapes that the graph names", f"Tensor {tensor!r}.")
    try:
        reader.read(Signal.ACTIVATION_MEAN, next(iter(adapter.graph.tensors)))
    except ConfigError:
        return
    raise PluginError(name, "a signal that was not asked for is a ConfigError")


def checkpoints_restore_everything(fresh: Fresh, name: str) -> None:
    """What comes after a checkpoint is the same in the process that wrote it and in the one that reads it."""
    adapter, other = fresh(), fresh()
    with tempfile.TemporaryDirectory() as written:
        adapter.train(Train(epochs=1.0))
        adapter.snapshot(Snapshot("kit"))
        adapter.remove(Remove(_keep(adapter.graph)))
        adapter.checkpoint(Path(written))
        other.restore(Path(written))
    for one in (adapter, other):
        one.train(Train(epochs=1.0))
    for question in (Evaluate(), Evaluate(model="kit")):
        first, second = adapter.evaluate(question), other.evaluate(question)
        if first != second or adapter.graph.fingerprint != other.graph.fingerprint:
            raise PluginError(name, "a checkpoint restores everything", f"{first} became {second}.")


def damaged_checkpoints_are_named(fresh: Fresh, name: str) -> None:
    adapter = fresh()
    with tempfile.TemporaryDirectory() as written:
        folder = Path(written)
        adapter.checkpoint(folder)
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            path.unlink()
        try:
            adapter.restore(folder)
        except JournalError:
            return
    raise PluginError(name, "an unreadable checkpoint is a JournalError")


def _keep(graph: ChannelGraph) -> Mapping[str, list[int]]:
    """Another part of every group: its last three quarters, as its floor and multiple allow."""
    keep = {}
    tied: dict[str, int] = {}
    for name, group in graph.prunable.items():
        count = max(group.min_kept, 3 * group.units // 4 // group.multiple_of * group.multiple_of)
        if group.equal_count is not None:
            count = tied.setdefault(group.equal_count, count)
        keep[name] = list(range(group.units - count, group.units))
    return keep


def _close(first: float, second: float) -> bool:
    return abs(first - second) <= TOLERANCE * max(abs(first), abs(second), 1e-6)


ADAPTER_RULES: dict[str, Callable[[Fresh, str], None]] = {
    "equal models have equal graphs": traces_alike,
    "a removal does what the graph says, at the cost that it predicts": removes_as_the_graph_says,
    "masked equals pruned": masked_equals_pruned,
    "a block that is gated to zero equals one that is removed": blocks_go_as_the_graph_says,
    "measuring and evaluating leave the model as it was": evaluation_changes_nothing,
    "measuring and evaluating draw no random numbers of a training": draws_nothing_of_trainings,
    "gate gradients are slopes of the loss": gate_gradients_are_slopes,
    "what a directive says is heard": hears_what_it_is_told,
    "growth preserves the function": grows_without_changing_the_function,
    "signals have their shapes": signals_have_their_shapes,
    "a checkpoint restores everything": checkpoints_restore_everything,
    "an unreadable checkpoint is a JournalError": damaged_checkpoints_are_named,
}

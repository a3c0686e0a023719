"""Whole blocks go one at a time, the one that harms least for what it saves first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from prunus.adapters.pytorch.adapter import PyTorchAdapter
from prunus.adapters.pytorch.session import open_session
from prunus.core.budget import Budget, Target
from prunus.core.directives import Directive, Evaluate, Measure, Note, Observation, Remove, Snapshot, Train
from prunus.core.errors import ConfigError, UnreachableTargetError
from prunus.core.policy import PruningTask
from prunus.core.settings import make_settings
from prunus.core.signals import Signal
from prunus.core.testing.graphs import residual_graph
from prunus.core.testing.simulation import SimulatedAdapter
from prunus.core.testing.transcript import Transcript, drive
from prunus.plugins.depth import cheapest, spread_blocks
from prunus.plugins.iterative import Iterative, IterativeConfig
from prunus.plugins.joint_search import JointSearch, JointSearchConfig
from prunus.plugins.magnitude import Magnitude


@pytest.fixture
def adapter() -> PyTorchAdapter:
    common = {"model": "prunus/resnet20", "data": "digits", "train_limit": 150, "threads": 1, "batch_size": 50}
    return open_session(make_settings(common)).adapter


def _task(adapter: PyTorchAdapter, target: str, **changes: object) -> PruningTask:
    graph = adapter.graph
    budget = Budget.resolve([Target.parse(target)], graph.cost())
    task = PruningTask(graph, budget, np.random.default_rng(0), Magnitude(), dense_accuracy=0.5)
    return dataclasses.replace(task, **changes)


class Answers:
    """The adapter as `drive` wants it."""

    def __init__(self, adapter: PyTorchAdapter) -> None:
        self._adapter = adapter

    def answer(self, directive: Directive) -> Observation:
        kind = type(directive).__name__.lower()
        return None if kind == "note" else getattr(self._adapter, kind)(directive)


def _drive(adapter: PyTorchAdapter, task: PruningTask, **config: object) -> Transcript:
    adapter.snapshot(Snapshot("dense"))
    return drive(Iterative(IterativeConfig(depth=True, **config)), task, Answers(adapter))


def test_blocks_go_one_at_a_time_until_the_target_is_met_and_channels_stay_whole(adapter: PyTorchAdapter) -> None:
    task = _task(adapter, "macs=60%", epochs=2.0)
    transcript = _drive(adapter, task)
    removals = transcript.of(Remove)
    assert all(len(r.blocks) == 1 and not r.keep for r in removals)
    assert transcript.plan.removed_blocks == [r.blocks[0] for r in removals]
    assert task.budget.met(adapter.graph.cost())
    all_but_one = task.graph.without_blocks(transcript.plan.removed_blocks[:-1])
    assert not task.budget.met(all_but_one.cost())
    trained = transcript.of(Train)
    assert len(trained) == len(removals)  # between two removals, and the recovery
    assert sum(t.epochs for t in trained) == pytest.approx(task.epochs)


def test_no_block_goes_where_the_target_is_met_already(adapter: PyTorchAdapter) -> None:
    transcript = _drive(adapter, _task(adapter, "macs=100G"), rounds=1)
    assert transcript.plan.removed_blocks == []
    assert adapter.graph.units == _task(adapter, "macs=100G").graph.units


def test_channels_follow_where_blocks_alone_do_not_reach_the_target(adapter: PyTorchAdapter) -> None:
    task = _task(adapter, "macs=12%")
    transcript = _drive(adapter, task, rounds=2)
    assert set(transcript.plan.removed_blocks) == set(task.graph.blocks)
    assert 0.95 <= task.budget.load(adapter.graph.cost()) <= 1


def test_a_blocks_harm_is_the_loss_with_its_gate_at_zero(adapter: PyTorchAdapter) -> None:
    base = adapter.evaluate(Evaluate()).loss
    closed = {b: adapter.evaluate(Evaluate(gates={b: np.zeros(1)})).loss for b in adapter.graph.blocks}
    first = _drive(adapter, _task(adapter, "macs=80%")).of(Note)[0].values
    assert first["harm"] == pytest.approx(max(closed[str(first["name"])] - base, 0.0), rel=1e-6)
    assert first["left"] == len(closed) - 1


def test_without_labels_blocks_are_judged_by_the_energy_that_they_add(adapter: PyTorchAdapter) -> None:
    transcript = _drive(adapter, _task(adapter, "macs=80%", has_labels=False))
    assert not transcript.of(Evaluate)
    assert all(m.signals == {Signal.BLOCK_CHANGE} for m in transcript.of(Measure))
    assert transcript.plan.removed_blocks


def test_the_cheapest_block_is_the_one_with_least_harm_for_what_it_saves() -> None:
    graph = residual_graph(8, [20, 10, 2])
    budget = Budget.resolve([Target.parse("macs=50%")], graph.cost())
    assert cheapest(graph, budget, {"block0": 1.0, "block1": 0.9, "block2": 0.8}) == "block0"
    assert cheapest(graph, budget, {"block0": 9.0, "block1": 0.9, "block2": 0.8}) == "block1"
    assert cheapest(graph, budget, {"block0": 0.0, "block1": 0.0, "block2": 0.0}) == "block0"


def test_saving_beyond_the_target_is_worth_nothing() -> None:
    graph = residual_graph(8, [40, 4])
    budget = Budget.resolve([Target.parse("macs=95%")], graph.cost())
    assert cheapest(graph, budget, {"block0": 1.0, "block1": 0.5}) == "block1"


def test_untrained_blocks_go_evenly_from_all_stages_the_last_ones_first(adapter: PyTorchAdapter) -> None:
    def gone(share: float) -> tuple[str, ...]:
        return spread_blocks(adapter.graph, share)

    assert gone(0.0) == ()
    assert gone(0.3) == ("stages.0.2", "stages.2.2")
    assert gone(0.6) == ("stages.0.2", "stages.2.2", "stages.1.2", "stages.0.1")
    assert sorted(gone(1.0)) == sorted(adapter.graph.blocks)


def test_joint_search_does_without_blocks_from_the_start_and_meets_the_target(adapter: PyTorchAdapter) -> None:
    task, whole = _task(adapter, "macs=25%", epochs=2.0), adapter.graph
    config = JointSearchConfig(fewer_blocks=0.6, images=64)
    transcript = drive(JointSearch(config), task, Answers(adapter))
    first, *rest = transcript.of(Remove)
    assert (first.blocks, first.keep, first.refit) == (spread_blocks(whole, 0.6), {}, "none")
    assert not any(removal.blocks for removal in rest)
    assert transcript.directives.index(first) < transcript.directives.index(transcript.of(Train)[0])
    assert 0.9 < task.budget.load(adapter.graph.cost()) <= 1.0
    assert adapter.graph.blocks.keys() == whole.blocks.keys() - set(first.blocks)


@pytest.mark.parametrize(("target", "most"), [("macs=90%", 1), ("macs=50%", 4), ("macs=30%", 6)])
def test_no_more_blocks_go_than_the_target_asks_for(adapter: PyTorchAdapter, target: str, most: int) -> None:
    task, whole = _task(adapter, target, epochs=1.0), adapter.graph
    drive(JointSearch(JointSearchConfig(fewer_blocks=1.0, images=32)), task, Answers(adapter))
    assert len(whole.blocks) - len(adapter.graph.blocks) == most
    assert 0.9 * 0.99 < task.budget.load(adapter.graph.cost()) <= 1.0


def _refusals() -> Iterator[tuple[PruningTask, dict[str, object], str]]:
    simulated = SimulatedAdapter(samples=128, dense_epochs=1).task("macs=50%")
    residual = dataclasses.replace(simulated, graph=residual_graph(8, [6, 4]))
    yield simulated, {}, "no block of this model"
    yield dataclasses.replace(residual, has_data=False), {}, "--data is none"
    yield dataclasses.replace(residual, has_labels=False), {"block_score": "loss"}, "needs labels"


def test_a_target_is_within_reach_if_it_is_without_the_blocks_that_go(adapter: PyTorchAdapter) -> None:
    graph = adapter.graph
    floors = [dataclasses.replace(group, min_units=group.units) for group in graph.groups.values()]
    task = _task(adapter, "macs=55%", graph=graph.with_groups(floors), epochs=1.0)
    with pytest.raises(UnreachableTargetError):
        JointSearch(JointSearchConfig()).check(task)
    JointSearch(JointSearchConfig(fewer_blocks=0.6)).check(task)


def test_blocks_do_not_come_back_where_floors_would_then_miss_the_target(adapter: PyTorchAdapter) -> None:
    graph = adapter.graph
    floors = [dataclasses.replace(group, min_units=group.units) for group in graph.groups.values()]
    stiff, blocks = graph.with_groups(floors), spread_blocks(graph, 1.0)
    costs = [stiff.without_blocks(blocks[:n]).cost().macs for n in range(len(blocks) + 1)]
    n = max(range(1, len(costs)), key=lambda i: costs[i - 1] / costs[i])
    assert costs[n] < 0.9 * 0.99 * costs[n - 1]
    task = _task(adapter, f"macs={0.99 * costs[n - 1] / costs[0]:.2%}", graph=stiff, epochs=1.0)
    drive(JointSearch(JointSearchConfig(fewer_blocks=1.0, images=32)), task, Answers(adapter))
    assert sorted(blocks[:n]) == sorted(graph.blocks.keys() - adapter.graph.blocks.keys())


def test_fewer_blocks_of_a_model_without_any_are_refused() -> None:
    task = SimulatedAdapter(samples=128, dense_epochs=0).task("macs=50%", epochs=2.0)
    with pytest.raises(ConfigError, match="no block of this model"):
        JointSearch(JointSearchConfig(fewer_blocks=0.5)).check(task)


@pytest.mark.parametrize("case", range(3))
def test_what_cannot_be_done_is_refused_before_anything_starts(case: int) -> None:
    task, config, message = list(_refusals())[case]
    with pytest.raises(ConfigError, match=message):
        Iterative(IterativeConfig(depth=True, **config)).check(task)
    Iterative(IterativeConfig()).check(task)

"""Whole layers beside channels in one search: exact costs, one threshold, no kernel of a block that is gone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prunus.core.budget import Budget, Target
from prunus.core.directives import Directive, Evaluate, Evaluated, Measure, Observation, Remove
from prunus.core.graph import ChannelGraph
from prunus.core.kernels import Kernel
from prunus.core.policy import PruningTask
from prunus.core.signals import Signal
from prunus.core.testing.graphs import residual_graph
from prunus.plugins.annealing import Lattice
from prunus.plugins.energies import Energies
from prunus.plugins.gsm_anneal import GsmAnneal, GsmAnnealConfig
from prunus.plugins.layers import Choice, LayerEvidence, harden, with_layers


def _graph() -> ChannelGraph:
    graph = residual_graph(8, [6, 4])
    names = [f"block{k}.conv{i}" for k in range(2) for i in (1, 2)]
    return graph.with_kernels(Kernel(name, f"{name}.weight", 3) for name in ("stem", *names))


class Measured:
    """Weights drawn at random, activations of variance 1, blocks that add as much as told."""

    signals = frozenset({Signal.WEIGHT, Signal.BLOCK_CHANGE})

    def __init__(self, graph: ChannelGraph, weights: dict[str, np.ndarray], added: dict[str, float]) -> None:
        rng = np.random.default_rng(0)
        self._weights = {name: rng.normal(size=shape) for name, shape in graph.tensors.items()} | weights
        self._added = added

    def read(self, signal: Signal, name: str) -> np.ndarray:
        return np.array([self._added[name], 0.0]) if signal is Signal.BLOCK_CHANGE else self._weights[name]

    def has(self, signal: Signal, name: str) -> bool:
        return signal is Signal.WEIGHT and name in self._weights


def test_the_cost_of_every_choice_of_layers_is_that_of_the_graph_without_them() -> None:
    graph = _graph()
    choice = Choice.of(graph, "all")
    assert "stem.kernel" not in choice.kernels  # what it reads is the image
    space = with_layers(graph, choice)
    assert space.cost() == graph.cost()
    assert space.cost_model.groups[-len(choice.names) :] == choice.names
    for kept in itertools.product((0, 1), repeat=len(choice.names)):
        keep = {name: np.arange(count) for name, count in zip(choice.names, kept, strict=True)}
        blocks, kernels = choice.gone(keep, graph)
        widths = {"stream": 5, "inner0": 3, "inner1": 2}
        foretold = space.cost({**widths, **dict(zip(choice.names, kept, strict=True))})
        rest = graph.without_kernels(kernels).without_blocks(blocks)
        assert foretold == rest.cost({name: n for name, n in widths.items() if name in rest.groups})
        assert not any(kernel.startswith(block) for kernel in kernels for block in blocks)


def test_branches_are_no_layers() -> None:
    assert Choice.of(_graph(), "none").names == ()
    assert set(Choice.of(_graph(), "blocks").names) == {"block0", "block1"}
    assert set(Choice.of(_graph(), "kernels").kernels.values()) == set(_graph().kernels) - {"stem"}


def test_a_layer_that_carries_more_is_worth_more() -> None:
    graph = _graph()
    point = np.random.default_rng(1).normal(size=(6, 8, 3, 3))
    hollow = np.zeros_like(point)
    hollow[:, :, 1, 1] = point[:, :, 1, 1]
    choice = Choice.of(graph, "all")
    survival = {name: np.ones(group.units) for name, group in graph.prunable.items()}
    found = {}
    for name, weight in (("full", point), ("hollow", hollow)):
        measured = Measured(graph, {"block0.conv1.weight": weight}, {"block0": 0.02, "block1": 0.5})
        energies = Energies(graph, measured, "weight")
        energies.at(survival)
        found[name] = LayerEvidence(graph, choice, measured).at(energies, survival, 0.05, 4.0)
    assert found["hollow"]["block0.conv1.kernel"] == 0.0 < found["full"]["block0.conv1.kernel"]
    # eight channels, each by log(1 + energy / noise); with "weight" energies nothing is explained by others
    assert found["full"]["block1"] == pytest.approx(8 * np.log1p(0.5 / 0.05))
    assert found["full"]["block0"] == pytest.approx(8 * np.log1p(0.02 / 0.05))


def test_a_layer_is_worth_as_many_units_of_its_own_groups_as_it_saves() -> None:
    graph = _graph()
    choice = Choice.of(graph, "blocks")
    lattice = Lattice(with_layers(graph, choice), Budget.resolve([Target.parse("macs=50%")], graph.cost()))
    evidence = LayerEvidence(graph, choice, Measured(graph, {}, {"block0": 0.1, "block1": 0.1}))
    assert evidence.groups["block1"] == ("stream", "inner1")
    worth = lattice.worth(np.ones_like(lattice.even()), evidence.groups)
    for k in range(2):
        saved = graph.cost().macs - graph.without_blocks([f"block{k}"]).cost().macs
        per_unit = [
            graph.cost().macs - graph.cost({name: graph.units[name] - 1}).macs
            for name in ("stream", f"inner{k}")
            for _ in range(graph.units[name])
        ]
        assert worth[f"block{k}"] == pytest.approx(saved / np.mean(per_unit), rel=1e-6)


def test_hardening_takes_a_layer_back_rather_than_waste_the_budget() -> None:
    graph = _graph()
    choice = Choice.of(graph, "blocks")
    space = with_layers(graph, choice)
    budget = Budget.resolve([Target.parse("macs=60%")], graph.cost())
    ranks = {name: np.linspace(1.0, 0.9, group.units) for name, group in graph.prunable.items()}
    ranks |= {"block0": np.full(1, 0.2), "block1": np.full(1, 0.1)}  # every channel ranks above every block
    keep = harden(space, choice, budget, ranks)
    blocks, _ = choice.gone(keep, graph)
    assert blocks == ("block1",)
    load = budget.load(space.cost({name: len(units) for name, units in keep.items()}))
    alone = budget.load(graph.without_blocks(["block0", "block1"]).cost())
    assert alone < 0.3 < 0.85 < load <= 1


def decided(
    losses: dict[tuple[str, ...], float], target: str = "macs=50%", **config: object
) -> tuple[Remove, list[Evaluate]]:
    """What gsm-anneal removes, and what it tried, where the held-out loss depends on the blocks that are gone."""
    graph = _graph()
    task = PruningTask(
        graph,
        Budget.resolve([Target.parse(target)], graph.cost()),
        np.random.default_rng(0),
        held_out=1000,
    )
    method = GsmAnneal(GsmAnnealConfig.model_validate({"layers": "blocks", "sensitivity": "no", **config}))
    directives = method.run(task)
    tried: list[Evaluate] = []
    answer: Observation = None
    while True:
        directive: Directive = directives.send(answer)
        answer = None
        if isinstance(directive, Measure):
            answer = Measured(graph, {}, {"block0": 0.02, "block1": 0.05})
        elif isinstance(directive, Evaluate):
            tried.append(directive)
            answer = Evaluated(losses.get(directive.blocks, 1.0), 0.5, 1000)
        elif isinstance(directive, Remove):
            return directive, tried


@pytest.mark.parametrize("best", [(), ("block1",)])
def test_held_out_images_decide_which_layers_go_and_whether_any_does(best: tuple[str, ...]) -> None:
    removal, tried = decided({best: 0.5})
    assert {trial.blocks for trial in tried} == {(), ("block1",)}
    assert removal.blocks == best


def test_widths_are_searched_anew_beside_the_layers_that_are_gone() -> None:
    graph = _graph()
    budget = Budget.resolve([Target.parse("macs=50%")], graph.cost())
    for best in ((), ("block1",)):
        removal, _ = decided({best: 0.5})
        rest = graph.without_blocks(removal.blocks)
        widths = {name: len(units) for name, units in removal.keep.items()}
        assert widths.keys() == rest.groups.keys()  # of what is inside a block that goes nothing is asked
        assert 0.9 < budget.load(rest.cost(widths)) <= 1


def test_without_trials_one_threshold_decides() -> None:
    removal, tried = decided({}, layer_weight=1e3)
    assert not tried
    assert removal.blocks == ()
    removal, tried = decided({}, layer_weight=0.1)
    assert not tried
    assert removal.blocks == ("block1",)

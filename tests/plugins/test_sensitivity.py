from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest

from prunus.core.allocation import global_keep
from prunus.core.budget import Budget, Target
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Evaluate, Evaluated
from prunus.core.errors import PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.policy import PruningTask
from prunus.core.testing.graphs import mlp_graph
from prunus.plugins.sensitivity import Settled, TrialConfig, measure_sensitivity, settle


def sensitivities(loss_without: Callable[[str], float], **options: dict[str, object]) -> dict[str, float]:
    """Answers every trial with the loss of the network whose named group was narrowed."""
    rng = np.random.default_rng(0)
    graph = mlp_graph([4, 10, 10, 10, 3], **options)
    weights = {name: rng.normal(size=shape) for name, shape in graph.tensors.items()}
    moments = {name: np.eye(10) for name in ("fc1.weight", "fc2.weight", "fc3.weight")}
    trial = measure_sensitivity(graph, weights, moments, 1e-3, TrialConfig().trial(images=1024))
    directive = next(trial)
    try:
        while True:
            loss = 1.0
            if isinstance(directive, Evaluate) and directive.within:
                graph.check_keep(directive.within)
                loss = loss_without(next(iter(directive.within)))
            directive = trial.send(Evaluated(loss, 0.5, 64))
    except StopIteration as stop:
        return dict(stop.value)


def test_a_group_whose_narrowing_costs_more_loss_weighs_more_within_bounds() -> None:
    found = sensitivities({"h0": 1.1, "h1": 1.2, "h2": 9.0}.__getitem__)
    assert found["h0"] < found["h1"] < found["h2"]
    assert found["h2"] <= 4.0 and found["h0"] >= 0.25
    assert sorted(found.values())[1] == pytest.approx(1.0)


def test_groups_that_shrink_together_are_tried_together() -> None:
    found = sensitivities({"h0": 1.5, "h2": 1.1}.__getitem__, h0={"equal_count": "t"}, h1={"equal_count": "t"})
    assert found["h0"] == found["h1"] != found["h2"]


@pytest.mark.parametrize("held_out", [None, 499, 500])
def test_few_held_out_images_are_not_believed_unless_asked_for(held_out: int | None) -> None:
    graph = mlp_graph([4, 10, 10, 3])
    budget = Budget.resolve([Target.parse("macs=50%")], graph.cost())
    task = PruningTask(graph, budget, np.random.default_rng(0), held_out=held_out)
    assert TrialConfig(sensitivity="yes").tries(task)
    assert not TrialConfig(sensitivity="no").tries(task)
    assert TrialConfig().tries(task) == (held_out == 500)
    assert not TrialConfig(images=499).tries(task)
    assert not TrialConfig(sensitivity="yes").tries(replace(task, has_labels=False))


def test_where_no_trial_costs_anything_all_groups_weigh_the_same() -> None:
    assert sensitivities(lambda name: 1.0) == {}


WORTH = {"h0": 1.0, "h1": 4.0, "h2": 9.0}
"""The loss of a network is the sum of these over its widths: most is lost in the narrowest, worthiest group."""


@dataclass(frozen=True)
class Chosen:
    keep: Mapping[str, IntArray]
    ranks: Mapping[str, FloatArray]


class Network:
    """A search that takes all groups to be worth the same, and a loss that does not."""

    def __init__(self, graph: ChannelGraph, fails_after: int = 100) -> None:
        self.graph, self.budget = graph, Budget.resolve([Target.parse("params=40%")], graph.cost())
        self.proposed: list[Mapping[str, IntArray]] = []
        self.tried: list[Mapping[str, IntArray]] = []
        self._fails_after = fails_after

    def propose(self, factors: Mapping[str, float]) -> Chosen:
        if len(self.proposed) == self._fails_after:
            raise PluginError("search", "it decides", "it does not")
        ranks = {
            name: factors.get(name, 1.0) / np.arange(1.0, group.units + 1) ** 2
            for name, group in self.graph.prunable.items()
        }
        self.proposed.append(global_keep(self.graph, self.budget, ranks))
        return Chosen(self.proposed[-1], ranks)

    @staticmethod
    def loss(keep: Mapping[str, IntArray]) -> float:
        return sum(worth / len(keep[name]) for name, worth in WORTH.items())

    def settled(self, times: int) -> Settled[Chosen]:
        trials = settle(self.graph, self.budget, self.propose, {}, TrialConfig().trial(), times)
        try:
            directive = next(trials)
            while True:
                answer = None
                if isinstance(directive, Evaluate):
                    assert directive.within is not None
                    self.graph.check_keep(directive.within)
                    self.tried.append(directive.within)
                    answer = Evaluated(self.loss(directive.within), 0.5, 1000)
                directive = trials.send(answer)
        except StopIteration as stop:
            found: Settled[Chosen] = stop.value
            return found


def test_where_the_search_ends_units_move_to_the_groups_that_the_loss_minds_most() -> None:
    network = Network(mlp_graph([16, 40, 40, 40, 10]))
    settled = network.settled(3)
    factors, chosen = settled.factors, settled.proposal
    first = network.proposed[0]
    assert factors["h2"] > factors["h1"] > factors["h0"]
    assert len(chosen.keep["h2"]) > len(first["h2"])
    assert len(chosen.keep["h0"]) < len(first["h0"])
    best = min(  # of all widths that the budget allows
        network.loss({"h0": range(a), "h1": range(b), "h2": range(c)})
        for a in range(1, 41)
        for b in range(1, 41)
        for c in range(1, 41)
        if network.budget.met(network.graph.cost({"h0": a, "h1": b, "h2": c}))
    )
    gap = network.loss(first) - best
    assert network.loss(chosen.keep) < best + 0.35 * gap


def test_of_all_widths_that_were_proposed_those_of_the_lowest_loss_are_chosen() -> None:
    network = Network(mlp_graph([16, 40, 40, 40, 10]))
    settled = network.settled(8)
    assert len(network.proposed) == 9
    assert (
        settled.loss == network.loss(settled.proposal.keep) == min(network.loss(keep) for keep in network.proposed)
    )


def test_without_a_sweep_the_first_proposal_stands() -> None:
    network = Network(mlp_graph([16, 40, 40, 40, 10]))
    settled = network.settled(0)
    assert settled.factors == {}
    assert settled.proposal.keep is network.proposed[0]
    assert settled.loss is None
    assert not network.tried


def test_groups_that_shrink_together_are_tried_and_weighed_together() -> None:
    tied = mlp_graph([16, 40, 40, 40, 10], h0={"equal_count": "t"}, h2={"equal_count": "t"})
    network = Network(tied)
    factors = network.settled(2).factors
    assert factors["h0"] == factors["h2"] != factors["h1"]


def test_a_group_at_its_floor_is_not_tried_narrower() -> None:
    network = Network(mlp_graph([16, 40, 40, 40, 10], h1={"min_units": 40}))
    factors = network.settled(2).factors
    assert "h1" not in factors
    assert all(len(keep["h1"]) == 40 for keep in network.tried)


def test_a_search_that_fails_with_other_factors_leaves_what_was_found_before() -> None:
    network = Network(mlp_graph([16, 40, 40, 40, 10]), fails_after=2)
    chosen = network.settled(3).proposal
    assert network.loss(chosen.keep) == min(network.loss(keep) for keep in network.proposed)
    with pytest.raises(PluginError, match="it does not"):
        Network(mlp_graph([16, 40, 40, 40, 10]), fails_after=0).settled(3)


@pytest.mark.parametrize(
    ("config", "width", "times"),
    [
        ({}, 40, 3),
        ({}, 60000, 0),
        ({"sensitivity": "yes"}, 60000, 3),
        ({"sweeps": 5}, 60000, 5),
        ({"sweeps": 0}, 40, 0),
    ],
)
def test_groups_are_tried_where_the_search_ends_if_that_is_cheap_or_asked_for(
    config: dict[str, object], width: int, times: int
) -> None:
    graph = mlp_graph([16, width, width, width, 10])
    task = PruningTask(graph, Budget.resolve([Target.parse("macs=50%")], graph.cost()), np.random.default_rng(0))
    assert TrialConfig.model_validate(config).sweeps_of(task) == times

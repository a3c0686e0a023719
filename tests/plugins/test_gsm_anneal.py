from __future__ import annotations

import dataclasses
import gc
import math
from typing import Any, Literal

import numpy as np
import pytest

from prunus.core.allocation import global_keep, reachable
from prunus.core.budget import Budget, Target
from prunus.core.directives import Directive, Evaluate, Grow, Measure, Observation, Remove, Train
from prunus.core.errors import ConfigError, PluginError, UnreachableTargetError
from prunus.core.kernels import Kernel
from prunus.core.signals import Signal
from prunus.core.testing.graphs import mlp_graph, residual_graph
from prunus.core.testing.simulation import SimulatedAdapter
from prunus.core.testing.transcript import Transcript, drive
from prunus.plugins.annealing import Lattice, mean_entropy
from prunus.plugins.energies import SIGNALS, Energies
from prunus.plugins.group_search import GroupSearch
from prunus.plugins.gsm_anneal import GsmAnneal, GsmAnnealConfig
from prunus.plugins.layers import Choice
from prunus.plugins.magnitude import Magnitude
from prunus.plugins.one_shot import OneShot

WIDTHS = (8, 32, 24, 32, 4)


def run(
    target: str = "macs=25%", seed: int = 0, epochs: float = 0.0, **config: object
) -> tuple[SimulatedAdapter, Transcript]:
    adapter = SimulatedAdapter(WIDTHS, seed=seed)
    return adapter, drive(GsmAnneal(GsmAnnealConfig(**config)), adapter.task(target, epochs=epochs), adapter)


def last_of(transcript: Transcript) -> dict[str, float]:
    return dict([n for n in transcript.notes if n.kind == "anneal"][-1].values)


@pytest.mark.parametrize("seed", range(10))
def test_ten_seeds_at_a_tenth_of_the_macs_meet_the_cost_decided_and_without_collapse(seed: int) -> None:
    adapter = SimulatedAdapter((8, 64, 64, 48, 4), seed=seed)
    task = adapter.task("macs=10%")
    transcript = drive(GsmAnneal(), task, adapter)
    counts = {name: len(units) for name, units in transcript.plan.keep.items()}
    assert 0.97 <= task.budget.load(task.graph.cost(counts)) <= 1
    assert all(counts[name] >= group.min_kept for name, group in task.graph.groups.items())
    assert min(counts[name] / task.graph.units[name] for name in counts) >= 0.05
    last = last_of(transcript)
    assert last["entropy"] < 0.02
    assert last["load"] == pytest.approx(1, abs=0.02)


class Frugal(SimulatedAdapter):
    """Counts what is left of any statistics whenever it trains or removes."""

    alive: tuple[int, ...] = ()

    def answer(self, directive: Directive) -> Observation:
        if isinstance(directive, Train | Remove):
            gc.collect()
            self.alive += (sum(type(thing) is Energies for thing in gc.get_objects()),)
        return super().answer(directive)


def test_no_statistics_are_kept_while_a_model_is_trained_or_refitted() -> None:
    """Covariances of a ViT-B are more than a gigabyte, and these directives need the memory."""
    adapter = Frugal(WIDTHS, seed=0)
    drive(GsmAnneal(GsmAnnealConfig(rounds=3)), adapter.task("macs=25%", epochs=8.0), adapter)
    assert len(adapter.alive) >= 5
    assert set(adapter.alive) == {0}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"source": "weight"},
        {"source": "gate_fisher"},
        {"expansion": "wide"},
        {"expansion": "wide", "grow": "all", "ratio": 2.0},
        {"rounds": 3},
        {"rounds": 3, "expansion": "wide"},
    ],
)
@pytest.mark.parametrize("epochs", [0.0, 2.0])
def test_every_variant_meets_the_budget_of_the_original_model(config: dict[str, object], epochs: float) -> None:
    adapter, transcript = run(epochs=epochs, **config)
    dense = mlp_graph(WIDTHS).cost()
    assert 0.95 * 0.25 <= adapter.graph.cost().macs / dense.macs <= 0.25
    trained = transcript.of(Train)
    if epochs and not config.get("rounds"):
        assert sum(t.epochs for t in trained) == pytest.approx(epochs)


@pytest.mark.parametrize("expansion", ["none", "wide"])
def test_training_in_rounds_takes_no_more_compute_than_training_the_pruned_model(expansion: str) -> None:
    class Counting:
        macs = 0.0

        def answer(self, directive: Directive) -> Observation:
            before = adapter.graph.cost().macs
            if isinstance(directive, Train):
                self.macs += directive.epochs * before
            return adapter.answer(directive)

    adapter, counting = SimulatedAdapter(WIDTHS), Counting()
    task = adapter.task("macs=25%", epochs=30.0)
    transcript = drive(GsmAnneal(GsmAnnealConfig(expansion=expansion, rounds=3)), task, counting)
    assert len(transcript.of(Train)) == 3
    assert counting.macs == pytest.approx(30.0 * 0.25 * task.graph.cost().macs, rel=0.01)


def test_replay_with_the_same_seed_gives_the_same_directives() -> None:
    first, second = (run(epochs=2.0, rounds=3, expansion="wide")[1] for _ in range(2))
    assert [type(d) for d in first.directives] == [type(d) for d in second.directives]
    assert first.plan == second.plan
    assert [n.values for n in first.notes] == [n.values for n in second.notes]


def test_it_keeps_more_accuracy_than_the_largest_weights_do() -> None:
    ours, plain = [], []
    for seed in range(6):
        adapter, _ = run(seed=seed)
        ours.append(adapter.evaluate(Evaluate()).accuracy)
        adapter = SimulatedAdapter(WIDTHS, seed=seed)
        drive(OneShot(), adapter.task("macs=25%", estimator=Magnitude()), adapter)
        plain.append(adapter.evaluate(Evaluate()).accuracy)
    assert np.mean(ours) > np.mean(plain)


def test_temperatures_fall_geometrically_and_entropy_with_them() -> None:
    notes = [n.values for n in run()[1].notes if n.kind == "anneal"]
    temperatures = np.array([n["temperature"] for n in notes])
    assert temperatures[1:] / temperatures[:-1] == pytest.approx(np.full(len(notes) - 1, 0.85))
    assert notes[0]["entropy"] > 0.5 > notes[-1]["entropy"]


def test_for_energies_that_do_not_change_the_zero_temperature_limit_is_plain_ranking() -> None:
    graph = residual_graph(64, [48, 64])
    budget = Budget.resolve([Target.parse("macs=30%")], graph.cost())
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=units) for name, units in graph.units.items()}
    lattice = Lattice(graph, budget)
    value = lattice.vector(scores)
    pi, _ = lattice.solve(value, np.ones_like(value), 1e-7)
    keep = global_keep(graph, budget, scores)
    annealed = lattice.named(pi)
    # the threshold's units all stay; exact counts may add a few more that fit under the budget
    for name, units in keep.items():
        assert set(np.flatnonzero(annealed[name] > 0.999)) <= set(units)
    undecided = (pi > 1e-3) & (pi < 0.999)
    assert undecided.sum() <= 1
    lowest_in, highest_out = value[pi > 0.999].min(), value[pi < 1e-3].max()
    assert lowest_in > highest_out


@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1, 1e-3])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_multiplier_puts_the_expected_cost_on_the_budget(temperature: float, power: float) -> None:
    graph = residual_graph(24, [16, 32])
    lattice = Lattice(graph, Budget.resolve([Target.parse("macs=30%")], graph.cost()))
    value = np.random.default_rng(1).normal(size=72)
    pi, mu = lattice.solve(value, lattice.prices(np.ones(72), power), temperature)
    assert lattice.load(pi) == pytest.approx(1, abs=1e-6)
    margin = (value - mu * lattice.prices(np.ones(72), power)) / temperature
    assert pi == pytest.approx(1 / (1 + np.exp(np.clip(-margin, -500, 500))))


def test_hot_probabilities_are_even_and_cold_ones_are_decided() -> None:
    assert mean_entropy(np.full(8, 0.5)) == pytest.approx(1)
    assert mean_entropy(np.array([0.0, 1.0, 1.0])) == 0
    assert mean_entropy(np.array([0.5]), units=10) == pytest.approx(0.1)
    graph = residual_graph(24, [16])
    lattice = Lattice(graph, Budget.resolve([Target.parse("macs=30%")], graph.cost()))
    even = lattice.even()
    assert np.ptp(even) == 0
    assert lattice.load(even) == pytest.approx(1)


def test_tied_groups_and_floors_enter_the_expected_cost() -> None:
    tie = {"equal_count": "n"}
    graph = mlp_graph([4, 8, 8, 8, 2], h0=tie, h2={**tie, "min_units": 4})
    lattice = Lattice(graph, Budget.resolve([Target.parse("macs=50%")], graph.cost()))
    widths = lattice.widths(np.concatenate([np.full(8, 0.75), np.zeros(8), np.full(8, 0.5)]))
    assert widths.tolist() == [5, 1, 5]
    assert lattice.bare_widths(np.zeros(24)).tolist() == [0, 0, 0]


def test_the_collapsing_price_variant_is_stopped_by_the_guard() -> None:
    with pytest.raises(PluginError, match="groups do not collapse") as caught:
        run("macs=10%", source="conditional", cost="recomputed", cost_power=1.0)
    assert caught.value.plugin == "gsm-anneal"


@pytest.mark.parametrize("above", [1.05, 1.5, 3.0])
def test_a_target_next_to_the_smallest_reachable_cost_is_met_not_called_a_collapse(above: float) -> None:
    graph = SimulatedAdapter(WIDTHS).graph
    adapter, _ = run(f"macs={100 * above * reachable(graph)['macs']:.6f}%")
    share = adapter.graph.cost().macs / graph.cost().macs
    assert reachable(graph)["macs"] <= share <= above * reachable(graph)["macs"]


@pytest.mark.parametrize("source", ["conditional", "refitted"])
def test_without_normalisation_a_quiet_stage_is_starved_and_the_guard_fires(
    source: Literal["conditional", "refitted"],
) -> None:
    adapter = SimulatedAdapter(WIDTHS)
    # the same function, since ReLU is homogeneous: what h1 says is read by small weights, h2's by large ones
    for tensor, factor in (("fc2.weight", 1e-3), ("fc2.bias", 1e-3), ("fc3.weight", 1e3)):
        adapter.weights[tensor] = adapter.weights[tensor] * factor
    task = adapter.task("macs=25%")
    with pytest.raises(PluginError, match="groups do not collapse"):
        drive(GsmAnneal(GsmAnnealConfig(source="conditional", normalise=False)), task, adapter)
    drive(GsmAnneal(GsmAnnealConfig(source=source)), task, adapter)
    assert min(adapter.graph.units.values()) >= 4


def test_groups_that_the_loss_minds_are_tried_once_and_keep_more() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    search = GroupSearch(GsmAnnealConfig(), adapter.graph, 1.0, Choice({}, {}), sum(WIDTHS[1:-1]))
    energies = Energies(adapter.graph, adapter.measure(Measure(SIGNALS["refitted"])), "refitted")
    ones = {name: np.ones(group.units) for name, group in adapter.graph.prunable.items()}
    plain = search.coefficients(energies, ones).value
    search.sensitivity = {"h1": 4.0}
    minded = search.coefficients(energies, ones).value
    rise = {name: float(np.mean(minded[name] - plain[name])) for name in ones}
    assert rise["h1"] > rise["h0"] + 0.5
    assert rise["h1"] > rise["h2"] + 0.5

    _, transcript = run(rounds=2, epochs=4.0, sensitivity="yes", sweeps=3)
    trained = [isinstance(d, Train) for d in transcript.directives].index(True)
    trials = [k for k, d in enumerate(transcript.directives) if isinstance(d, Evaluate) and d.within is not None]
    assert sum(k < trained for k in trials) == 3  # of h0, h1 and h2 alone, in the first of the rounds
    sweeps = [note for note in transcript.notes if note.kind == "widths"]
    assert [note.values["sweep"] for note in sweeps] == [0, 1, 2, 3]
    assert len(trials) <= 3 + 4 + 3 * 3  # at the end every outcome, and every group three times
    _, transcript = run(rounds=2, epochs=4.0, sensitivity="no")
    assert not [d for d in transcript.of(Evaluate) if d.within is not None]


def test_units_that_are_the_same_are_decided_too() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    for tensor in ("fc1.weight", "fc1.bias"):
        whole = adapter.weights[tensor]
        adapter.weights[tensor] = np.repeat(whole[:1], len(whole), axis=0)
    transcript = drive(GsmAnneal(), adapter.task("macs=25%"), adapter)
    assert last_of(transcript)["entropy"] < 0.02
    assert adapter.graph.units["h1"] < 24


def test_an_annealing_that_is_cut_short_is_not_called_decided() -> None:
    with pytest.raises(PluginError, match="ends decided"):
        run(temperatures=2)


def test_a_collapse_that_the_user_allows_still_respects_the_floors() -> None:
    adapter, _ = run("macs=10%", cost="recomputed", cost_power=1.0, collapsed=1.0)
    assert all(units >= 2 for units in adapter.graph.units.values())


def test_without_data_it_ranks_by_weights_and_says_so() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    task = adapter.task("macs=50%", epochs=5.0, has_data=False)
    transcript = drive(GsmAnneal(), task, adapter)
    assert not transcript.of(Train) and not transcript.of(Evaluate)
    assert all(m.signals == {Signal.WEIGHT} for m in transcript.of(Measure))
    assert all(r.refit == "none" for r in transcript.of(Remove))
    assert any(n.kind == "energies" for n in transcript.notes)


def test_without_labels_it_anneals_and_refits_but_trains_nothing() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    transcript = drive(GsmAnneal(), adapter.task("macs=50%", epochs=5.0, has_labels=False), adapter)
    assert not transcript.of(Train) and not transcript.of(Evaluate)
    assert [r.refit for r in transcript.of(Remove)] == ["sequential"]


def test_gate_fisher_without_labels_is_refused_with_the_way_out() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    task = adapter.task("macs=50%", has_labels=False)
    with pytest.raises(ConfigError, match="source=conditional"):
        drive(GsmAnneal(GsmAnnealConfig(source="gate_fisher")), task, adapter)


def test_rounds_train_under_gates_that_are_folded_when_units_go() -> None:
    _, transcript = run(epochs=10.0, rounds=3, round_share=0.3)
    gated = [t for t in transcript.of(Train) if t.gates is not None]
    assert len(gated) == 2
    assert all(t.lr is None and t.start == 0.75 and t.decay is not None for t in gated)
    assert transcript.of(Train)[-1].gates is None
    first, *between, folding, last = transcript.of(Remove)
    assert first.gates is None and all(r.gates is not None for r in between)
    # before the end: what is measured and refitted is the function that was trained
    assert folding.gates is not None and not folding.keep and last.gates is None
    sizes = [sum(len(units) for units in r.keep.values()) for r in (first, *between, last)]
    assert sizes == sorted(sizes, reverse=True)


def test_an_expanded_network_is_pruned_in_rounds_where_training_is_long() -> None:
    def rounds_that_train(epochs: float, expansion: Literal["none", "wide"]) -> int:
        adapter = SimulatedAdapter(WIDTHS, samples=64)
        method = GsmAnneal(GsmAnnealConfig(expansion=expansion))
        transcript = drive(method, adapter.task("macs=50%", epochs=epochs), adapter)
        return len([t for t in transcript.of(Train) if t.gates is not None])

    assert rounds_that_train(20.0, "wide") == 2
    assert rounds_that_train(19.0, "wide") == 0
    assert rounds_that_train(20.0, "none") == 0


def test_expansion_grows_inner_groups_first_and_the_target_stays_that_of_the_original() -> None:
    _, transcript = run(expansion="wide", ratio=1.5)
    (grow,) = transcript.of(Grow)
    assert transcript.directives[0] is grow
    assert grow.widths == {"h0": 48, "h1": 36, "h2": 48}
    assert transcript.plan.grow == grow.widths


def test_a_model_that_nothing_can_widen_is_told_so() -> None:
    adapter = SimulatedAdapter(WIDTHS, h0={"locked": "x"}, h1={"locked": "x"}, h2={"locked": "x"})
    with pytest.raises(ConfigError, match="can be widened"):
        drive(GsmAnneal(GsmAnnealConfig(expansion="wide")), adapter.task("params=100K"), adapter)


@pytest.mark.parametrize(
    ("more", "config", "said"),
    [
        ({"epochs": 0.0}, {}, "chosen by training"),
        ({"has_labels": False}, {}, "chosen by training"),
        ({}, {"rounds": 1}, "chosen by training"),
        ({}, {"round_share": 0.0}, "chosen by training"),
        ({"graph": residual_graph(8, [6, 4])}, {}, "no convolution of this model"),
    ],
)
def test_branches_that_nothing_would_choose_among_are_refused_before_anything_starts(
    more: dict[str, Any], config: dict[str, Any], said: str
) -> None:
    graph = residual_graph(8, [6, 4])
    kernel = Kernel("block0.conv1", "block0.conv1.weight", 3, ("kernel", "point"))
    task = dataclasses.replace(SimulatedAdapter().task("macs=50%", epochs=4.0), graph=graph.with_kernels([kernel]))
    GsmAnneal(GsmAnnealConfig(expansion="branches")).check(task)
    with pytest.raises(ConfigError, match=said):
        GsmAnneal(GsmAnnealConfig(expansion="branches", **config)).check(dataclasses.replace(task, **more))


def test_multiples_floors_and_ties_hold_in_every_round() -> None:
    tie = {"equal_count": "n", "multiple_of": 4}
    adapter = SimulatedAdapter(WIDTHS, h0=tie, h2=tie)
    drive(GsmAnneal(GsmAnnealConfig(rounds=3)), adapter.task("macs=40%", epochs=3.0), adapter)
    units = adapter.graph.units
    assert units["h0"] == units["h2"] and units["h0"] % 4 == 0


def test_a_budget_that_the_model_meets_already_removes_nothing() -> None:
    adapter, transcript = run("macs=100M")
    assert adapter.graph.units == mlp_graph(WIDTHS).units
    assert not [n for n in transcript.notes if n.kind == "anneal"]


def test_an_unreachable_target_is_found_before_anything_is_measured() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    with pytest.raises(UnreachableTargetError):
        next(GsmAnneal().run(adapter.task("macs=0.1%")))


def test_readers_too_wide_for_a_covariance_are_ranked_by_variance() -> None:
    adapter = SimulatedAdapter(WIDTHS, covariances=False)
    drive(GsmAnneal(), adapter.task("macs=25%"), adapter)
    assert adapter.graph.cost().macs <= 0.25 * mlp_graph(WIDTHS).cost().macs
    assert math.isfinite(adapter.evaluate(Evaluate()).loss)

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.allocation import (
    best_units,
    global_keep,
    ladders,
    mean_normalised,
    raise_if_unreachable,
    reachable,
    smallest_counts,
    uniform_keep,
)
from prunus.core.budget import Budget, Target
from prunus.core.errors import PlanError, UnreachableTargetError
from prunus.core.graph import ChannelGraph
from prunus.core.testing.graphs import mlp_graph, residual_graph


def budget_of(graph: ChannelGraph, *targets: str) -> Budget:
    return Budget.resolve([Target.parse(t) for t in targets], graph.cost())


def random_scores(graph: ChannelGraph, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random(units) for name, units in graph.units.items()}


def counts_of(keep: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: len(units) for name, units in keep.items()}


@st.composite
def problems(draw: st.DrawFn) -> tuple[ChannelGraph, list[str], dict[str, np.ndarray]]:
    widths = draw(st.lists(st.integers(4, 40), min_size=1, max_size=5))
    options: dict[str, dict[str, object]] = {}
    for k, width in enumerate(widths):
        options[f"h{k}"] = {
            "multiple_of": draw(st.sampled_from([1, 1, 2, 4])),
            "min_units": draw(st.integers(1, max(1, width // 4))),
            "locked": draw(st.sampled_from([None, None, None, "output of the model"])),
        }
    if len(widths) > 2 and draw(st.booleans()):
        widths[2] = widths[0]
        options["h0"]["equal_count"] = options["h2"]["equal_count"] = "heads"
    graph = mlp_graph([8, *widths, 4], **options)
    least, whole = graph.cost(smallest_counts(graph)), graph.cost()
    targets = []
    for metric in draw(st.sampled_from([("macs",), ("params",), ("macs", "params")])):
        low, high = getattr(least, metric), getattr(whole, metric)
        targets.append(f"{metric}={int(low + draw(st.floats(0, 1)) * (high - low))}")
    values = st.integers(0, 5) if draw(st.booleans()) else st.floats(-3, 3)
    scores = {n: np.array(draw(st.lists(values, min_size=u, max_size=u)), float) for n, u in graph.units.items()}
    return graph, targets, scores


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_plan_is_legal_and_never_over_budget(problem) -> None:
    graph, targets, scores = problem
    budget = budget_of(graph, *targets)
    for allocate in (global_keep, uniform_keep):
        keep = allocate(graph, budget, scores)
        graph.check_keep(keep)  # floors, multiples, ties, locks
        assert budget.met(graph.cost(counts_of(keep)))


@given(problems())
@settings(max_examples=100, deadline=None)
def test_no_further_step_would_fit(problem) -> None:
    graph, targets, scores = problem
    budget = budget_of(graph, *targets)
    counts = counts_of(global_keep(graph, budget, scores))
    for ladder in ladders(graph):
        above = ladder.counts[ladder.counts > counts[ladder.groups[0]]]
        if len(above):
            wider = {**counts, **{name: int(above[0]) for name in ladder.groups}}
            assert not budget.met(graph.cost(wider))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_inside_a_group_the_best_scores_stay_and_ties_go_to_the_lower_index(problem) -> None:
    graph, targets, scores = problem
    budget = budget_of(graph, *targets)
    for name, units in global_keep(graph, budget, scores).items():
        order = sorted(range(graph.units[name]), key=lambda i, s=scores[name]: (-s[i], i))
        assert sorted(order[: len(units)]) == units.tolist() or graph.groups[name].locked


def test_a_single_group_keeps_as_many_as_brute_force_allows() -> None:
    graph = mlp_graph([7, 50, 3])
    for share in (11, 37, 50, 83):
        budget = budget_of(graph, f"macs={share}%")
        best = max(k for k in range(1, 51) if budget.met(graph.cost({"h0": k})))
        assert len(global_keep(graph, budget, random_scores(graph))["h0"]) == best


def test_a_global_plan_is_the_threshold_plan_when_steps_are_free_of_slack() -> None:
    graph = mlp_graph([4, 6, 6, 2])
    scores = {"h0": np.array([9, 8, 7, 1, 1, 1.0]), "h1": np.array([6, 1, 1, 1, 5, 4.0])}
    wanted = graph.cost({"h0": 3, "h1": 3}).macs
    keep = global_keep(graph, budget_of(graph, f"macs={int(wanted)}"), scores)
    assert keep["h0"].tolist() == [0, 1, 2]
    assert keep["h1"].tolist() == [0, 4, 5]


@pytest.mark.parametrize("share", [5, 10, 25, 50, 75, 95])
@pytest.mark.parametrize("metric", ["macs", "params", "size"])
def test_wide_networks_land_within_one_percent_under_the_target(metric: str, share: int) -> None:
    graph = residual_graph(64, [64, 48, 96, 128]).with_floors(0.02)
    budget = budget_of(graph, f"{metric}={share}%")
    for allocate in (global_keep, uniform_keep):
        load = budget.load(graph.cost(counts_of(allocate(graph, budget, random_scores(graph)))))
        assert 0.99 <= load <= 1.0 + 1e-12


def test_coarse_steps_are_exchanged_to_come_closer() -> None:
    graph = mlp_graph([16, 64, 64, 64, 8], h0={"multiple_of": 16}, h1={"multiple_of": 16}, h2={"multiple_of": 16})
    budget = budget_of(graph, "macs=45%")
    steps = range(16, 65, 16)
    best = max(
        load
        for a, b, c in itertools.product(steps, steps, steps)
        if (load := budget.load(graph.cost({"h0": a, "h1": b, "h2": c}))) <= 1
    )
    for seed in range(5):
        keep = global_keep(graph, budget, random_scores(graph, seed))
        assert budget.load(graph.cost(counts_of(keep))) >= 0.9 * best


def test_uniform_keeps_the_same_share_of_every_group() -> None:
    graph = residual_graph(64, [32, 128, 64])
    keep = uniform_keep(graph, budget_of(graph, "macs=30%"), random_scores(graph))
    shares = [len(units) / graph.units[name] for name, units in keep.items()]
    assert max(shares) - min(shares) < 0.05


def test_tied_groups_move_together_by_their_mean_score() -> None:
    tie = {"equal_count": "one number"}
    graph = mlp_graph([4, 8, 8, 8, 2], h0=tie, h2=tie)
    keep = global_keep(graph, budget_of(graph, "macs=40%"), random_scores(graph))
    assert len(keep["h0"]) == len(keep["h2"])


def test_a_locked_member_locks_the_groups_tied_to_it() -> None:
    graph = mlp_graph(
        [4, 8, 8, 8, 2], h0={"equal_count": "n", "locked": "seen from outside"}, h2={"equal_count": "n"}
    )
    assert smallest_counts(graph) == {"h0": 8, "h1": 1, "h2": 8}


def test_a_budget_above_the_model_keeps_everything() -> None:
    graph = mlp_graph([4, 8, 2])
    budget = budget_of(graph, "params=1M")
    assert counts_of(global_keep(graph, budget, random_scores(graph))) == graph.units


def test_every_one_of_several_targets_holds() -> None:
    graph = residual_graph(32, [32, 64, 16])
    budget = budget_of(graph, "macs=60%", "params=30%", "size=9KB")
    cost = graph.cost(counts_of(global_keep(graph, budget, random_scores(graph))))
    assert cost.macs <= 0.6 * graph.cost().macs
    assert cost.params <= 0.3 * graph.cost().params
    assert cost.bytes <= 9000


def test_an_unreachable_share_names_the_smallest_reachable_and_that_is_reachable() -> None:
    graph = residual_graph(32, [32, 64]).with_floors(0.25)
    with pytest.raises(UnreachableTargetError) as caught:
        raise_if_unreachable(graph, budget_of(graph, "macs=2%"))
    assert caught.value.smallest.startswith("macs=") and caught.value.smallest.endswith("%")
    raise_if_unreachable(graph, budget_of(graph, caught.value.smallest))
    assert float(caught.value.smallest[5:-1]) <= 100 * reachable(graph)["macs"] + 0.1


@pytest.mark.parametrize("target", ["params=1", "params=1K", "size=1KB", "macs=0.1M", "params=0.000001M"])
def test_an_unreachable_amount_is_answered_in_the_users_own_unit(target: str) -> None:
    graph = residual_graph(800, [800, 64]).with_floors(0.5)  # millions are written out, not as 1e+06
    with pytest.raises(UnreachableTargetError) as caught:
        global_keep(graph, budget_of(graph, target), random_scores(graph))
    assert caught.value.smallest.partition("=")[0] == target.partition("=")[0]
    assert caught.value.smallest.rstrip("KMB")[-1].isdigit()
    raise_if_unreachable(graph, budget_of(graph, caught.value.smallest))


def test_locked_groups_are_counted_in_the_reason() -> None:
    graph = mlp_graph([4, 8, 8, 2], h0={"locked": "output"})
    with pytest.raises(UnreachableTargetError, match="1 are locked"):
        raise_if_unreachable(graph, budget_of(graph, "macs=1%"))


def test_scores_that_are_missing_misshapen_or_not_finite_are_refused() -> None:
    graph = mlp_graph([4, 8, 2])
    budget = budget_of(graph, "macs=50%")
    for scores in ({}, {"h0": np.ones(7)}, {"h0": np.array([1.0] * 7 + [np.nan])}):
        with pytest.raises(PlanError, match="h0"):
            global_keep(graph, budget, scores)


def test_scores_of_locked_groups_are_not_needed() -> None:
    graph = mlp_graph([4, 8, 8, 2], h0={"locked": "output"})
    keep = global_keep(graph, budget_of(graph, "macs=60%"), {"h1": np.arange(8.0)})
    assert len(keep["h0"]) == 8


def test_best_units_breaks_ties_by_index() -> None:
    assert best_units(np.array([1.0, 2, 1, 2, 1]), 3).tolist() == [0, 1, 3]


def test_mean_normalisation_makes_groups_comparable_and_survives_a_dead_group() -> None:
    scores = mean_normalised({"a": np.array([1.0, 3]), "b": np.array([100.0, 300]), "c": np.zeros(2)})
    assert scores["a"].tolist() == scores["b"].tolist() == [0.5, 1.5]
    assert scores["c"].tolist() == [0, 0]


def test_two_hundred_groups_with_twenty_thousand_units_take_less_than_two_seconds() -> None:
    graph = residual_graph(64, [100] * 200)
    scores = random_scores(graph)
    start = time.perf_counter()
    global_keep(graph, budget_of(graph, "macs=50%", "params=55%"), scores)
    assert time.perf_counter() - start < 2

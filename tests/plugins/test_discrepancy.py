from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.testing.graphs import mlp_graph, residual_graph
from prunus.plugins.discrepancy import (
    Discrepancy,
    conditional_covariance,
    fold_away,
    ridged_precision,
    sliced_weights,
)


def covariance_of(rng: np.random.Generator, n: int) -> np.ndarray:
    root = rng.normal(size=(n, n + 3))
    return root @ root.T / n


def best_refit_error(weight: np.ndarray, covariance: np.ndarray, gone: list[int]) -> float:
    """Output variance that the best linear map of the other inputs leaves unexplained, by least squares."""
    left = [i for i in range(len(covariance)) if i not in gone]
    root = np.linalg.cholesky(covariance).T
    refit, *_ = np.linalg.lstsq(root[:, left], root @ weight.T, rcond=None)
    return float(((root @ weight.T - root[:, left] @ refit) ** 2).sum())


@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_the_inverse_of_the_precision_is_the_variance_given_all_others(n: int, seed: int) -> None:
    covariance = covariance_of(np.random.default_rng(seed), n)
    conditional = conditional_covariance(np.linalg.inv(covariance), np.arange(n)[:, None])
    for i in range(n):
        others = [j for j in range(n) if j != i]
        cross = covariance[others, i]
        explained = cross @ np.linalg.solve(covariance[np.ix_(others, others)], cross)
        assert conditional[i, 0, 0] == pytest.approx(covariance[i, i] - explained, rel=1e-6)


@given(st.integers(3, 9), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_folding_away_is_the_least_squares_refit_and_the_inverse_of_what_is_left(
    n: int, blocks: int, fortran: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    covariance, weight = covariance_of(rng, n), rng.normal(size=(4, n))
    gone = rng.choice(n, size=min(blocks, n - 1), replace=False)
    left = np.setdiff1d(np.arange(n), gone)
    precision, folded = np.linalg.inv(covariance), weight.copy()
    if fortran:
        precision, folded = np.asfortranarray(precision), np.asfortranarray(folded)
    fold_away(precision, folded, gone)
    assert precision[np.ix_(left, left)] == pytest.approx(
        np.linalg.inv(covariance[np.ix_(left, left)]), rel=1e-5, abs=1e-7
    )
    expected = weight @ covariance[:, left] @ np.linalg.inv(covariance[np.ix_(left, left)])
    assert folded[:, left] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert not folded[:, gone].any() and not precision[gone].any()


def flattened_graph(units: int, run: int, outputs: int) -> ChannelGraph:
    """A group whose units are `run` inputs each of one linear reader."""
    unit_of = np.repeat(np.arange(units), run)
    group = ChannelGroup("g", units, (Slice("fc.weight", 1, "reads", unit_of),))
    return ChannelGraph([group], [], {"fc.weight": (outputs, units * run)})


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_discrepancy_is_the_share_of_output_variance_that_the_best_refit_loses(
    units: int, run: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = units * run
    covariance, weight = covariance_of(rng, n), rng.normal(size=(3, n))
    ridge = 1e-3
    discrepancy = Discrepancy(
        flattened_graph(units, run, 3), {"fc.weight": weight}, {"fc.weight": covariance}, ridge
    )
    ridged, _ = ridged_precision(covariance, ridge)
    total = np.trace(weight @ ridged @ weight.T)
    for unit in range(units):
        lost = best_refit_error(weight, ridged, list(range(unit * run, (unit + 1) * run)))
        assert discrepancy.of("g")[unit] == pytest.approx(lost / total, rel=1e-5, abs=1e-9)


def test_scores_alone_are_the_same_and_hold_no_matrices() -> None:
    rng = np.random.default_rng(0)
    graph = residual_graph(6, [5, 4])
    weights = {name: rng.normal(size=graph.tensors[name]) for name in sliced_weights(graph)}
    moments = {name: covariance_of(rng, weights[name].shape[1]) for name in weights}
    whole = Discrepancy(graph, weights, moments, 1e-3)
    alone = Discrepancy(graph, weights, moments, 1e-3, scores_only=True)
    for name in graph.prunable:
        np.testing.assert_array_equal(alone.of(name), whole.of(name))
    assert len(pickle.dumps(alone)) < len(pickle.dumps(whole)) - sum(m.nbytes for m in moments.values())


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_greedy_downdating_equals_recomputation_from_scratch(seed: int) -> None:
    """Whatever was removed before, the next discrepancy is that of the refitted network, seen anew."""
    rng = np.random.default_rng(seed)
    graph = residual_graph(6, [5, 4])
    weights = {name: rng.normal(size=graph.tensors[name]) for name in sliced_weights(graph)}
    moments = {name: covariance_of(rng, weights[name].shape[1]) for name in weights}
    discrepancy = Discrepancy(graph, weights, moments, 1e-3)
    alive = {name: list(range(group.units)) for name, group in graph.groups.items()}
    for _ in range(6):
        name = str(rng.choice([n for n in alive if len(alive[n]) > 1]))
        unit = int(rng.choice(alive[name]))
        discrepancy.remove(name, unit)
        alive[name].remove(unit)
    for name, units in alive.items():
        expected = [_from_scratch(graph, weights, moments, alive, name, unit) for unit in units]
        assert discrepancy.of(name)[units] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def _from_scratch(graph, weights, moments, alive, name, unit) -> float:  # type: ignore[no-untyped-def]
    total = 0.0
    for piece in graph.groups[name].with_role("reads"):
        writer = [g for g, s in graph.slices_of.get((piece.tensor, 0), ()) if s.role == "writes"]
        rows = alive[writer[0]] if writer else list(range(len(weights[piece.tensor])))
        dense = weights[piece.tensor][rows]
        taps = np.moveaxis(dense, 1, -1).reshape(-1, dense.shape[1])
        ridged, _ = ridged_precision(moments[piece.tensor], 1e-3)
        gone = [i for i in range(len(ridged)) if i not in alive[name]]
        before = best_refit_error(taps, ridged, gone) if gone else 0.0
        after = best_refit_error(taps, ridged, [*gone, unit])
        total += (after - before) / np.trace(taps @ ridged @ taps.T)
    return total


def test_a_reader_without_covariance_counts_its_inputs_as_uncorrelated() -> None:
    weight = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    graph = flattened_graph(3, 1, 2)
    discrepancy = Discrepancy(graph, {"fc.weight": weight}, {"fc.weight": np.array([4.0, 1.0, 1.0])}, 1e-12)
    assert discrepancy.of("g") == pytest.approx(np.array([4.0, 5.0, 9.0]) / 18.0, rel=1e-6)


def test_a_copy_of_another_unit_costs_nothing_until_the_other_is_gone() -> None:
    covariance = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    graph = flattened_graph(3, 1, 1)
    discrepancy = Discrepancy(graph, {"fc.weight": np.ones((1, 3))}, {"fc.weight": covariance}, 1e-9)
    assert discrepancy.of("g")[:2] == pytest.approx([0.0, 0.0], abs=1e-6)
    discrepancy.remove("g", 0)
    assert discrepancy.of("g")[1] == pytest.approx(4.0 / 5.0, rel=1e-6)


def test_a_group_that_nothing_reads_has_its_share_of_the_writers_energy() -> None:
    group = ChannelGroup("g", 2, (Slice("w", 0, "writes", np.arange(2)),))
    graph = ChannelGraph([group], [], {"w": (2, 2)})
    discrepancy = Discrepancy(graph, {"w": np.array([[1.0, 0.0], [1.0, 1.0]])}, {})
    assert discrepancy.of("g") == pytest.approx([1 / 3, 2 / 3])


def test_a_dead_layer_does_not_break_the_inverse() -> None:
    graph = mlp_graph([4, 6, 2])
    discrepancy = Discrepancy(graph, {"fc1.weight": np.ones((2, 6))}, {"fc1.weight": np.zeros((6, 6))})
    discrepancy.remove("h0", 1)
    assert np.isfinite(discrepancy.of("h0")).all()


def test_removing_half_of_a_wide_reader_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    graph = mlp_graph([8, 512, 512])
    discrepancy = Discrepancy(
        graph, {"fc1.weight": rng.normal(size=(512, 512))}, {"fc1.weight": covariance_of(rng, 512)}
    )
    began = time.perf_counter()
    for unit in range(256):
        discrepancy.remove("h0", unit)
    assert time.perf_counter() - began < 20

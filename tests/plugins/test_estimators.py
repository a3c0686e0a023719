from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.directives import Measure
from prunus.core.graph import ChannelGroup, Slice
from prunus.core.importance import ImportanceEstimator
from prunus.core.signals import Signal
from prunus.core.testing.simulation import SimulatedAdapter, SimulatedSignals
from prunus.plugins.bn_scale import BnScale
from prunus.plugins.fpgm import Fpgm, pairwise_distances, unit_rows
from prunus.plugins.magnitude import Magnitude, MagnitudeConfig
from prunus.plugins.random_scores import RandomConfig, RandomScores
from prunus.plugins.taylor import Taylor, TaylorConfig

ALL = (Magnitude, Taylor, BnScale, Fpgm, RandomScores)
UNITS = np.arange(3)


def weights(**arrays: np.ndarray) -> SimulatedSignals:
    named = {(Signal.WEIGHT, name.replace("__", ".")): a.astype(np.float64) for name, a in arrays.items()}
    return SimulatedSignals(frozenset({Signal.WEIGHT}), named)


WRITER = np.array([[3.0, 4.0], [0.0, -2.0], [1.0, 1.0]])
READER = np.array([[1.0, 2.0, 2.0]])
GROUP = ChannelGroup("g", 3, (Slice("a.weight", 0, "writes", UNITS), Slice("b.weight", 1, "reads", UNITS)))


@pytest.mark.parametrize(
    ("config", "golden"),
    [
        ({}, [5, 2, 2**0.5]),
        ({"p": 1.0}, [7, 2, 2]),
        ({"weights": "reads"}, [1, 2, 2]),
        ({"weights": "both"}, [26**0.5, 8**0.5, 6**0.5]),
    ],
)
def test_magnitude_by_hand(config: dict[str, object], golden: list[float]) -> None:
    scores = Magnitude(MagnitudeConfig(**config)).score(GROUP, weights(a__weight=WRITER, b__weight=READER))
    assert scores == pytest.approx(golden)


def test_magnitude_of_a_stream_sums_over_all_layers_that_write_it() -> None:
    group = replace(GROUP, slices=(*GROUP.slices, Slice("c.weight", 0, "writes", np.array([2, 1, 0]))))
    scores = Magnitude().score(group, weights(a__weight=WRITER, b__weight=READER, c__weight=WRITER))
    assert scores**2 == pytest.approx([25 + 2, 4 + 4, 2 + 25])


def test_magnitude_of_a_flattened_or_grouped_axis_gathers_all_indices_of_a_unit() -> None:
    group = ChannelGroup("g", 2, (Slice("a.weight", 0, "writes", np.array([0, 0, 1, 1, -1])),))
    assert Magnitude().score(group, weights(a__weight=np.ones((5, 3)))) == pytest.approx([6**0.5] * 2)


def test_taylor_by_hand() -> None:
    arrays = {
        (Signal.GATE_GRADIENT, "g"): np.array([-1.0, 2, 0]),
        (Signal.GATE_FISHER, "g"): np.array([4.0, 9, 1]),
    }
    signals = SimulatedSignals(Taylor.needs, arrays)
    assert Taylor().score(GROUP, signals).tolist() == [2, 3, 1]
    assert Taylor(TaylorConfig(average="signed")).score(GROUP, signals).tolist() == [1, 2, 0]


def normed_group() -> ChannelGroup:
    names = ("n.weight", "n.bias", "n.running_mean", "n.running_var", "a.bias", "act.weight")
    return replace(GROUP, slices=(*GROUP.slices, *(Slice(name, 0, "scales", UNITS) for name in names)))


def test_bn_scale_reads_gamma_and_neither_biases_nor_slopes_nor_statistics() -> None:
    signals = weights(
        a__weight=WRITER,
        n__weight=np.array([-3.0, 1, 2]),
        n__bias=np.ones(3) * 9,
        n__running_mean=np.ones(3) * 9,
        n__running_var=np.ones(3) * 9,
        a__bias=np.ones(3) * 9,
        act__weight=np.ones(3) * 9,
    )
    assert BnScale().score(normed_group(), signals).tolist() == [3, 1, 2]


def test_bn_scale_of_a_group_without_a_norm_ranks_by_the_writing_weights() -> None:
    assert BnScale().score(GROUP, weights(a__weight=WRITER)) == pytest.approx([5, 2, 2**0.5])


def test_random_is_the_same_for_the_same_seed_and_differs_between_seeds_and_groups() -> None:
    nothing = weights()
    first = RandomScores().score(GROUP, nothing)
    assert np.array_equal(first, RandomScores().score(GROUP, nothing))
    assert not np.array_equal(first, RandomScores(RandomConfig(seed=1)).score(GROUP, nothing))
    assert not np.array_equal(first, RandomScores().score(replace(GROUP, name="h"), nothing))


def test_fpgm_by_hand() -> None:
    rows = np.array([[0.0, 0], [3, 4], [0, 8]])
    scores = Fpgm().score(GROUP, weights(a__weight=rows))
    assert scores == pytest.approx([5 + 8, 5 + 5, 8 + 5])


def test_fpgm_scores_the_unit_nearest_the_geometric_median_lowest_whatever_its_norm() -> None:
    rows = np.array([[100.0, 100], [101, 100], [99, 100], [100, 101], [100, 99], [0.1, 0]])
    group = ChannelGroup("g", 6, (Slice("a.weight", 0, "writes", np.arange(6)),))
    assert Fpgm().score(group, weights(a__weight=rows)).argmin() == 0


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_pairwise_distances_equal_the_double_loop(seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(5, 7))
    wanted = [[np.linalg.norm(a - b) for b in rows] for a in rows]
    assert pairwise_distances(rows) == pytest.approx(np.array(wanted), abs=1e-6)


def test_unit_rows_gather_interleaved_and_uneven_indices() -> None:
    weight = np.arange(10.0).reshape(5, 2)
    rows = unit_rows(weight, Slice("w", 0, "writes", np.array([0, 1, 0, -1, 1])), 2)
    assert rows.tolist() == [[0, 1, 4, 5], [2, 3, 8, 9]]
    rows = unit_rows(weight, Slice("w", 0, "writes", np.array([0, 1, 0, -1, -1])), 2)
    assert rows.tolist() == [[0, 1, 4, 5], [2, 3, 0, 0]]


@pytest.mark.parametrize("estimator", ALL)
def test_scores_are_finite_one_per_unit_and_repeatable(
    estimator: type[ImportanceEstimator],
) -> None:
    adapter = SimulatedAdapter()
    signals = adapter.measure(Measure(signals=estimator.needs))
    for group in adapter.graph.groups.values():
        scores = estimator().score(group, signals)
        assert scores.shape == (group.units,) and scores.dtype == np.float64 and np.isfinite(scores).all()
        assert np.array_equal(scores, estimator().score(group, signals))


@pytest.mark.parametrize("estimator", [Magnitude, BnScale, Fpgm])
def test_permuting_the_units_permutes_the_scores(estimator: type[ImportanceEstimator]) -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(3)
    signals = weights(a__weight=WRITER, b__weight=READER)
    permuted = weights(a__weight=WRITER[order], b__weight=READER[:, order])
    assert estimator().score(GROUP, permuted) == pytest.approx(estimator().score(GROUP, signals)[order])

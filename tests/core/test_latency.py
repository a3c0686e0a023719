"""Latency as a quantity of the cost model: fits recover what was planted, corrections say by what factor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.allocation import global_keep
from prunus.core.budget import Budget, Target
from prunus.core.cost import CostTerm, Extent
from prunus.core.graph import ChannelGraph, ChannelGroup
from prunus.core.kernels import Kernel
from prunus.core.latency import (
    Correction,
    LatencyComparison,
    LatencyTable,
    StepTimes,
    Timing,
    calibrated,
    fit_terms,
    predicted,
)
from prunus.core.testing.graphs import residual_graph
from prunus.plugins.layers import Choice, with_layers

OUT, IN = Extent(0, ((1, ("out",)),)), Extent(0, ((1, ("in",)),))
COUNTS = [{"out": o, "in": i} for o in (8, 24, 64) for i in (4, 16, 32)]
BILINEAR = ((), (OUT,), (IN,), (OUT, IN))


def times(a: float, b: float, c: float, d: float) -> np.ndarray:
    return np.array([a + b * k["out"] + c * k["in"] + d * k["out"] * k["in"] for k in COUNTS])


@settings(deadline=None, max_examples=50)
@given(st.tuples(*(st.floats(0, 1) for _ in range(4))).filter(lambda x: sum(x) > 0.01))
def test_a_fit_recovers_every_bilinear_time(planted: tuple[float, float, float, float]) -> None:
    seconds = times(*planted) * 1e-4
    terms = fit_terms([StepTimes("conv", BILINEAR, seconds)], COUNTS)
    assert all(term.coefficient > 0 and term.quantity == "latency" for term in terms)
    np.testing.assert_allclose([predicted(terms, k) for k in COUNTS], seconds, rtol=1e-6)


def test_a_fit_never_makes_a_wider_layer_faster() -> None:
    rng = np.random.default_rng(0)
    terms = fit_terms([StepTimes("noise", BILINEAR, rng.uniform(1e-5, 2e-5, len(COUNTS)))], COUNTS)
    assert predicted(terms, {"out": 64, "in": 32}) >= predicted(terms, {"out": 8, "in": 4})


def test_times_of_one_module_with_one_product_become_one_term() -> None:
    steps = [StepTimes("block", ((OUT,),), times(0, b, 0, 0)) for b in (1e-6, 2e-6)]
    (term,) = fit_terms(steps, COUNTS)
    assert term.source == "block" and term.coefficient == pytest.approx(3e-6)


def test_calibration_fits_a_scale_and_an_overhead() -> None:
    terms = (CostTerm("latency", "conv", 1e-6, (OUT,)),)
    measured = [2.0 * predicted(terms, k) + 5e-5 for k in COUNTS]
    fitted = calibrated(terms, COUNTS, measured)
    np.testing.assert_allclose([predicted(fitted, k) for k in COUNTS], measured, rtol=1e-9)


def test_one_measured_model_calibrates_the_scale_alone() -> None:
    terms = (CostTerm("latency", "conv", 1e-6, (OUT,)),)
    (term,) = calibrated(terms, COUNTS[:1], [24e-6])
    assert term.coefficient == pytest.approx(3e-6)


def graph() -> ChannelGraph:
    groups = [ChannelGroup("out", 64, ()), ChannelGroup("in", 32, ())]
    macs = CostTerm("macs", "conv", 1, (OUT, IN))
    return ChannelGraph(groups, [macs], {}).with_terms(
        [CostTerm("latency", "conv", 2e-6, (OUT, IN)), CostTerm("latency", "overhead", 1e-4)]
    )


def test_latency_is_a_cost_like_any_other() -> None:
    cost = graph().cost({"out": 10, "in": 20})
    assert cost.macs == 200
    assert cost.latency == pytest.approx(2e-6 * 200 + 1e-4)
    assert cost.share_of(graph().cost())["latency"] == pytest.approx(5e-4 / (2e-6 * 64 * 32 + 1e-4))


def test_the_time_of_one_tap_was_not_measured_and_is_taken_for_that_of_all() -> None:
    kernels = [Kernel("block0.conv1", "block0.conv1.weight", 3)]
    plain = residual_graph(8, [6, 4]).with_kernels(kernels)
    term = CostTerm("latency", "block0.conv1", 2e-6, (Extent(0, ((1, ("inner0",)),)),))
    whole = ChannelGraph(
        plain.groups.values(), [*plain.terms, term], plain.tensors, plain.blocks.values(), kernels
    )
    reduced = whole.without_kernels(["block0.conv1"])
    assert reduced.cost().latency == whole.cost().latency == pytest.approx(12e-6)
    assert reduced.cost().params < whole.cost().params
    space = with_layers(whole, Choice.of(whole, "kernels"))
    assert space.cost().latency == pytest.approx(12e-6)


@pytest.mark.parametrize("text", ["latency=50%", "latency=2ms"])
def test_a_latency_target_is_met_by_the_ordinary_allocation(text: str) -> None:
    dense = graph()
    budget = Budget.resolve([Target.parse(text)], dense.cost())
    scores = {name: np.arange(group.units, dtype=float) + 1 for name, group in dense.groups.items()}
    keep = global_keep(dense, budget, scores)
    latency = dense.cost({name: len(units) for name, units in keep.items()}).latency
    assert 0.95 * budget.limits["latency"] <= latency <= budget.limits["latency"]


def test_a_correction_makes_terms_as_slow_as_they_were_measured() -> None:
    correction = Correction(limit=2e-3, predicted=1.9e-3, measured=2.2e-3)
    assert not correction.met
    assert "missed: measured 2.2 ms, predicted 1.9 ms" in str(correction)
    terms = correction.apply(graph().terms)
    before, after = graph().cost(), ChannelGraph(graph().groups.values(), terms, {}).cost()
    assert after.macs == before.macs
    assert after.latency == pytest.approx(before.latency * 2.2 / 1.9)
    assert Correction(limit=2e-3, predicted=1.9e-3, measured=2.0e-3).met


def test_turns_are_compared_pair_by_pair_so_that_drift_cancels() -> None:
    drift = np.linspace(1, 5, 21)
    comparison = LatencyComparison(
        dense=Timing(tuple(drift * 4e-3)), pruned=Timing(tuple(drift * 1e-3)), batch=1, threads=1,
        dtype="float32", device="cpu",
    )  # fmt: skip
    assert comparison.ratio == pytest.approx(0.25)
    assert comparison.ratio_quartiles == pytest.approx((0.25, 0.25))
    assert comparison.won_per_macs(0.5) == pytest.approx(1.5)
    assert comparison.won_per_macs(1.0) is None


def test_a_timing_gives_median_and_quartiles() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.median, timing.quartiles, timing.fastest) == (3.0, (2.0, 4.0), 1.0)


def test_a_table_tells_its_worst_error() -> None:
    table = LatencyTable((), 2e-3, ((1.1e-3, 1e-3), (0.8e-3, 1e-3)), threads=2, batch=1)
    np.testing.assert_allclose(table.errors, [0.1, -0.2])
    assert "dense 2 ms (batch 1, 2 threads); 2 models at random widths foretold within 20.0%" in str(table)

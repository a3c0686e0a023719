from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.core.cost import CostModel, CostTerm, Extent
from prunus.core.testing.graphs import mlp_graph, residual_graph


def test_an_mlp_costs_what_multiplication_by_hand_gives() -> None:
    cost = mlp_graph([4, 8, 6, 3]).cost()
    assert cost.macs == 4 * 8 + 8 * 6 + 6 * 3
    assert cost.params == 4 * 8 + 8 + 8 * 6 + 6 + 6 * 3 + 3
    assert cost.bytes == 4 * cost.params


def test_a_convolution_counts_taps_positions_and_both_widths() -> None:
    graph = residual_graph(16, [8], spatial=100, classes=10)
    assert graph.cost({"stream": 5, "inner0": 3}).macs == 900 * (5 * 3 + 3 * 5 + 5 * 3) + 50


def test_products_of_counts_in_one_extent_are_heads_times_dims() -> None:
    axis = Extent(0, ((1, ("heads", "dims")),))
    model = CostModel(("heads", "dims"), [CostTerm("macs", "scores", 49, (axis, Extent(49)))])
    assert model.at(model.counts({"heads": 3, "dims": 8})).macs == 49 * 24 * 49


def test_concatenations_add_and_constants_stay() -> None:
    axis = Extent(5, ((1, ("a",)), (49, ("b",))))
    assert axis.at({"a": 2, "b": 3}) == 5 + 2 + 147


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_gradients_equal_finite_differences(widths: list[int], random) -> None:
    graph = mlp_graph([6, *widths, 5])
    model = graph.cost_model
    counts = np.array([random.uniform(1, w) for w in widths])
    for quantity in ("macs", "params", "bytes"):
        gradient = model.gradient(counts, quantity)
        for i in range(len(widths)):
            step = np.zeros(len(widths))
            step[i] = 1.0  # costs are linear in each single count
            rise = getattr(model.at(counts + step), quantity) - getattr(model.at(counts), quantity)
            assert gradient[i] == pytest.approx(rise)


def test_layers_add_up_to_the_whole() -> None:
    graph = residual_graph(16, [8, 24])
    counts = graph.cost_model.counts({"stream": 9, "inner0": 3, "inner1": 11})
    assert sum(graph.cost_model.by_source(counts, "macs").values()) == graph.cost_model.at(counts).macs


def test_shares_are_of_the_dense_cost() -> None:
    graph = mlp_graph([4, 8, 2])
    assert graph.cost({"h0": 4}).share_of(graph.cost())["macs"] == 0.5

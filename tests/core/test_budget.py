from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.core.budget import Budget, Target
from prunus.core.cost import Cost
from prunus.core.errors import ConfigError
from prunus.core.testing.graphs import mlp_graph

DENSE = Cost(macs=2e9, params=25e6, bytes=100e6)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("macs=50%", 1e9),
        ("macs=900M", 900e6),
        ("macs=0.9G", 900e6),
        ("params=5M", 5e6),
        ("params=30%", 7.5e6),
        ("size=8MB", 8e6),
        ("size=8MiB", 8 * 2**20),
        ("latency=12ms", 0.012),
        (" params = 250 K ", 250e3),
    ],
)
def test_a_target_is_read_in_the_users_own_unit(text: str, limit: float) -> None:
    target = Target.parse(text)
    assert Budget.resolve([target], DENSE).limits[target.quantity] == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["macs", "macs=0%", "macs=100%", "macs=150%", "flops=50%", "macs=5X", "size=5M", "macs=-3", "macs=1.2.3%"],
)
def test_a_bad_target_is_one_clear_config_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Target.parse(text)
    assert caught.value.key == "target"
    assert "\n" not in str(caught.value)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'macs=50%' is a share of nothing"):
        Budget.resolve([Target.parse("macs=50%")], Cost(macs=0.0, params=25e6, bytes=100e6))


def test_of_two_targets_on_one_quantity_the_tighter_holds() -> None:
    budget = Budget.resolve([Target.parse("macs=50%"), Target.parse("macs=900M")], DENSE)
    assert budget.limits["macs"] == 900e6


def test_load_is_the_worst_ratio_and_met_means_every_target() -> None:
    budget = Budget.resolve([Target.parse("macs=50%"), Target.parse("params=50%")], DENSE)
    assert budget.load(Cost(5e8, 12.5e6, 0)) == pytest.approx(1.0)
    assert budget.met(Cost(5e8, 12.5e6, 0))
    assert not budget.met(Cost(5e8, 12.6e6, 0))


@given(st.floats(0, 1), st.floats(0, 1))
def test_budgets_of_rounds_fall_geometrically_and_end_at_the_limit(early: float, late: float) -> None:
    budget = Budget.resolve([Target.parse("macs=10%")], DENSE)
    first, second = sorted((early, late))
    assert budget.partway(first).limits["macs"] >= budget.partway(second).limits["macs"] * (1 - 1e-9)
    assert budget.partway(1).limits["macs"] == pytest.approx(2e8)
    assert budget.partway(0).limits["macs"] == pytest.approx(2e9)
    assert budget.partway(0.5).limits["macs"] == pytest.approx(2e9 * 0.1**0.5)


def test_the_gradient_is_that_of_the_binding_target() -> None:
    graph = mlp_graph([5, 7, 3])
    budget = Budget.resolve([Target.parse("macs=90%"), Target.parse("params=10%")], graph.cost())
    counts = np.array([4.0])
    step = 1e-3
    at = graph.cost_model.at(counts + step).params - graph.cost_model.at(counts).params
    assert budget.gradient(graph, counts)[0] == pytest.approx(at / step / budget.limits["params"])

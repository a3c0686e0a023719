from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from prunus.core.errors import PlanError
from prunus.core.plan import AttributeEdit, ModelSource, PruningPlan
from prunus.core.testing.graphs import mlp_graph, residual_graph

SOURCE = ModelSource(name="simulated")


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_removals_accumulate_in_the_coordinates_of_the_original(data: st.DataObject) -> None:
    graph = mlp_graph([4, 9, 7, 3])
    plan = PruningPlan.begin(SOURCE, graph, {})
    now, left = graph, {n: np.arange(u) for n, u in graph.units.items()}
    for _ in range(3):
        keep = {n: sorted(data.draw(st.sets(st.integers(0, u - 1), min_size=1))) for n, u in now.units.items()}
        plan = plan.after_removal(now, keep)
        now = now.restrict(keep)
        left = {n: left[n][keep[n]] for n in left}
    assert plan.keep == {n: u.tolist() for n, u in left.items()}
    wanted = graph.kept_indices(left)
    got = {axis: i for axis, i in plan.indices().items() if len(i) != graph.tensors[axis[0]][axis[1]]}
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[axis], wanted[axis]) for axis in wanted)


def test_a_plan_survives_json() -> None:
    graph = mlp_graph([4, 9, 3])
    plan = PruningPlan.begin(SOURCE, graph, {"seed": 1}).after_removal(graph, {"h0": [1, 5]})
    text = plan.model_dump_json(by_alias=True)
    assert '"schema":1' in text
    assert PruningPlan.model_validate_json(text) == plan


def test_growth_then_removal_replays_by_original_indices() -> None:
    graph = mlp_graph([4, 5, 3])
    wider, growth = graph.widen({"h0": 8}, seed=1)
    plan = PruningPlan.begin(SOURCE, graph, {}).after_growth(graph, growth).after_removal(wider, {"h0": [0, 6, 7]})
    assert plan.grow == {"h0": 8}
    assert plan.keep["h0"] == [0, 6, 7]
    assert plan.indices()["fc0.weight", 0].tolist() == [0, *growth.copies["h0"][1:].tolist()]


@pytest.mark.parametrize("kept", [[1, 3], [0, 1]])  # a prefix looks like a whole group
def test_growing_after_a_removal_is_refused(kept: list[int]) -> None:
    graph = mlp_graph([4, 5, 3])
    smaller = graph.restrict({"h0": kept})
    _, growth = smaller.widen({"h0": 4})
    plan = PruningPlan.begin(SOURCE, graph, {}).after_removal(graph, {"h0": kept})
    with pytest.raises(PlanError, match="before anything is removed"):
        plan.after_growth(smaller, growth)


def test_attribute_edits_keep_the_first_old_and_the_last_new_value() -> None:
    graph = mlp_graph([4, 9, 3])
    plan = PruningPlan.begin(SOURCE, graph, {})
    plan = plan.after_removal(graph, {"h0": range(6)}, [AttributeEdit(module="m", attribute="n", old=9, new=6)])
    graph = graph.restrict({"h0": range(6)})
    plan = plan.after_removal(graph, {"h0": range(2)}, [AttributeEdit(module="m", attribute="n", old=6, new=2)])
    assert [(e.old, e.new) for e in plan.attributes] == [(9, 2)]


@pytest.mark.parametrize(
    "bad",
    [
        {"keep": {"h0": [2, 1]}},
        {"keep": {"h0": [-1]}},
        {"axes": {"w": {0: [0, 2, 3]}}},
        {"axes": {"w": {0: [3, 1]}}},
        {"schema": 2},
        {"surprise": 1},
    ],
)
def test_a_plan_that_makes_no_sense_is_not_read(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruningPlan.model_validate({"schema": 1, "model": {"name": "m"}, **bad})


def test_removed_blocks_are_remembered_in_order_and_their_groups_stay_as_they_were() -> None:
    graph = residual_graph(8, [6, 4])
    plan = PruningPlan.begin(SOURCE, graph, {})
    plan = plan.after_removal(graph, {"inner1": [0, 2]}, blocks=("block1",))
    graph = graph.restrict({"inner1": [0, 2]}).without_blocks(["block1"])
    plan = plan.after_removal(graph, {"stream": [1, 2, 5]}, blocks=("block0",))
    assert plan.removed_blocks == ["block1", "block0"]
    assert plan.keep["inner1"] == [0, 2] and plan.keep["stream"] == [1, 2, 5]
    assert PruningPlan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan
    with pytest.raises(PlanError, match="no block 'block1'"):
        plan.after_removal(graph.without_blocks(["block0"]), {}, blocks=("block1",))
    with pytest.raises(PlanError, match="before anything is removed"):
        plan.check_growable()


def test_a_plan_from_before_blocks_is_read() -> None:
    plan = PruningPlan.model_validate({"schema": 1, "model": {"name": "m"}, "keep": {"a": [0]}})
    assert plan.removed_blocks == []

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.core.blocks import Block
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.testing.graphs import mlp_graph, residual_graph


def shuffled_graph() -> ChannelGraph:
    """A channel shuffle over two groups of three, a flattening of 2 positions, and a constant column."""
    units = np.arange(6)
    reads = np.append(np.repeat(units.reshape(2, 3).T.ravel(), 2), -1)
    group = ChannelGroup(
        "conv", 6, (Slice("conv.weight", 0, "writes", units), Slice("fc.weight", 1, "reads", reads))
    )
    return ChannelGraph([group], [], {"conv.weight": (6, 4), "fc.weight": (5, 13)})


def test_kept_indices_follow_shuffle_and_flattening() -> None:
    kept = shuffled_graph().kept_indices({"conv": [0, 4]})
    assert kept["conv.weight", 0].tolist() == [0, 4]
    assert kept["fc.weight", 1].tolist() == [0, 1, 6, 7, 12]


def test_axes_that_lose_nothing_are_not_named() -> None:
    assert shuffled_graph().kept_indices({"conv": list(range(6))}) == {}


def test_an_index_of_two_groups_stays_while_both_its_units_stay() -> None:
    heads, dims = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    graph = ChannelGraph(
        [
            ChannelGroup("heads", 3, (Slice("q", 0, "writes", heads),)),
            ChannelGroup("dims", 4, (Slice("q", 0, "writes", dims),)),
        ],
        [],
        {"q": (12, 5)},
    )
    assert graph.kept_indices({"heads": [0, 2], "dims": [1, 3]})["q", 0].tolist() == [1, 3, 9, 11]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_restricting_twice_is_restricting_once(data: st.DataObject) -> None:
    graph = residual_graph(8, [6, 10])
    first = {n: sorted(data.draw(st.sets(st.integers(0, u - 1), min_size=2))) for n, u in graph.units.items()}
    once = graph.restrict(first)
    second = {n: sorted(data.draw(st.sets(st.integers(0, u - 1), min_size=1))) for n, u in once.units.items()}
    both = {n: [first[n][i] for i in second[n]] for n in first}
    direct, chained = graph.restrict(both), once.restrict(second)
    assert direct.fingerprint == chained.fingerprint
    assert direct.tensors == chained.tensors
    assert direct.cost() == graph.cost({n: len(u) for n, u in both.items()})


@pytest.mark.parametrize(
    ("keep", "rule"),
    [
        ({"nothing": [0]}, "unknown channel group"),
        ({"h0": [0, 0]}, "twice"),
        ({"h0": [8]}, "0..7"),
        ({"h0": []}, "smallest allowed"),
        ({"h1": [0, 1, 2]}, "multiple of 2"),
        ({"h2": [0, 1]}, "locked"),
    ],
)
def test_a_broken_keep_names_the_rule(keep: dict[str, list[int]], rule: str) -> None:
    graph = mlp_graph([4, 8, 8, 8, 2], h1={"multiple_of": 2}, h2={"locked": "the output"})
    with pytest.raises(PlanError, match=rule):
        graph.check_keep(keep)


def test_unequal_counts_of_tied_groups_are_refused() -> None:
    graph = mlp_graph([4, 8, 8, 2], h0={"equal_count": "n"}, h1={"equal_count": "n"})
    with pytest.raises(PlanError, match="equal counts"):
        graph.check_keep({"h0": [0, 1], "h1": [0]})


def test_floors_are_a_share_and_at_least_two_of_eight() -> None:
    graph = mlp_graph([4, 100, 8, 4, 2]).with_floors(0.05)
    assert [g.min_kept for g in graph.groups.values()] == [5, 2, 1]


def test_kept_counts_are_multiples_of_channels_and_groups_of_fewer_keep_all() -> None:
    graph = mlp_graph([4, 40, 16, 6, 2]).with_floors(0.05, 16)
    assert [(g.multiple_of, g.min_kept) for g in graph.groups.values()] == [(16, 16), (16, 16), (16, 6)]


def test_of_units_with_several_channels_so_many_stay_that_their_channels_are_a_multiple() -> None:
    def heads(size: int) -> ChannelGroup:
        unit_of = np.repeat(np.arange(6), size)
        return ChannelGroup(f"h{size}", 6, (Slice("w", 0, "writes", unit_of),))

    graph = ChannelGraph([heads(64), heads(8), heads(12)], (), {"w": (384,)}).with_floors(0.05, 32)
    assert [g.multiple_of for g in graph.groups.values()] == [1, 4, 8]


@given(st.integers(1, 20), st.integers(0, 3))
def test_widening_copies_existing_units_and_keeps_the_old_ones_first(extra: int, seed: int) -> None:
    graph = residual_graph(8, [6])
    wider, growth = graph.widen({"inner0": 6 + extra}, seed=seed)
    assert wider.units == {"stream": 8, "inner0": 6 + extra}
    assert growth.sources["block0.conv1.weight", 0][:6].tolist() == list(range(6))
    assert np.bincount(growth.copies["inner0"], minlength=6).max() <= -(-extra // 6)
    assert wider.cost() == graph.cost({"stream": 8, "inner0": 6 + extra})


def test_shrinking_by_widen_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot grow"):
        residual_graph(8, [6]).widen({"inner0": 5})


def test_fingerprints_tell_graphs_apart() -> None:
    assert mlp_graph([4, 8, 2]).fingerprint == mlp_graph([4, 8, 2]).fingerprint
    assert mlp_graph([4, 8, 2]).fingerprint != mlp_graph([4, 8, 2], h0={"multiple_of": 2}).fingerprint


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_without_blocks_is_the_graph_of_the_network_that_never_had_them(data: st.DataObject) -> None:
    inner = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    graph = residual_graph(8, inner)
    gone = data.draw(st.sets(st.sampled_from(sorted(graph.blocks))))
    left = graph.without_blocks(gone)
    never = residual_graph(8, [units for k, units in enumerate(inner) if f"block{k}" not in gone])
    assert left.cost() == never.cost()
    assert sorted(left.tensors.values()) == sorted(never.tensors.values())
    assert sorted(left.units.values()) == sorted(never.units.values())
    assert set(left.blocks) == set(graph.blocks) - gone


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_blocks_and_units_can_go_in_either_order(data: st.DataObject) -> None:
    graph = residual_graph(8, [6, 10, 4])
    keep = {n: sorted(data.draw(st.sets(st.integers(0, u - 1), min_size=1))) for n, u in graph.units.items()}
    gone = data.draw(st.sets(st.sampled_from(sorted(graph.blocks))))
    after = graph.without_blocks(gone)
    units_last = after.restrict({name: units for name, units in keep.items() if name in after.groups})
    units_first = graph.restrict(keep).without_blocks(gone)
    assert units_first.fingerprint == units_last.fingerprint
    assert units_first.tensors == units_last.tensors


def test_an_inner_block_goes_with_the_outer_one() -> None:
    graph = residual_graph(8, [6])
    first, second = "block0.conv1.weight", "block0.conv2.weight"
    outer, inner = (
        Block("outer", frozenset({first, second}), frozenset()),
        Block("in", frozenset({first}), frozenset()),
    )
    nested = ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, [outer, inner])
    assert list(nested.without_blocks(["outer"]).blocks) == []
    assert list(nested.without_blocks(["in"]).blocks) == ["outer"]


def test_what_is_no_block_cannot_be_left_out() -> None:
    with pytest.raises(PlanError, match="no block 'stem'"):
        residual_graph(8, [6]).without_blocks(["stem"])

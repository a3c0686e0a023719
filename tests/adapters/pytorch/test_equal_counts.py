"""Constraints that conflicts put on a graph."""

from __future__ import annotations

import numpy as np
import pytest

from prunus.adapters.pytorch.attributes import Conflict
from prunus.adapters.pytorch.equal_counts import reconcile, with_locks
from prunus.adapters.pytorch.size_algebra import Attribute, Polynomial
from prunus.core.cost import Extent
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice

WHERE = Attribute("block.attn", "dim")


def _graph(**units: int) -> ChannelGraph:
    groups = [ChannelGroup(n, u, (Slice(f"{n}.weight", 0, "writes", np.arange(u)),)) for n, u in units.items()]
    return ChannelGraph(groups, [], {f"{n}.weight": (u,) for n, u in units.items()})


def _product(*groups: str, coefficient: int = 1) -> Polynomial:
    return Polynomial.from_extent(Extent(0, ((coefficient, groups),)))


def test_one_number_for_two_groups_ties_their_counts() -> None:
    graph = reconcile(_graph(a=8, b=8), [Conflict(WHERE, (_product("a"), _product("b")))])
    graph.check_keep({"a": [0, 1], "b": [5, 7]})
    with pytest.raises(PlanError, match="equal counts"):
        graph.check_keep({"a": [0, 1], "b": [5]})


def test_ties_join_into_one_set() -> None:
    conflicts = [
        Conflict(WHERE, (_product("a"), _product("b"))),
        Conflict(Attribute("x", "y"), (_product("c"), _product("d"))),
        Conflict(Attribute("x", "z"), (_product("b"), _product("c"))),
    ]
    (names,) = reconcile(_graph(a=8, b=8, c=8, d=8, e=8), conflicts).equal_counts.values()
    assert set(names) == set("abcd")


def test_products_need_only_their_differing_factors_to_agree() -> None:
    graph = reconcile(_graph(h=4, d=8, e=8), [Conflict(WHERE, (_product("h", "d"), _product("h", "e")))])
    assert graph.groups["h"].equal_count is None
    assert graph.groups["d"].equal_count == graph.groups["e"].equal_count is not None


@pytest.mark.parametrize(
    "wanted",
    [
        (_product("a"), Polynomial.constant(8)),
        (_product("a"), _product("a", "b")),
        (_product("a", coefficient=2), _product("b")),
    ],
)
def test_what_equal_counts_cannot_reconcile_is_locked_with_the_attributes_name(
    wanted: tuple[Polynomial, Polynomial],
) -> None:
    graph = reconcile(_graph(a=8, b=8, c=8), [Conflict(WHERE, wanted)])
    reason = graph.groups["a"].locked
    assert reason is not None and "block.attn.dim" in reason
    assert graph.groups["c"].locked is None


def test_groups_of_other_sizes_cannot_be_tied() -> None:
    graph = reconcile(_graph(a=8, b=16), [Conflict(WHERE, (_product("a"), _product("b")))])
    assert not graph.prunable


def test_a_lock_takes_everything_tied_to_it_along() -> None:
    tied = reconcile(_graph(a=8, b=8, c=8), [Conflict(WHERE, (_product("a"), _product("b")))])
    locked = with_locks(tied, {"a": "because"})
    assert locked.groups["a"].locked == "because"
    assert "because" in (locked.groups["b"].locked or "")
    assert list(locked.prunable) == ["c"]
    assert not locked.equal_counts

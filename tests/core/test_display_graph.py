"""What `inspect` prints: repeated blocks in one line, every lock with its reason, and what each group can save."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from prunus.core.adapter import Description
from prunus.core.blocks import Block
from prunus.core.cost import CostTerm, Extent
from prunus.core.display_graph import graph_tables
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.kernels import Kernel
from prunus.core.testing.graphs import residual_graph


def _graph(locked: dict[int, str]) -> ChannelGraph:
    groups, terms, tensors = [], [], {}
    for number in range(6):
        name = f"blocks.{number}.fc.weight"
        groups.append(
            ChannelGroup(name, 10, (Slice(name, 0, "writes", np.arange(10)),), locked=locked.get(number))
        )
        tensors[name] = (10, 4)
        terms.append(CostTerm("macs", name, 4, (Extent(0, ((1, (name,)),)),)))
    return ChannelGraph(groups, terms, tensors)


def _printed(graph: ChannelGraph, slices: bool = False) -> str:
    console = Console(file=io.StringIO(), width=160)
    description = Description("some/model", (3, 8, 8), None, "none", {}, "cpu", {})
    console.print(graph_tables(description, graph, slices))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_groups_that_differ_in_the_number_of_their_block_share_a_line() -> None:
    text = _printed(_graph({}))
    assert "6 channel groups, 6 can shrink" in text
    assert "blocks.0-5.fc.weight" in text
    assert "90.0%" in text  # one unit of ten stays in each


def test_a_locked_block_stands_apart_and_the_reason_names_it() -> None:
    reason = "its entries are taken apart by position in blocks.{}.fc (Linear)"
    text = _printed(_graph({1: reason.format(1), 2: reason.format(2), 4: "model output"}))
    assert "blocks.0,3,5.fc.weight" in text
    assert "by position in blocks.1-2.fc (Linear)" in text
    assert "by position in blocks.*.fc (Linear)" in text
    assert text.count("model output") == 2


def test_with_slices_every_group_has_its_own_line() -> None:
    text = _printed(_graph({}), slices=True)
    for number in range(6):
        assert f"blocks.{number}.fc.weight[0] writes" in text


def test_blocks_that_can_go_are_named_together_with_what_they_save() -> None:
    graph = _graph({})
    blocks = [Block(f"blocks.{n}", frozenset({f"blocks.{n}.fc.weight"}), frozenset()) for n in (1, 2, 3)]
    text = _printed(ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, blocks))
    assert "3 residual blocks can go as a whole (iterative --depth), with 50.0% of the MACs: blocks.1-3." in text


def test_kernels_that_can_be_reduced_are_counted_with_what_they_save() -> None:
    graph = residual_graph(8, [6, 4])
    kernels = [Kernel("block0.conv1", "block0.conv1.weight", 3, ("kernel",)), Kernel("stem", "stem.weight", 3)]
    text = _printed(graph.with_kernels(kernels))
    whole = graph.cost().macs
    share = 8 / 9 * 9 * 64 * (6 * 8 + 3 * 8) / whole
    assert f"2 kernels can become 1 x 1 (gsm-anneal, layers=kernels), with {share:.1%} of the MACs; 1 can" in text

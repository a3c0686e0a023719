"""What `optimize inspect` shows: groups by stage, locks with their reasons, and how far one can go."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prunus.core.adapter import Description
from prunus.core.allocation import reachable
from prunus.core.display import human
from prunus.core.graph import ChannelGraph


def graph_tables(description: Description, graph: ChannelGraph, slices: bool) -> RenderableType:
    """The model in one line, its groups (and their tensors, with `slices`), its locks, its reach."""
    cost, shares = graph.cost(), reachable(graph)
    size = "x".join(str(n) for n in description.input_size)
    head = f"{description.model}: input {size}, {human(cost.macs)} MACs, {human(cost.params)} parameters"
    reach = f"Reachable: {shares['macs']:.1%} of the MACs, {shares['params']:.1%} of the parameters."
    parts: list[RenderableType] = [Text(head, style="bold"), _groups(graph, slices)]
    locks = _locks(graph)
    if locks is not None:
        parts.append(locks)
    if graph.blocks:
        parts.append(Text(_blocks(graph)))
    if graph.kernels:
        parts.append(Text(_kernels(graph)))
    parts += [Text(f"note: {note}", style="yellow") for note in description.notes]
    return Group(*parts, Text(reach))


def _groups(graph: ChannelGraph, slices: bool) -> Table:
    title = f"{len(graph.groups)} channel groups, {len(graph.prunable)} can shrink"
    table = Table(title=title, title_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("units", "at least", "step", "MACs", "tensors"):
        table.add_column(column, justify="right")
    table.add_column("locked", overflow="fold")
    dense = graph.cost().macs or 1.0
    for names in _alike(graph, fold=not slices):
        group = graph.groups[names[0]]
        saved = sum(1 - graph.cost({name: graph.groups[name].min_kept}).macs / dense for name in names)
        tensors = {piece.tensor for piece in group.slices}
        shown = "\n".join(f"{s.tensor}[{s.axis}] {s.role}" for s in group.slices) if slices else str(len(tensors))
        table.add_row(
            _together(names, names[0]),
            str(group.units),
            str(group.min_kept),
            str(group.multiple_of),
            f"{saved:.1%}" if group.locked is None else "",
            shown,
            Text(_together(names, group.locked or ""), style="red"),
        )
    table.caption = "MACs: what these groups alone can save, at the least number of units each."
    table.caption_justify = "left"
    return table


def _kernels(graph: ChannelGraph) -> str:
    whole, rest = graph.cost().macs or 1.0, graph.without_kernels(graph.kernels).cost().macs
    branching = sum(bool(kernel.branches) for kernel in graph.kernels.values())
    return (
        f"{len(graph.kernels)} kernels can become 1 x 1 (gsm-anneal, layers=kernels), with {1 - rest / whole:.1%} "
        f"of the MACs; {branching} can be searched in branches (expansion=branches)."
    )


def _blocks(graph: ChannelGraph) -> str:
    whole, rest = graph.cost().macs or 1.0, graph.without_blocks(graph.blocks).cost().macs
    return (
        f"{len(graph.blocks)} residual blocks can go as a whole (iterative --depth), with {1 - rest / whole:.1%} "
        f"of the MACs: {', '.join(_folded(graph.blocks))}."
    )


def _folded(names: Iterable[str]) -> list[str]:
    """Names that differ in their last number alone, together."""
    found: dict[str, list[str]] = {}
    for name in names:
        head, _, tail = name.rpartition(".")
        stem = tail.rstrip("0123456789")
        found.setdefault(f"{head}.{stem}", []).append(tail[len(stem) :])
    return [stem + (_ranges(int(n) for n in numbers) if all(numbers) else "") for stem, numbers in found.items()]


def _locks(graph: ChannelGraph) -> Table | None:
    """Reasons by how many groups they lock; places that differ in a number, or in nothing, count as one."""
    locked = {name: group.locked for name, group in graph.groups.items() if group.locked is not None}
    if not locked:
        return None
    table = Table(title="Why groups are locked", title_justify="left")
    table.add_column("groups", justify="right")
    table.add_column("reason", overflow="fold")
    for reason, count in Counter(_NUMBER.sub("*", reason) for reason in locked.values()).most_common():
        table.add_row(str(count), Text(reason))
    return table


_NUMBER = re.compile(r"(?<=\.)\d+(?=[.\s])|\b\d+(?=\.[a-z])")
"""The number of a block or layer within a path: blocks.7.attn."""


def _alike(graph: ChannelGraph, fold: bool) -> list[list[str]]:
    """The names of groups that differ in the number of their block alone, together."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for name, group in graph.groups.items():
        head, _, tail = _split(name)
        reason = (group.locked or "").replace(name.removesuffix(tail) + ".", f"{head}*.")
        sizes = group.units, group.min_kept, group.multiple_of, len(group.slices)
        key = (head, tail, sizes, reason) if fold else (name,)
        rows.setdefault(key, []).append(name)
    return list(rows.values())


def _split(name: str) -> tuple[str, str, str]:
    """`blocks.7.attn.qkv.weight` -> (`blocks.`, `7`, `.attn.qkv.weight`): around the last number of the path."""
    found = list(_NUMBER.finditer(name))
    if not found:
        return name, "", ""
    return name[: found[-1].start()], found[-1].group(), name[found[-1].end() :]


def _together(names: Sequence[str], text: str) -> str:
    """`text`, which is about the first of `names`, as one about all of them."""
    head, number, _ = _split(names[0])
    if len(names) == 1:
        return text
    return text.replace(f"{head}{number}.", f"{head}{_ranges(int(_split(name)[1]) for name in names)}.")


def _ranges(numbers: Iterable[int]) -> str:
    """3, 4, 5, 9 -> `3-5,9`"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

"""What `optimize inspect` shows: groups by stage, locks with their reasons, and how far one can go."""

from __future__ import annotations

from collections import Counter

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
    parts += [Text(f"note: {note}", style="yellow") for note in description.notes]
    return Group(*parts, Text(reach))


def _groups(graph: ChannelGraph, slices: bool) -> Table:
    table = Table(title=f"{len(graph.groups)} channel groups", title_justify="left")
    table.add_column("group", overflow="fold")
    for column in ("units", "at least", "step", "tensors"):
        table.add_column(column, justify="right")
    table.add_column("locked", overflow="fold")
    for name, group in graph.groups.items():
        tensors = {piece.tensor for piece in group.slices}
        shown = "\n".join(f"{s.tensor}[{s.axis}] {s.role}" for s in group.slices) if slices else str(len(tensors))
        reason = Text(group.locked or "", style="red")
        table.add_row(name, str(group.units), str(group.min_kept), str(group.multiple_of), shown, reason)
    return table


def _locks(graph: ChannelGraph) -> Table | None:
    reasons = Counter(group.locked for group in graph.groups.values() if group.locked is not None)
    if not reasons:
        return None
    table = Table(title="Why groups are locked", title_justify="left")
    table.add_column("groups", justify="right")
    table.add_column("reason", overflow="fold")
    for reason, count in reasons.most_common():
        table.add_row(str(count), reason)
    return table

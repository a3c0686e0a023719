"""Which units stay: an exact search over the cost model for the counts that meet a budget.

Every set of groups that must keep equal counts climbs its own ladder of allowed counts (floor, multiples,
all). A step of a ladder has a value: the mean score of the units it adds. Steps are taken in the order of
their value while the budget holds, so the search is a bisection over the length of that prefix, followed
by a fill with whatever later steps still fit. Costs rise with every count, which makes both exact: no
step that was refused could fit later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunus.core.budget import Budget, Target
from prunus.core.cost import FloatArray, IntArray, Quantity
from prunus.core.errors import PlanError, UnreachableTargetError
from prunus.core.graph import ChannelGraph

CLOSE = 0.99
"""A plan below this share of the binding limit is searched further."""
_EVALUATIONS = 2000
"""At most about so many candidates are costed in that further search."""


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """Groups that keep equal counts, and the counts they may keep."""

    groups: tuple[str, ...]
    columns: IntArray
    """Positions of the groups in the cost model's vectors."""
    counts: IntArray
    """Allowed counts, ascending; the last one is everything."""


def ladders(graph: ChannelGraph) -> tuple[Ladder, ...]:
    """Every group in exactly one ladder, in the order of the graph."""
    column = {name: i for i, name in enumerate(graph.groups)}
    found = []
    for name, group in graph.groups.items():
        tied = (name,) if group.equal_count is None else graph.equal_counts[group.equal_count]
        if tied[0] != name:
            continue
        members = [graph.groups[n] for n in tied]
        units = min(g.units for g in members)
        step = math.lcm(*(g.multiple_of for g in members))
        floor = -(-max(g.min_kept for g in members) // step) * step
        if any(g.locked is not None for g in members):
            floor = units
        counts = np.unique(np.append(np.arange(floor, units, step), units)).astype(np.int64)
        found.append(Ladder(tied, np.array([column[n] for n in tied], dtype=np.int64), counts))
    return tuple(found)


def smallest_counts(graph: ChannelGraph) -> dict[str, int]:
    """The fewest units that every group may keep."""
    return {name: int(ladder.counts[0]) for ladder in ladders(graph) for name in ladder.groups}


def reachable(graph: ChannelGraph) -> dict[Quantity, float]:
    """The smallest reachable share of every quantity, 0..1 of the graph's full cost."""
    return graph.cost(smallest_counts(graph)).share_of(graph.cost())


def raise_if_unreachable(graph: ChannelGraph, budget: Budget) -> None:
    """Raise UnreachableTargetError, in the target's own unit, if no allowed plan meets the budget."""
    counts = smallest_counts(graph)
    least = graph.cost(counts)
    for target in budget.targets:
        whole = float(getattr(budget.dense, target.quantity))
        limit = target.amount if target.share is None else target.share * whole
        smallest = float(getattr(least, target.quantity))
        if limit is not None and smallest > limit * (1 + 1e-12):
            raise UnreachableTargetError(target.text, _in_unit_of(target, smallest, whole), _why(graph))


def global_keep(graph: ChannelGraph, budget: Budget, scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
    """The units with the highest scores in the whole network that meet the budget.

    `scores`: group -> (units,), on one scale, for every group that can shrink. Returns the kept units of
    every group, ascending. Among equal scores the lower index stays. Raises UnreachableTargetError.
    """
    rungs = ladders(graph)
    orders = _orders(graph, rungs, scores)
    values = [_step_values(ladder, orders, scores) for ladder in rungs]
    return _kept(graph, rungs, _climb(graph, budget, rungs, values), orders)


def uniform_keep(graph: ChannelGraph, budget: Budget, scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
    """The same share of every group that can shrink, as near as floors and multiples allow.

    Scores choose inside each group only. Returns and raises as `global_keep`.
    """
    rungs = ladders(graph)
    orders = _orders(graph, rungs, scores)
    values = [-(ladder.counts[:-1] + ladder.counts[1:]) / (2.0 * ladder.counts[-1]) for ladder in rungs]
    return _kept(graph, rungs, _climb(graph, budget, rungs, values), orders)


def best_units(scores: FloatArray, count: int) -> IntArray:
    """The `count` units with the highest scores, ascending; among equals the lower index stays."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def mean_normalised(scores: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Scores divided by the mean magnitude of their group, which makes groups comparable (methods, 2.2)."""
    normalised = {}
    for name, values in scores.items():
        mean = float(np.abs(values).mean()) if len(values) else 0.0
        normalised[name] = values / mean if mean > 0 else np.zeros_like(values)
    return normalised


def _orders(graph: ChannelGraph, rungs: Sequence[Ladder], scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
    """For every group that can shrink: its units, best first."""
    orders = {}
    for ladder in rungs:
        if len(ladder.counts) == 1:
            continue
        for name in ladder.groups:
            units = graph.groups[name].units
            if name not in scores:
                raise PlanError(f"group {name!r} has no scores", group=name)
            values = np.asarray(scores[name], dtype=np.float64)
            if values.shape != (units,):
                raise PlanError(f"group {name!r}: scores have shape {values.shape}, not ({units},)", group=name)
            if not np.isfinite(values).all():
                raise PlanError(
                    f"group {name!r}: {int((~np.isfinite(values)).sum())} scores are not finite", group=name
                )
            orders[name] = np.argsort(-values, kind="stable")
    return orders


def _step_values(ladder: Ladder, orders: Mapping[str, IntArray], scores: Mapping[str, FloatArray]) -> FloatArray:
    """(steps,): mean score of the units that each step adds, over all tied groups; never increasing."""
    if len(ladder.counts) == 1:
        return np.zeros(0)
    ranked = np.mean([np.asarray(scores[name])[orders[name]] for name in ladder.groups], axis=0)
    added = np.add.reduceat(ranked, ladder.counts[:-1])
    return np.asarray(added / np.diff(ladder.counts), dtype=np.float64)


@dataclass(slots=True, eq=False)
class _Search:
    """A position on all ladders at once."""

    graph: ChannelGraph
    budget: Budget
    rungs: Sequence[Ladder]

    def counts(self, levels: IntArray) -> FloatArray:
        counts = np.empty(len(self.graph.groups))
        for ladder, level in zip(self.rungs, levels, strict=True):
            counts[ladder.columns] = ladder.counts[level]
        return counts

    def load(self, levels: IntArray) -> float:
        return self.budget.load(self.graph.cost_model.at(self.counts(levels)))

    def fits(self, levels: IntArray) -> bool:
        return self.budget.met(self.graph.cost_model.at(self.counts(levels)))

    def fill(self, levels: IntArray, owners: IntArray, closed: frozenset[int] = frozenset()) -> IntArray:
        """Take the steps of `owners` (ladders, in order of value) that still fit, none of a closed ladder."""
        levels = levels.copy()
        shut = set(closed)
        for owner in owners:
            if owner in shut:
                continue
            levels[owner] += 1
            if not self.fits(levels):
                levels[owner] -= 1
                shut.add(int(owner))
                if len(shut) == len(self.rungs):
                    break
        return levels


def _climb(
    graph: ChannelGraph, budget: Budget, rungs: Sequence[Ladder], values: Sequence[FloatArray]
) -> dict[str, int]:
    """The best counts within the budget when steps are taken in the order of their value."""
    raise_if_unreachable(graph, budget)
    owner = np.repeat(np.arange(len(rungs)), [len(v) for v in values])
    value = np.concatenate([*values, np.zeros(0)])
    # stable: among equal values, earlier groups and lower steps go first
    order = owner[np.argsort(-value, kind="stable")]
    search = _Search(graph, budget, rungs)

    def prefix(length: int) -> IntArray:
        return np.bincount(order[:length], minlength=len(rungs)).astype(np.int64)

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if search.fits(prefix(middle)) else (low, middle - 1)
    best = search.fill(prefix(low), order[low:])
    if low < len(order) and search.load(best) < CLOSE:
        best = _exchanged(search, best, order, prefix(low))
    counts = search.counts(best)
    return {name: int(n) for name, n in zip(graph.groups, counts, strict=True)}


def _exchanged(search: _Search, best: IntArray, order: IntArray, start: IntArray) -> IntArray:
    """Where steps are coarse: give up the last step of one ladder and fill with others, if that gets closer."""
    height = _heights(order, len(search.rungs))
    load = search.load(best)
    last = [int(owner) for owner in dict.fromkeys(order[::-1].tolist()) if start[owner] > 0]
    for owner in last[: max(1, _EVALUATIONS // len(search.rungs))]:
        levels = best.copy()
        levels[owner] -= 1
        levels = search.fill(levels, order[height >= levels[order]], frozenset({owner}))
        reached = search.load(levels)
        if reached > load:
            best, load = levels, reached
        if load >= CLOSE:
            break
    return best


def _heights(order: IntArray, rungs: int) -> IntArray:
    """The level from which each step of `order` starts on its own ladder."""
    heights = np.empty(len(order), dtype=np.int64)
    for owner in range(rungs):
        mine = np.flatnonzero(order == owner)
        heights[mine] = np.arange(len(mine))
    return heights


def _kept(
    graph: ChannelGraph, rungs: Sequence[Ladder], counts: Mapping[str, int], orders: Mapping[str, IntArray]
) -> dict[str, IntArray]:
    keep = {}
    for ladder in rungs:
        for name in ladder.groups:
            everything = np.arange(graph.groups[name].units, dtype=np.int64)
            chosen = orders[name][: counts[name]] if name in orders else everything
            keep[name] = np.sort(chosen).astype(np.int64)
    return keep


def _in_unit_of(target: Target, amount: float, whole: float) -> str:
    """`amount` as the user wrote the target, rounded up so that the figure itself can be reached."""
    if target.share is not None:
        return f"{target.metric}={math.ceil(amount / whole * 1000) / 10:g}%"
    match = re.fullmatch(r"[a-z]+=([0-9.]+(?:e[0-9]+)?)([A-Za-z]*)", target.text)
    if match is None or target.amount is None:
        return f"{target.metric}={math.ceil(amount)}"
    number = amount / (target.amount / float(match[1]))
    digits = max(0, 3 - len(str(int(number))))
    return f"{target.metric}={_plain(math.ceil(number * 10**digits) / 10**digits)}{match[2]}"


def _plain(number: float) -> str:
    """Digits alone: what a target is read from has no 1e+06."""
    return f"{number:.3f}".rstrip("0").rstrip(".")


def _why(graph: ChannelGraph) -> str:
    locked = [name for name, group in graph.groups.items() if group.locked is not None]
    floors = f"{len(graph.groups) - len(locked)} of {len(graph.groups)} groups are at their smallest allowed width"
    return f"{floors}, {len(locked)} are locked" if locked else floors

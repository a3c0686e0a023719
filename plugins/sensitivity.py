"""What a group's discrepancy is worth: loss on the hold-out per unit of discrepancy.

A discrepancy is relative to the output of the readers at hand, and layers differ in how much the network's
loss depends on that output (a branch that adds little to its residual stream, a last layer). So every group
is tried once alone: most of its units are removed greedily, the network is refitted, and

    k_g = max(rise of the held-out loss, 0) / sum of the discrepancies of the removed units

relative to the median of all groups. Multiplying D by k raised accuracy after pruning, without training,
by 0.1 / 0.4 points at 50 / 25% of the MACs (benchmarks/results/bayes_reparam.md).

That is asked of the whole network, each group alone. Where the search ends, groups are narrow together, and it
should not matter any more which of them gives up the next unit. So the widths that the search would choose are
tried, every group there a little narrower, and what costs more loss per saving than the others weighs more when
the search decides again (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from pydantic import Field

from prunus.core.allocation import Ladder, best_units, ladders
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Directive, Evaluate, Note, Observation
from prunus.core.errors import PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.policy import PruningTask
from prunus.plugins.discrepancy import Discrepancy
from prunus.plugins.recovery import RecoveryConfig, evaluated

Gone = tuple[tuple[str, ...], tuple[str, ...]]
"""(blocks, kernels) that are gone as a whole."""
NONE_GONE: Gone = ((), ())
Trials = Literal["auto", "yes", "no"]
_CHEAP = 2e10
_ENOUGH = 500
"""Held-out images from which on one trial says something. On 143 digits, all but some of which the network
knows, 7 of 12 trials cost no loss at all; a ResNet-20 at a tenth of its MACs lost 17 points by believing them."""
_KEPT = 0.3
"""Of the tried group: few, since what counts is what happens when it gets narrow."""
_WIDEST = 4.0
"""k lies within this factor of the median: the loss of one trial is noisy."""
_NARROWER = 0.25
"""What a group gives up of its width in a trial where the search ended."""
_FARTHEST, _STEP = 3.0, 0.3
"""There, a ratio of losses counts up to this, and to this power: a whole step goes too far and comes back."""
_SWEEPS = 3
_JUDGES = 2048
"""Held-out images that decide between widths, at most."""


class Proposal(Protocol):
    """What a search would choose."""

    @property
    def keep(self) -> Mapping[str, IntArray]:
        """group -> kept units."""
        ...

    @property
    def ranks(self) -> Mapping[str, FloatArray]:
        """group -> (units,): who stays first, for every group that can shrink."""
        ...


P = TypeVar("P", bound=Proposal)


@dataclass(frozen=True, slots=True, eq=False)
class Settled(Generic[P]):
    """Where trials at the end of a search ended."""

    factors: dict[str, float]
    """group -> factor of its units' scores."""
    proposal: P
    loss: float | None
    """Held out; None where there was no trial."""


class TrialConfig(RecoveryConfig):
    """Settings of the trials, shared by the methods that weigh groups by them."""

    sensitivity: Trials = "auto"
    """Weigh groups by what they cost the held-out loss, found by one trial of each group alone; `auto` if there
    are labels, 500 images held out, and trials are cheap (MACs times groups below 2e10)."""
    sweeps: int | None = Field(default=None, ge=0, le=20)
    """How often every group is tried again, together with the others at the widths where the search would end.
    None is 3 where that is cheap (a third of the above, or if `sensitivity` is `yes`), and 0 else."""

    def tries(self, task: PruningTask) -> bool:
        """Whether groups are tried at all."""
        if not task.has_labels or self.sensitivity == "no":
            return False
        return self.sensitivity == "yes" or (_cheap(task, 1) and min(task.held_out or 0, self.images) >= _ENOUGH)

    def trial(self, gone: Gone = NONE_GONE, images: int = _JUDGES) -> Evaluate:
        """How widths are judged beside layers that are gone, by so many held-out images; `within` is to be set."""
        blocks, kernels = gone
        return Evaluate(within={}, blocks=blocks, kernels=kernels, refit=self.refit, images=images)

    def sweeps_of(self, task: PruningTask) -> int:
        """How often groups are tried where the search ends."""
        if self.sweeps is not None:
            return self.sweeps
        cheap = self.sensitivity == "yes" or _cheap(task, _SWEEPS)
        return _SWEEPS if cheap else 0


def _cheap(task: PruningTask, times: int) -> bool:
    return task.graph.cost().macs * len(task.graph.prunable) * times <= _CHEAP


def measure_sensitivity(
    graph: ChannelGraph,
    weights: Mapping[str, FloatArray],
    moments: Mapping[str, FloatArray],
    ridge: float,
    trial: Evaluate,
) -> Generator[Directive, Observation, dict[str, float]]:
    """group -> k, for every group that can shrink; groups that shrink together share theirs.

    Empty where no trial cost anything. `trial`: how a width is judged, but for `within`.
    """
    whole = trial if trial.blocks or trial.kernels else Evaluate(images=trial.images)
    before = evaluated((yield whole)).loss
    found: dict[str, float] = {}
    for ladder in ladders(graph):
        if len(ladder.counts) == 1:
            continue
        alone = _only(graph, ladder)
        count = int(ladder.counts[np.argmin(np.abs(ladder.counts[:-1] - _KEPT * ladder.counts[-1]))])
        keep, lost = _narrowed(ladder, Discrepancy(alone, weights, moments, ridge), count)
        after = evaluated((yield replace(trial, within=keep))).loss
        for name in ladder.groups:
            found[name] = max(after - before, 0.0) / max(lost, 1e-12)
    middle = float(np.median(list(found.values()))) if found else 0.0
    if middle <= 0:
        return {}
    sensitivity = {name: float(np.clip(k / middle, 1 / _WIDEST, _WIDEST)) for name, k in found.items()}
    yield Note("sensitivity", sensitivity)
    return sensitivity


def settle(
    graph: ChannelGraph,
    budget: Budget,
    propose: Callable[[Mapping[str, float]], P],
    factors: Mapping[str, float],
    trial: Evaluate,
    sweeps: int,
) -> Generator[Directive, Observation, Settled[P]]:
    """The factors, and what `propose` makes of them, of the lowest held-out loss.

    `propose` must be a function of the factors alone. Where all groups end with the same loss per saving, nothing
    is to be won by an exchange of units between them. `trial`: how a proposal is judged, but for its widths.
    """
    factors = dict(factors)
    if sweeps == 0:
        return Settled(factors, propose(factors), None)  # there is nothing to compare it with
    outcomes: list[tuple[float, dict[str, float], P]] = []
    for sweep in range(sweeps + 1):
        try:
            proposal = propose(factors)
        except PluginError:
            if not outcomes:
                raise
            break  # what was found before stands
        loss = evaluated((yield replace(trial, within=proposal.keep))).loss
        outcomes.append((loss, dict(factors), proposal))
        yield Note("widths", {"sweep": sweep, "loss": loss, **{n: len(u) for n, u in proposal.keep.items()}})
        if sweep < sweeps:
            slopes = yield from _slopes(graph, budget, proposal, loss, trial)
            middle = float(np.median(list(slopes.values()))) if slopes else 0.0
            if middle <= 0:
                break
            for name, slope in slopes.items():
                ratio = float(np.clip(slope / middle, 1 / _FARTHEST, _FARTHEST))
                factors[name] = factors.get(name, 1.0) * ratio**_STEP
    loss, chosen, proposal = min(outcomes, key=lambda outcome: outcome[0])
    return Settled(chosen, proposal, loss)


def _slopes(
    graph: ChannelGraph, budget: Budget, proposal: Proposal, loss: float, trial: Evaluate
) -> Generator[Directive, Observation, dict[str, float]]:
    """group -> rise of the held-out loss per saving, where it gets narrower than proposed."""
    before = budget.load(graph.cost({name: len(units) for name, units in proposal.keep.items()}))
    found: dict[str, float] = {}
    for ladder in ladders(graph):
        width = len(proposal.keep[ladder.groups[0]])
        lower = ladder.counts[ladder.counts < width]
        if not len(lower):
            continue
        count = int(lower[np.argmin(np.abs(lower - (1 - _NARROWER) * width))])
        keep = dict(proposal.keep) | {name: best_units(proposal.ranks[name], count) for name in ladder.groups}
        saved = before - budget.load(graph.cost({name: len(units) for name, units in keep.items()}))
        if saved > 0:
            rise = evaluated((yield replace(trial, within=keep))).loss - loss
            found |= dict.fromkeys(ladder.groups, rise / saved)
    return found


def _only(graph: ChannelGraph, ladder: Ladder) -> ChannelGraph:
    """The same graph with all other groups locked."""
    groups = [g if n in ladder.groups else replace(g, locked="not tried") for n, g in graph.groups.items()]
    return graph.with_groups(groups)


def _narrowed(ladder: Ladder, discrepancy: Discrepancy, count: int) -> tuple[dict[str, list[int]], float]:
    """(kept units, sum of the discrepancies at their removal) after greedy removal down to `count` units."""
    keep = {name: list(range(int(ladder.counts[-1]))) for name in ladder.groups}
    lost = 0.0
    while len(keep[ladder.groups[0]]) > count:
        for name, units in keep.items():
            scores = discrepancy.of(name)
            unit = min(units, key=lambda u: float(scores[u]))
            lost += float(scores[unit])
            discrepancy.remove(name, unit)
            units.remove(unit)
    return keep, lost

"""What a group's discrepancy is worth: loss on the hold-out per unit of discrepancy.

A discrepancy is relative to the output of the readers at hand, and layers differ in how much the network's
loss depends on that output (a branch that adds little to its residual stream, a last layer). So every group
is tried once alone: most of its units are removed greedily, the network is refitted, and

    k_g = max(rise of the held-out loss, 0) / sum of the discrepancies of the removed units

relative to the median of all groups. Multiplying D by k raised accuracy after pruning, without training,
by 0.1 / 0.4 points at 50 / 25% of the MACs (benchmarks/results/bayes_reparam.md).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from prunus.core.allocation import Ladder, ladders
from prunus.core.cost import FloatArray
from prunus.core.directives import Directive, Evaluate, Note, Observation, Refit
from prunus.core.graph import ChannelGraph
from prunus.core.policy import PruningTask
from prunus.plugins.discrepancy import Discrepancy
from prunus.plugins.recovery import evaluated

Trials = Literal["auto", "yes", "no"]
_CHEAP = 2e10
_ENOUGH = 500
"""Held-out images from which on one trial says something. On 143 digits, all but some of which the network
knows, 7 of 12 trials cost no loss at all; a ResNet-20 at a tenth of its MACs lost 17 points by believing them."""
_KEPT = 0.3
"""Of the tried group: few, since what counts is what happens when it gets narrow."""
_WIDEST = 4.0
"""k lies within this factor of the median: the loss of one trial is noisy."""


def tries(task: PruningTask, wanted: Trials) -> bool:
    """Whether groups are tried: there are labels and, with `auto`, MACs times groups are below 2e10."""
    cheap = task.graph.cost().macs * len(task.graph.prunable) <= _CHEAP
    return task.has_labels and (wanted == "yes" or (wanted == "auto" and cheap))


def measure_sensitivity(
    graph: ChannelGraph,
    weights: Mapping[str, FloatArray],
    moments: Mapping[str, FloatArray],
    ridge: float,
    refit: Refit,
    images: int,
    trials: Trials = "yes",
) -> Generator[Directive, Observation, dict[str, float]]:
    """group -> k, for every group that can shrink; groups that shrink together share theirs.

    Empty where no trial cost anything, and with `auto` where fewer than 500 images are held out.
    """
    whole = evaluated((yield Evaluate(images=images)))
    if trials == "auto" and whole.samples < _ENOUGH:
        yield Note("sensitivity-skipped", {"images": whole.samples})
        return {}
    before = whole.loss
    found: dict[str, float] = {}
    for ladder in ladders(graph):
        if len(ladder.counts) == 1:
            continue
        alone = _only(graph, ladder)
        count = int(ladder.counts[np.argmin(np.abs(ladder.counts[:-1] - _KEPT * ladder.counts[-1]))])
        keep, lost = _narrowed(ladder, Discrepancy(alone, weights, moments, ridge), count)
        after = evaluated((yield Evaluate(within=keep, refit=refit, images=images))).loss
        for name in ladder.groups:
            found[name] = max(after - before, 0.0) / max(lost, 1e-12)
    middle = float(np.median(list(found.values()))) if found else 0.0
    if middle <= 0:
        return {}
    sensitivity = {name: float(np.clip(k / middle, 1 / _WIDEST, _WIDEST)) for name, k in found.items()}
    yield Note("sensitivity", sensitivity)
    return sensitivity


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

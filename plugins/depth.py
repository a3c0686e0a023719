"""Removal of whole blocks, one at a time: the one that harms least for what it saves, then the next.

Depth is measured, not foretold: a block's harm is what the model loses with the block's gate at zero, all
else as it is, and it is measured again after every removal, since neighbours take over for each other
(Veit et al., NeurIPS 2016: residual networks behave like ensembles of shallow ones).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

import numpy as np

from prunus.core.budget import Budget
from prunus.core.directives import Directive, Evaluate, Evaluated, Gates, Measure, Observation
from prunus.core.errors import ConfigError, PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.policy import PruningTask
from prunus.core.signals import Signal
from prunus.plugins.layers import streams
from prunus.plugins.ranking import signals_of

BlockScore = Literal["auto", "loss", "change"]
LEAST_HARM = 1e-3
"""Harm below this share of the largest counts as this: among harmless blocks the one that saves most goes."""


def harms(
    task: PruningTask, graph: ChannelGraph, score: BlockScore, images: int
) -> Generator[Directive, Observation, dict[str, float]]:
    """block -> what the model loses without it.

    `loss`: the rise of the held-out loss with the block's gate at zero, on `images` of that part (0 if it
    falls); needs labels. `change`: the energy of what the block adds, as a share of its output's; needs images
    alone. `auto` is `loss` where there are labels.
    """
    if score == "change" or not task.has_labels:
        signals = signals_of((yield Measure(frozenset({Signal.BLOCK_CHANGE}), images=images)))
        return {name: float(signals.read(Signal.BLOCK_CHANGE, name)[0]) for name in graph.blocks}
    base = yield from _loss({}, images)
    found = {}
    for name in graph.blocks:
        found[name] = max((yield from _loss({name: np.zeros(1)}, images)) - base, 0.0)
    return found


def _loss(gates: Gates, images: int) -> Generator[Directive, Observation, float]:
    answer = yield Evaluate(gates=gates, images=images)
    if not isinstance(answer, Evaluated):
        raise PluginError("iterative", "Evaluate is answered by Evaluated", repr(type(answer).__name__))
    return answer.loss


def cheapest(graph: ChannelGraph, budget: Budget, harm: dict[str, float]) -> str:
    """The block with the least harm for what it saves; saving beyond the target is worth nothing."""
    load = budget.load(graph.cost())
    floor = LEAST_HARM * max(max(harm.values()), 1e-12)
    prices = {}
    for name in graph.blocks:
        saved = load - max(budget.load(graph.without_blocks([name]).cost()), 1.0)
        prices[name] = max(harm[name], floor) / max(saved, 1e-12)
    return min(prices, key=lambda name: (prices[name], name))


def spread_blocks(graph: ChannelGraph, share: float) -> tuple[str, ...]:
    """`share` of the residual blocks, evenly from all stages: the last one of the stage that has the most left.

    A stage is what runs through the same channels. For untrained networks: nothing is known of a block yet.
    """
    stages: dict[frozenset[str], list[str]] = {}
    for name, block in graph.blocks.items():
        if block.of is None:
            stages.setdefault(frozenset(streams(graph, name)), []).append(name)
    gone: list[str] = []
    for _ in range(round(share * sum(map(len, stages.values())))):
        gone.append(max(reversed(stages.values()), key=len).pop())
    return tuple(gone)


def check(task: PruningTask, score: BlockScore) -> None:
    """Raises ConfigError if blocks cannot be removed from this model, or not be judged by this run's data."""
    if not task.graph.blocks:
        raise ConfigError("no block of this model passes its input through: none can go whole", key="depth")
    if not task.has_data:
        raise ConfigError("blocks are judged by what they do to images; --data is none", key="depth")
    if score == "loss" and not task.has_labels:
        raise ConfigError("block_score=loss needs labels; use block_score=change", key="block_score")

"""Iterative pruning: rank, remove a little, train a little, again (Molchanov et al., ICLR 2017)."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from prunus.core.directives import Changed, Directive, Note, Observation
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.plugins.depth import BlockScore, cheapest, check, harms
from prunus.plugins.ranking import Scope, choose, rank
from prunus.plugins.recovery import RecoveryConfig, can_train, changed, gentle, recover, removal


class IterativeConfig(RecoveryConfig):
    scope: Scope = "global"
    """`global` ranks all units together; `uniform` removes the same share of every group."""
    rounds: int = Field(default=5, ge=1, le=1000)
    """Rounds, at budgets that fall geometrically from the whole model to the target."""
    between: float = Field(default=0.4, ge=0, le=1)
    """Share of all epochs that is spent between rounds; the rest trains the final model."""
    round_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate between rounds; None is the tail of the recovery's cycle, a fifth of its peak to 0."""
    depth: bool = False
    """Remove whole residual blocks, one at a time, and channels only if blocks alone do not reach the target."""
    block_score: BlockScore = "auto"
    """What a block's removal costs: `loss` closes its gate, `change` is the energy it adds; `auto` is `loss`
    where there are labels."""


class Iterative(PruningPolicy):
    """Rank again after every removal, so that the ranking knows what is gone already."""

    Config: ClassVar[type[PluginConfig]] = IterativeConfig
    needs_estimator: ClassVar[bool] = True

    def check(self, task: PruningTask) -> None:
        config = self.config
        assert isinstance(config, IterativeConfig)
        if config.depth:
            check(task, config.block_score)

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, IterativeConfig)
        between = config.between * task.epochs
        if not config.depth or task.budget.met(task.graph.cost()):
            result = yield from _narrow(task, config, between)
            spent = between if config.rounds > 1 else 0.0
        else:
            result, spent = yield from _shorten(task, config, between)
            if not task.budget.met(result.graph.cost()):
                result = yield from _narrow(replace(task, graph=result.graph), config, 0.0)
        yield from recover(task, config, task.epochs - spent)
        return result.plan


def _narrow(
    task: PruningTask, config: IterativeConfig, epochs: float
) -> Generator[Directive, Observation, Changed]:
    """Channels go in rounds; `epochs` are shared by the pauses between."""
    graph, rounds = task.graph, config.rounds
    pause = epochs / (rounds - 1) if rounds > 1 else 0.0
    for k in range(1, rounds + 1):
        budget = task.budget.partway(k / rounds, task.graph.cost())
        scores = yield from rank(task, graph, config.images)
        keep = choose(graph, budget, scores, config.scope)
        result = changed((yield removal(task, config, keep)))
        graph = result.graph
        if k < rounds and can_train(task, pause):
            yield gentle(task, pause, config.round_lr, f"round {k} of {rounds}")
    return result


def _shorten(
    task: PruningTask, config: IterativeConfig, epochs: float
) -> Generator[Directive, Observation, tuple[Changed, float]]:
    """Blocks go until the target is met or none is left; `epochs` are shared by the way each goes.

    Returns what is left, and the epochs that were trained between: after the last block nothing is.
    """
    spent = 0.0
    graph, budget = task.graph, task.budget
    whole = math.log(max(budget.load(graph.cost()), 1.0 + 1e-9))
    while True:
        before = budget.load(graph.cost())
        harm = yield from harms(task, graph, config.block_score, config.images)
        name = cheapest(graph, budget, harm)
        yield Note("block", {"name": name, "harm": harm[name], "left": len(graph.blocks) - 1})
        result = changed((yield replace(removal(task, config, {}), blocks=(name,))))
        graph = result.graph
        if budget.met(graph.cost()) or not graph.blocks:
            return result, spent
        pause = round(epochs * math.log(before / budget.load(graph.cost())) / whole, 3)
        if can_train(task, pause):
            yield gentle(task, pause, config.round_lr, f"without {name}")
            spent += pause

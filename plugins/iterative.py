"""Iterative pruning: rank, remove a little, train a little, again (Molchanov et al., ICLR 2017)."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from pydantic import Field

from prunus.core.directives import Directive, Observation
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
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
    """Peak learning rate between rounds; None is the tail of the run's own cycle, a fifth of its peak to 0."""


class Iterative(PruningPolicy):
    """Rank again after every removal, so that the ranking knows what is gone already."""

    Config: ClassVar[type[PluginConfig]] = IterativeConfig
    needs_estimator: ClassVar[bool] = True

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, IterativeConfig)
        graph, rounds = task.graph, config.rounds
        pause = config.between * task.epochs / (rounds - 1) if rounds > 1 else 0.0
        for k in range(1, rounds + 1):
            budget = task.budget.partway(k / rounds, task.graph.cost())
            scores = yield from rank(task, graph, config.images)
            keep = choose(graph, budget, scores, config.scope)
            result = changed((yield removal(task, config, keep)))
            graph = result.graph
            if k < rounds and can_train(task, pause):
                yield gentle(pause, config.round_lr, f"round {k} of {rounds}")
        yield from recover(task, config, task.epochs - pause * (rounds - 1))
        return result.plan

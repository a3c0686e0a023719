"""One-shot: rank once, remove once, recover. The plainest method, and the honest baseline."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from prunus.core.directives import Directive, Observation
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.plugins.ranking import Scope, choose, rank
from prunus.plugins.recovery import RecoveryConfig, changed, recover, removal


class OneShotConfig(RecoveryConfig):
    scope: Scope = "global"
    """`global` ranks all units together; `uniform` removes the same share of every group."""


class OneShot(PruningPolicy):
    """Rank all units by an estimator, remove the lowest until the budget is met, train what is left."""

    Config: ClassVar[type[PluginConfig]] = OneShotConfig
    needs_estimator: ClassVar[bool] = True

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, OneShotConfig)
        scores = yield from rank(task, task.graph, config.images)
        keep = choose(task.graph, task.budget, scores, config.scope)
        result = changed((yield removal(task, config, keep)))
        yield from recover(task, config, task.epochs)
        return result.plan

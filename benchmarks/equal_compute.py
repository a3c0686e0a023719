"""gsm-anneal that is given compute, not epochs: whatever network it finds, the sum is the same.

`--epochs` counts epochs of the pruned network. Where the target is one of parameters, the MACs of that network are
known only when it is found, so equal epochs are not equal compute; a comparison has to end by compute.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from prunus.core.directives import Changed, Directive, Observation, Train
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningTask
from prunus.plugins.gsm_anneal import GsmAnneal, GsmAnnealConfig, pruned_macs


class EqualComputeConfig(GsmAnnealConfig):
    compute: float = Field(default=2.0, gt=0)
    """Training MACs of the whole run, in epochs of the dense network."""


class EqualCompute(GsmAnneal):
    """Everything as in gsm-anneal; rounds take their share of `compute`, and the recovery what is left of it."""

    Config: ClassVar[type[PluginConfig]] = EqualComputeConfig

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, EqualComputeConfig)
        dense = macs = task.graph.cost().macs
        left = config.compute
        epochs = left * dense / pruned_macs(task, config)  # of the pruned network, as far as is known
        directives = super().run(replace(task, epochs=epochs))
        observation: Observation = None
        while True:
            try:
                directive = directives.send(observation)
            except StopIteration as end:
                plan: PruningPlan = end.value
                return plan
            if isinstance(directive, Train):
                if directive.label == "recover":
                    directive = replace(directive, epochs=left * dense / macs)
                left -= directive.epochs * macs / dense
            observation = yield directive
            if isinstance(observation, Changed):
                macs = observation.forward_macs

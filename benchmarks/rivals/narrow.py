"""The rival that papers avoid: the same network, uniformly narrower, trained from random weights.

`budget = "epochs"` trains for as many epochs as dense training and recovery together; `budget = "macs"` for
as many training MACs, which is far longer, because every epoch of a narrow network is cheap.
"""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from benchmarks.rivals.bench import Attempt, Bench
from prunus.core.allocation import uniform_keep
from prunus.core.budget import Budget
from prunus.core.compare_cell import RivalJob
from prunus.core.compare_record import Outcome
from prunus.core.directives import Remove, Train


class NarrowConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    budget: Literal["epochs", "macs"] = "epochs"
    lrs: tuple[float, ...] = Field(default=(0.15,), min_length=1)
    """Peak learning rates; the held-out part chooses."""


def train_narrow(job: RivalJob) -> Outcome:
    """A uniformly narrower network of the target's MACs, from scratch."""
    config = NarrowConfig.model_validate(dict(job.config))
    bench = Bench(job, job.settings.model_copy(update={"checkpoint": None}))
    macs = _narrow(bench)
    recovery = job.settings.epochs or 0.0
    epochs = job.dense_epochs + recovery
    if config.budget == "macs":
        epochs = job.dense_epochs * job.dense.macs / macs + recovery
    attempts = []
    for lr in config.lrs:
        model = copy.deepcopy(bench.model)
        spent = bench.train(model, Train(epochs=epochs, lr=lr, label="narrow"), macs)
        attempts.append(Attempt(model, macs, spent, bench.judge(model), f"lr {lr:g}, {epochs:.4g} epochs"))
    return bench.answer(attempts, uses_dense=False, tried=len(attempts))


def _narrow(bench: Bench) -> float:
    """Make the bench's fresh network narrow, at most the target's MACs; returns what it has."""
    graph, job = bench.graph, bench.job
    same = {name: np.arange(group.units, dtype=np.float64) for name, group in graph.prunable.items()}
    budget = Budget.resolve(job.settings.parsed_targets, graph.cost())
    outputs = fan_outs(bench.model)
    bench.adapter.remove(Remove(keep=uniform_keep(graph, budget, same)))
    rescale(bench.model, outputs)
    return bench.adapter.graph.cost().macs


def fan_outs(model: nn.Module) -> dict[str, int]:
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: m.out_channels // m.groups for name, m in convolutions.items()}


@torch.no_grad()
def rescale(model: nn.Module, before: dict[str, int]) -> None:
    """Weights drawn for a wide layer, at the scale that its narrow one is initialised with (fan-out, He 2015)."""
    for name, fan_out in fan_outs(model).items():
        model.get_submodule(name).weight.mul_((before[name] / fan_out) ** 0.5)  # type: ignore[operator, union-attr]

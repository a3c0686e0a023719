"""torch-pruning as its authors use it: rank, remove in small steps until the MACs are met, recover.

Fang et al., DepGraph, CVPR 2023, with the pruners MagnitudePruner, BNScalePruner (network slimming, Liu et
al. 2017), GroupNormPruner (their own sparse learning) and GrowingRegPruner (Wang et al. 2021), and the
importances magnitude, batch-norm scale, Taylor (Molchanov et al. 2019) and OBDC (Wang et al. 2019).

Defects that would handicap it, and what is done about them:

* `step()` overshoots the target where many layers lose a channel at once: of a step that would, only the
  groups are removed that come down to the target, so MACs are within 1% of it.
* Global ranking can leave a residual stream one channel. With a floor, a group that would fall under that share
  of its channels is left alone from then on; with and without are tried, the held-out part decides.
* Dictionaries given as default arguments are shared between pruners and mutated: fresh ones are passed.
* OBDC cannot be prepared on networks without attention (1.6.1), and adjusts its Fisher matrices while groups
  are only listed: it is prepared here, and they are put back.
* Batch-norm statistics are always estimated again, and the learning rate is the best of several.

Everything is tried for every combination of listed settings, and the held-out part chooses.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from importlib.metadata import version
from typing import Literal

import torch
import torch_pruning as tp
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from benchmarks.rivals.bench import Attempt, Bench
from benchmarks.rivals.sparse import SparseLearning
from benchmarks.rivals.steps import prune_to
from prunus.core.compare_cell import RivalJob
from prunus.core.compare_record import Outcome
from prunus.core.directives import Train

Method = Literal["magnitude", "bn-scale", "group-norm", "growing-reg", "taylor", "obdc"]


class DepGraphConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    method: Method = "magnitude"
    scope: Literal["uniform", "global"] = "uniform"
    floors: tuple[float, ...] = Field(default=(0.0,), min_length=1)
    """Smallest share of its channels that any group keeps; at 0 a group may be left with one."""
    lrs: tuple[float, ...] = Field(default=(0.05,), min_length=1)
    """Peak learning rates of the recovery."""
    sparse_shares: tuple[float, ...] = Field(default=(0.0,), min_length=1)
    """Share of the recovery epochs that is spent on sparse learning before the removal; 0.5 in the paper."""


def prune(job: RivalJob) -> Outcome:
    """Prune the dense model to the target's MACs and recover for the job's epochs."""
    config = DepGraphConfig.model_validate(dict(job.config))
    bench = Bench(job)
    attempts = [attempt for start in _starts(bench, config) for attempt in _recoveries(bench, config, *start)]
    return bench.answer(attempts, uses_dense=True, by=f"torch-pruning {version('torch-pruning')}")


def _starts(bench: Bench, config: DepGraphConfig) -> Iterator[tuple[nn.Module, float, float, float, str]]:
    """(pruned model, its MACs, training MACs so far, epochs left, settings) of each way to prune."""
    epochs = bench.job.settings.epochs or 0.0
    shares = config.sparse_shares if epochs else (0.0,)
    for share, floor in itertools.product(shares, config.floors):
        model, classes = copy.deepcopy(bench.model), bench.data.classes
        pruner = make_pruner(model, bench.example, config, classes)
        spent = 0.0
        if share:
            learning = SparseLearning(pruner, epochs * share, bench.data.train.steps)
            spent = learning.run(bench, model)
        macs = prune_to(bench, model, pruner, floor)
        bench.recalibrate(model)
        said = f"{share:g} of the epochs sparse, floor {floor:g}"
        yield model, macs, spent, epochs * (1 - share), said


def _recoveries(
    bench: Bench, config: DepGraphConfig, model: nn.Module, macs: float, spent: float, epochs: float, said: str
) -> Iterator[Attempt]:
    if not epochs:
        yield Attempt(model, macs, spent, bench.judge(model), said)
        return
    for lr, taught in itertools.product(config.lrs, bench.teaching):
        trained = copy.deepcopy(model)
        recovery = bench.train(trained, Train(epochs=epochs, lr=lr, label="recover"), macs, taught=taught)
        label = f"lr {lr:g}, {said}{', taught' if taught else ''}"
        yield Attempt(trained, macs, spent + recovery, bench.judge(trained), label)


STEPS = {"taylor": 50, "obdc": 50}
"""Steps to remove everything in; those that measure gradients at each step take fewer."""


def make_pruner(
    model: nn.Module, example: tuple[object, ...], config: DepGraphConfig, classes: int
) -> tp.pruner.BasePruner:
    """A pruner of all of `model` but its classifier; 400 steps as the authors' benchmark has, or `STEPS`."""
    head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    importances = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn-scale": lambda: tp.importance.BNScaleImportance(),
        "group-norm": lambda: tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
        "growing-reg": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
        "obdc": lambda: tp.importance.OBDCImportance(num_classes=classes),
    }
    kinds = {
        "bn-scale": tp.pruner.BNScalePruner,
        "group-norm": tp.pruner.GroupNormPruner,
        "growing-reg": tp.pruner.GrowingRegPruner,
    }
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        return kinds.get(config.method, tp.pruner.MagnitudePruner)(
            model,
            example[0],
            importance=importances[config.method](),
            global_pruning=config.scope == "global",
            pruning_ratio=1.0,
            iterative_steps=STEPS.get(config.method, 400),
            ignored_layers=head,
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            channel_groups={},
        )

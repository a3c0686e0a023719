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

Every combination of the listed settings is tried, and the held-out part chooses. Where the budget is long and
there are more than two, recoveries of `screen` epochs choose the two that are carried out in full.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
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
from prunus.core.errors import PlanError

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
    screen: float = Field(default=6.0, gt=0)
    """Epochs of the recoveries that choose `FINALISTS` combinations, where the budget is longer than that."""


FINALISTS = 2


@dataclass(frozen=True, slots=True)
class Choice:
    """One combination of the listed settings; without a recovery there is no rate and nobody is taught."""

    share: float
    floor: float
    lr: float | None = None
    taught: bool = False

    def __str__(self) -> str:
        rate = "" if self.lr is None else f"lr {self.lr:g}, "
        taught = ", taught" if self.taught else ""
        return f"{rate}{self.share:g} of the epochs sparse, floor {self.floor:g}{taught}"


def prune(job: RivalJob) -> Outcome:
    """Prune the dense model to the target's MACs and recover for the job's epochs."""
    config = DepGraphConfig.model_validate(dict(job.config))
    bench = Bench(job)
    epochs = job.settings.epochs or 0.0
    choices = _choices(config, bench.teaching, epochs)
    tried = len(choices)
    if epochs > config.screen and tried > FINALISTS:
        screened = sorted(_carried_out(bench, config, choices, config.screen), key=lambda pair: -pair[1].holdout)
        choices = [choice for choice, _ in screened[:FINALISTS]]
    attempts = [attempt for _, attempt in _carried_out(bench, config, choices, epochs)]
    return bench.answer(attempts, uses_dense=True, tried=tried, by=f"torch-pruning {version('torch-pruning')}")


def _choices(config: DepGraphConfig, teaching: Sequence[bool], epochs: float) -> list[Choice]:
    if not epochs:
        return [Choice(0.0, floor) for floor in config.floors]
    return [
        Choice(*values) for values in itertools.product(config.sparse_shares, config.floors, config.lrs, teaching)
    ]


def _carried_out(
    bench: Bench, config: DepGraphConfig, choices: Sequence[Choice], epochs: float
) -> list[tuple[Choice, Attempt]]:
    """Each choice with what it comes to in `epochs`; what differs in the recovery alone is pruned once.

    A floor under which the MACs are out of reach drops out; PlanError if all do.
    """
    done: list[tuple[Choice, Attempt]] = []
    refusal: PlanError | None = None
    ordered = sorted(choices, key=lambda choice: (choice.share, choice.floor))
    for (share, floor), alike in itertools.groupby(ordered, key=lambda choice: (choice.share, choice.floor)):
        try:
            pruned, macs, spent = _pruned(bench, config, epochs * share, floor)
        except PlanError as error:
            refusal = error
            continue
        for choice in alike:
            model = copy.deepcopy(pruned)
            recovery = 0.0
            if choice.lr is not None:
                train = Train(epochs=epochs * (1 - share), lr=choice.lr, label="recover")
                recovery = bench.train(model, train, macs, taught=choice.taught)
            done.append((choice, Attempt(model, macs, spent + recovery, bench.judge(model), str(choice))))
    if not done and refusal is not None:
        raise refusal
    return done


def _pruned(bench: Bench, config: DepGraphConfig, sparse: float, floor: float) -> tuple[nn.Module, float, float]:
    """The pruned model, its MACs, and the training MACs of `sparse` epochs of sparse learning before."""
    model = copy.deepcopy(bench.model)
    pruner = make_pruner(model, bench.example, config, bench.data.classes)
    spent = 0.0
    if sparse:
        spent = SparseLearning(pruner, sparse, bench.data.train.steps).run(bench, model)
    macs = prune_to(bench, model, pruner, floor)
    bench.recalibrate(model)
    return model, macs, spent


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

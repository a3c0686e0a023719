"""What every method does after it removed units: refit, recalibrate, train, distil (methods, section 0)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from pydantic import Field

from prunus.core.directives import (
    Changed,
    Directive,
    Distillation,
    Evaluate,
    Evaluated,
    Gates,
    Note,
    Observation,
    Refit,
    Remove,
    Train,
)
from prunus.core.errors import PluginError
from prunus.core.graph import Keep
from prunus.core.importance import PluginConfig
from prunus.core.policy import PruningTask

SHORT = 3.0
"""Recovery below this many epochs leans more on the teacher."""


class RecoveryConfig(PluginConfig):
    """Settings of the recovery, shared by the methods."""

    refit: Refit = "sequential"
    """How kept weights are refitted to the dense model after a removal; `none` without data."""
    recalibrate: Literal["no", "yes", "if-better"] = "if-better"
    """Re-estimate batch-norm statistics after a removal; `if-better` asks the held-out part."""
    images: int = Field(default=1024, ge=1)
    """Calibration images for signals, refit and recalibration."""
    distil: Literal["auto", "always", "never"] = "auto"
    """Teach with the dense model; `auto` only if the pruned model starts well, a bad start is harmed by it."""
    distil_weight: float | None = Field(default=None, ge=0, le=1)
    """Share of the teacher in the loss; None is 0.7 below 3 epochs and 0.5 from there on."""
    good_start: float = Field(default=0.75, ge=0, le=1)
    """A start is good if its held-out accuracy is at least this share of the dense model's."""


def removal(task: PruningTask, config: RecoveryConfig, keep: Keep) -> Remove:
    """The removal of everything but `keep`, with what the run's data allows."""
    if not task.has_data:
        return Remove(keep=keep)
    better = config.recalibrate
    # the held-out loss needs labels
    recalibrate = better if task.has_labels or better != "if-better" else "no"
    return Remove(keep=keep, refit=config.refit, recalibrate=recalibrate, images=config.images)


TAIL = 0.75
"""Where in a recovery's learning-rate cycle a training between removals begins: a fifth of the peak, to 0."""


def gentle(
    task: PruningTask,
    epochs: float,
    lr: float | None,
    label: str,
    *,
    gates: Gates | None = None,
    decay: Gates | None = None,
) -> Train:
    """A training between removals: a high rate would undo what the refit kept (methods, section 0).

    Without `lr` it is the tail of a recovery's cycle, whatever the optimizer and its rate are.
    """
    start, peak = (TAIL, task.recovery_lr) if lr is None else (0.0, lr)
    return Train(epochs=epochs, lr=peak, start=start, gates=gates, decay=decay, label=label)


def can_train(task: PruningTask, epochs: float) -> bool:
    return task.has_data and task.has_labels and epochs > 0


def recover(task: PruningTask, config: RecoveryConfig, epochs: float) -> Generator[Directive, Observation, None]:
    """Train the pruned model for `epochs`, with the dense model as teacher where that helps."""
    if not can_train(task, epochs):
        return
    distil = yield from distillation(task, config, epochs)
    yield Train(epochs=epochs, lr=task.recovery_lr, distil=distil, label="recover")


def distillation(
    task: PruningTask, config: RecoveryConfig, epochs: float
) -> Generator[Directive, Observation, Distillation | None]:
    """The teachers of a recovery of `epochs`, or None if the start is not good enough to be taught."""
    if config.distil == "never":
        return None
    weight = config.distil_weight if config.distil_weight is not None else (0.7 if epochs < SHORT else 0.5)
    taught = Distillation(teachers=("dense", *task.teachers), weight=weight)
    if config.distil == "always":
        return taught
    dense = task.dense_accuracy
    if dense is None:
        dense = evaluated((yield Evaluate(model="dense"))).accuracy
    start = evaluated((yield Evaluate())).accuracy
    good = start >= config.good_start * dense
    yield Note("distillation", {"start": start, "dense": dense, "used": int(good), "weight": weight})
    return taught if good else None


def changed(observation: Observation) -> Changed:
    """The answer to a removal or growth, or PluginError if it is something else."""
    if not isinstance(observation, Changed):
        raise PluginError("recovery", "Remove and Grow are answered by Changed", repr(type(observation).__name__))
    return observation


def evaluated(observation: Observation) -> Evaluated:
    """The answer to an evaluation, or PluginError if it is something else."""
    if not isinstance(observation, Evaluated):
        raise PluginError("recovery", "Evaluate is answered by Evaluated", repr(type(observation).__name__))
    return observation

"""What every method does after it removed units: refit, recalibrate, train, distil (methods, section 0)."""

from __future__ import annotations

import math
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
USUAL_EPOCHS, USUAL_LOSS = 6.0, 0.03
"""A recovery at the usual rate is so long, and so much of the dense model's accuracy was lost before it."""
_LEAST_LOSS = 0.005
"""What is lost is known to some tenths of a percent: less than this counts as this."""
_GENTLEST, _BOLDEST = 0.4, 1.5


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

    Without `lr` it is the tail of a usual recovery's cycle, whatever the optimizer and its rate are.
    """
    usual = task.recovery_base_lr if task.recovery_lr is None else task.recovery_lr
    start, peak = (TAIL, usual) if lr is None else (0.0, lr)
    return Train(epochs=epochs, lr=peak, start=start, gates=gates, decay=decay, label=label)


def can_train(task: PruningTask, epochs: float) -> bool:
    return task.has_data and task.has_labels and epochs > 0


def recover(task: PruningTask, config: RecoveryConfig, epochs: float) -> Generator[Directive, Observation, None]:
    """Train the pruned model for `epochs`, with the dense model as teacher where that helps."""
    if not can_train(task, epochs):
        return
    lr, distil = task.recovery_lr, None
    base = task.recovery_base_lr if lr is None else None
    if base is not None or config.distil == "auto":
        start, dense = yield from _standing(task)
        if base is not None:
            lr = base * rate_factor(1 - start / max(dense, 1e-9), epochs)
            yield Note("recovery", {"start": start, "dense": dense, "lr": lr})
        if config.distil == "auto":
            good = start >= config.good_start * dense
            distil = _teaching(task, config, epochs) if good else None
            weight = _weight(config, epochs)
            yield Note("distillation", {"start": start, "dense": dense, "used": int(good), "weight": weight})
    if config.distil == "always":
        distil = _teaching(task, config, epochs)
    yield Train(epochs=epochs, lr=lr, distil=distil, label="recover")


def rate_factor(lost: float, epochs: float) -> float:
    """The peak learning rate of a recovery over the usual one: (lost / 3% * epochs / 6)^(1/3), in 0.4..1.5.

    `lost`: share of the dense model's held-out accuracy. Where little was lost, a high rate loses more than it
    finds in a short time; where much was, or time is long, a low one stays near a bad start. Fitted to the best
    rates at 50, 25 and 10% of the MACs and 1.5, 6 and 20 epochs (benchmarks/results/recovery_rate.md).
    """
    factor = math.pow(max(lost, _LEAST_LOSS) / USUAL_LOSS * epochs / USUAL_EPOCHS, 1 / 3)
    return min(max(factor, _GENTLEST), _BOLDEST)


def _standing(task: PruningTask) -> Generator[Directive, Observation, tuple[float, float]]:
    """Held-out accuracy of the model as it is, and of the dense one."""
    dense = task.dense_accuracy
    if dense is None:
        dense = evaluated((yield Evaluate(model="dense"))).accuracy
    return evaluated((yield Evaluate())).accuracy, dense


def _teaching(task: PruningTask, config: RecoveryConfig, epochs: float) -> Distillation:
    return Distillation(teachers=("dense", *task.teachers), weight=_weight(config, epochs))


def _weight(config: RecoveryConfig, epochs: float) -> float:
    if config.distil_weight is not None:
        return config.distil_weight
    return 0.7 if epochs < SHORT else 0.5


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

"""How long a training lasts and how its learning rate moves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from timm.scheduler import create_scheduler_v2

from prunus.core.directives import Train

_COLD = 1e-5
"""Where a warm-up begins, as in timm's train.py."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of a training, or what is left of one."""

    number: int
    first: int
    """The step, counted over the whole directive, that the epoch begins with."""
    steps: int


@dataclass(frozen=True, slots=True)
class EpochsDone:
    """How far a training is: what a resume goes on from."""

    count: int = 0
    least: float | None = None
    """Smallest mean loss of one of them."""

    def and_one(self, loss: float) -> EpochsDone:
        return EpochsDone(self.count + 1, loss if self.least is None else min(self.least, loss))


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Whole steps nearest to `epochs`, at least one if any training is asked for."""
    return max(round(epochs * steps_per_epoch), 1) if epochs > 0 else 0


def epochs_of(total: int, steps_per_epoch: int) -> list[Epoch]:
    """The epochs that make up `total` steps; the last may be short."""
    return [
        Epoch(number, first, min(steps_per_epoch, total - first))
        for number, first in enumerate(range(0, total, steps_per_epoch))
    ]


def learning_rate(directive: Train, peak: float, step: int, total: int) -> float:
    """The rate of `step` (0-based): linear warm-up to `peak`, then a cosine to 0 or constant.

    The directive covers `start`..`stop` of its cycle, so that several directives can share one.
    """
    at = directive.start + (directive.stop - directive.start) * (step + 0.5) / total
    if at < directive.warmup:
        return peak * at / directive.warmup
    if directive.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (at - directive.warmup) / max(1 - directive.warmup, 1e-9)))


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the learning rate of a training falls that is to come to an end."""

    name: Literal["cosine", "tanh", "poly", "step"] | None = None
    """A scheduler of timm; None: as `learning_rate` says."""
    decay_epochs: float = 90.0
    """`step`: epochs between two falls."""
    decay_rate: float = 0.1
    """`step`: what the rate is multiplied by at each; `poly`: the exponent."""

    def rates(self, directive: Train, peak: float, total: int, steps_per_epoch: int) -> Callable[[int], float]:
        """The rate of each step (0-based). What a method keeps constant stays so, and so does its warm-up."""
        if self.name is None or directive.schedule == "constant":
            return lambda step: learning_rate(directive, peak, step, total)
        cycle = max(round(total / (directive.stop - directive.start)), 1)
        warmup = round(directive.warmup * cycle)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            self.name,
            num_epochs=max(cycle - warmup, 1),
            decay_epochs=max(round(self.decay_epochs * steps_per_epoch), 1),
            decay_rate=self.decay_rate,
            warmup_epochs=warmup,
            warmup_lr=min(_COLD, peak),
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        assert scheduler is not None

        def rate(step: int) -> float:
            scheduler.step_update(round(directive.start * cycle) + step)
            return float(optimizer.param_groups[0]["lr"])

        return rate


def epoch_seed(seed: int, directive: int, epoch: int) -> int:
    """A seed of 63 bits for one epoch of one directive of a run; unrelated for different arguments."""
    digest = hashlib.sha256(f"{seed}/{directive}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

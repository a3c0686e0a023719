"""How long a training lasts and how its learning rate moves."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from prunus.core.directives import Train


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of a training, or what is left of one."""

    number: int
    first: int
    """The step, counted over the whole directive, that the epoch begins with."""
    steps: int


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


def epoch_seed(seed: int, directive: int, epoch: int) -> int:
    """A seed of 63 bits for one epoch of one directive of a run; unrelated for different arguments."""
    digest = hashlib.sha256(f"{seed}/{directive}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

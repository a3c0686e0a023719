"""The interface of pruning methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from prunus.core.budget import Budget
from prunus.core.directives import Directive, Observation
from prunus.core.errors import PluginError, PrunusError
from prunus.core.graph import ChannelGraph
from prunus.core.importance import ImportanceEstimator, PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.signals import Signal


@dataclass(frozen=True, slots=True)
class PruningTask:
    """Everything a policy may know when it starts."""

    graph: ChannelGraph
    budget: Budget
    rng: np.random.Generator
    """Seeded; the only source of randomness a policy may use."""
    estimator: ImportanceEstimator | None = None
    epochs: float = 0.0
    """Training budget of the method, in epochs of the train split of the *original* model."""
    recovery_lr: float | None = None
    """Peak learning rate after removals that the user asked for; None: the method finds one."""
    recovery_base_lr: float | None = None
    """What the method finds it from: the peak of a usual recovery; None: that of any training."""
    has_data: bool = True
    """False with --data none: only Signal.WEIGHT can be measured, nothing is trained or evaluated."""
    has_labels: bool = True
    teachers: tuple[str, ...] = ()
    """Snapshots the user named by --teacher ("user-0", ...)."""
    dense_accuracy: float | None = None
    """Held-out accuracy of the starting model, 0..1."""
    held_out: int | None = None
    """Images of the held-out part; None where there is none, or nobody counts."""
    calibration: int | None = None
    """Images that signals, refits and recalibration can use at most; None where there are none, or nobody
    counts."""
    classes: int | None = None


class PruningPolicy(ABC):
    """A pruning method: an algorithm over numbers, written top to bottom as in its paper.

    `run` must be a deterministic function of the task and the observations it receives: a crashed run is
    resumed by feeding it the journal.
    """

    Config: ClassVar[type[PluginConfig]] = PluginConfig
    starts_from: ClassVar[Literal["trained", "scratch"]] = "trained"
    """`trained`: the run trains the dense model first if it has no weights for the data's classes."""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    """Signals it measures whatever the estimator: checked before anything starts."""
    needs_estimator: ClassVar[bool] = False
    """True if it ranks by --importance."""

    def __init__(self, config: PluginConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def check(self, task: PruningTask) -> None:  # noqa: B027 - most methods have nothing to refuse
        """Raises ConfigError if the method, as configured, cannot serve `task`; asked before anything starts."""

    @abstractmethod
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        """Yield directives, receive observations, return the plan of the last `Changed`.

        Directives and observations speak of the current graph: after `Remove`, units are renumbered 0..k-1.
        """


def ask(policy: PruningPolicy, plugin: str, task: PruningTask) -> None:
    """Whether `policy` can serve `task`: what its `check` raises, PluginError where that is not about the user."""
    try:
        policy.check(task)
    except PrunusError:
        raise
    except Exception as error:
        rule = "check raises ConfigError or nothing"
        raise PluginError(plugin, rule, f"{type(error).__name__}: {error}.") from error

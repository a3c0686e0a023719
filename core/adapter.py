"""All that the core asks of a framework. A second framework is a second folder under adapters/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prunus.core.directives import (
    Changed,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Merge,
    Remove,
    Snapshot,
    Train,
    Trained,
)
from prunus.core.graph import ChannelGraph
from prunus.core.plan import ModelSource, PruningPlan
from prunus.core.settings import RunSettings
from prunus.core.signals import SignalReader


class Watcher(Protocol):
    """What an adapter tells the run while it executes one directive."""

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        """After every step: a batch, a refitted layer. Raises KeyboardInterrupt after a Ctrl-C: let it pass."""
        ...

    def boundary(self) -> None:
        """Called by `train` where it could be continued from (the end of each epoch but the last).

        The run answers by calling `checkpoint`, or not. After `restore` of such a checkpoint the run issues
        the same Train again, and the adapter goes on inside it.
        """
        ...

    def notice(self, text: str) -> None:
        """One line the user should see."""
        ...


class ModelAdapter(Protocol):
    """One model, its data and everything that changes while it is pruned.

    Random streams derive from the seed and from the number of state-changing directives (train, grow, merge,
    remove, snapshot) executed so far, which `checkpoint` writes: answers that a resumed run takes from its journal
    leave no trace in the adapter.
    """

    @property
    def graph(self) -> ChannelGraph:
        """The graph of the model as it is now, with the run's floors (`with_floors`)."""
        ...

    def watch(self, watcher: Watcher) -> None:
        """Report to `watcher` from now on."""
        ...

    def trace(self) -> ChannelGraph:
        """Trace the original model. Raises TraceError."""
        ...

    def measure(self, directive: Measure) -> SignalReader: ...

    def train(self, directive: Train) -> Trained:
        """Raises TrainingError on NaN or infinity."""
        ...

    def evaluate(self, directive: Evaluate) -> Evaluated: ...

    def grow(self, directive: Grow) -> Changed: ...

    def merge(self, directive: Merge) -> Changed:
        """Raises VerificationError if the merged model does not compute what its branches did."""
        ...

    def remove(self, directive: Remove) -> Changed:
        """Raises VerificationError if the pruned model is not the masked one."""
        ...

    def snapshot(self, directive: Snapshot) -> None: ...

    def checkpoint(self, folder: Path) -> None:
        """Write everything a resumed run needs (weights, optimizer, EMA, snapshots, plan, random states).

        `folder` exists and is empty; the run renames it into place when all is written.
        """
        ...

    def restore(self, folder: Path) -> None:
        """Become what `checkpoint` wrote. Raises JournalError if it is damaged; an older one may follow."""
        ...


@dataclass(frozen=True, slots=True)
class Description:
    """What people and reports want to know about a session's model and data."""

    model: str
    input_size: tuple[int, int, int]
    """(channels, height, width)."""
    classes: int | None
    data: str
    images: Mapping[str, int]
    """Number of images per split: train, holdout, calibration, test."""
    device: str
    versions: Mapping[str, str]
    """Library -> version, for provenance."""
    notes: tuple[str, ...] = ()
    """What was changed or assumed: "classifier resized from 1000 to 10 classes"."""


class Session(Protocol):
    """One model and its data, opened by an adapter: all that the command line reaches of a framework."""

    @property
    def settings(self) -> RunSettings:
        """The settings with every default of this model and data filled in: model, epochs, lr, batch_size..."""
        ...

    @property
    def adapter(self) -> ModelAdapter: ...

    @property
    def graph(self) -> ChannelGraph:
        """The graph of the original model, with the run's floors."""
        ...

    @property
    def source(self) -> ModelSource: ...

    @property
    def has_data(self) -> bool: ...

    @property
    def has_labels(self) -> bool: ...

    @property
    def classes(self) -> int | None: ...

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the snapshots made from --teacher ("user-0", ...)."""
        ...

    @property
    def dense_needs_training(self) -> bool:
        """True if there are data and the model has no weights for their classes."""
        ...

    def describe(self) -> Description: ...

    def test(self) -> Evaluated | None:
        """The adapter's current model on the test split; None without data."""
        ...

    def save(self, folder: Path, plan: PruningPlan, report: Mapping[str, Any]) -> None:
        """Write the artifact into `folder`: model.safetensors and plan.json, each atomically.

        Raises VerificationError if the saved model, loaded again, does not answer like the one in memory.
        """
        ...

    def load(self, folder: Path) -> None:
        """Become the model that `save` wrote (plan replayed, weights strict). Raises LoadError or PlanError."""
        ...


@runtime_checkable
class SharedSession(Protocol):
    """A session that several processes can open together, each with its share of the data.

    The method runs in the first process alone. What it asks of its adapter is carried out by all.
    """

    def follow(self) -> None:
        """Any process but the first: carry out what the first asks for, until it dismisses.

        Raises ProcessError if the first process ends before, or if its plan is another than here.
        """
        ...

    def dismiss(self) -> None:
        """The first process: the job is done. Raises ProcessError if another holds another plan."""
        ...


@runtime_checkable
class IdentifiedSession(Protocol):
    """A session that can tell what its settings name from something else of the same name."""

    def content(self) -> str | None:
        """Digest of what the run begins with and no setting says, such as weights; None where there is nothing.

        Asked for before the first directive. A run is resumed only where it is the same as when the run began.
        """
        ...


OpenSession = Callable[[RunSettings], Session]
"""What an adapter's registry entry names. Raises ConfigError, LoadError or TraceError."""

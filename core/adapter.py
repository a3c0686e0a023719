"""All that the core asks of a framework. A second framework is a second folder under adapters/."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prunus.core.directives import (
    Changed,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Remove,
    Snapshot,
    Train,
    Trained,
)
from prunus.core.graph import ChannelGraph
from prunus.core.signals import SignalReader


class ModelAdapter(Protocol):
    """One model, its data and everything that changes while it is pruned."""

    @property
    def graph(self) -> ChannelGraph:
        """The graph of the model as it is now."""
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

    def remove(self, directive: Remove) -> Changed:
        """Raises VerificationError if the pruned model is not the masked one."""
        ...

    def snapshot(self, directive: Snapshot) -> None: ...

    def checkpoint(self, folder: Path) -> None:
        """Write everything a resumed run needs (weights, optimizer, EMA, snapshots, plan, random states)."""
        ...

    def restore(self, folder: Path) -> None:
        """Become what `checkpoint` wrote. Raises JournalError if the folder is damaged."""
        ...

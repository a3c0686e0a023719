"""What happened in a run, one row per directive: metrics.jsonl, and the figures of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus.core.directives import (
    Changed,
    Directive,
    Evaluate,
    Evaluated,
    Note,
    Observation,
    Remove,
    Snapshot,
    Train,
    Trained,
    Verification,
)

_ROSE, _BY = 1.4, 0.1
"""A training went wrong if its loss is so many times that of an epoch before, and so much larger."""


@dataclass(slots=True)
class History:
    """Rows in order. A resumed run fills them again from its journal, so the file is always whole."""

    file: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    seconds: float = 0.0
    """Time spent on directives, over all processes that worked on the run."""
    training_macs: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What the user should know about how the trainings went."""
    _least: float | None = None
    """Smallest training loss of an epoch since the model last changed."""

    def add(self, index: int, directive: Directive, observation: Observation, seconds: float) -> str | None:
        """Keep a row; returns what is new in `notes`."""
        self.seconds += seconds
        row: dict[str, Any] = {"index": index, "kind": type(directive).__name__, "seconds": round(seconds, 3)}
        row |= _asked(directive)
        if isinstance(observation, Trained):
            self.training_macs += observation.macs
            row |= {"loss": observation.loss, "accuracy": observation.accuracy, "macs_spent": observation.macs}
        elif isinstance(observation, Evaluated):
            row |= {"loss": observation.loss, "accuracy": observation.accuracy}
        elif isinstance(observation, Changed):
            cost = observation.graph.cost()
            row |= {"macs": int(cost.macs), "params": int(cost.params), "bytes": int(cost.bytes)}
            row |= {"widths": observation.graph.units, "max_error": observation.verification.max_error}
            if isinstance(directive, Remove):
                self.verifications.append(observation.verification)
        self.rows.append(row)
        self._write(row)
        note = self._judged(directive, observation)
        if note is not None:
            self.notes.append(note)
        return note

    def _judged(self, directive: Directive, observation: Observation) -> str | None:
        """A note if a training lost what was learned before; decay and other losses may do so by intent."""
        if isinstance(observation, Changed):
            self._least = None
        if not isinstance(directive, Train) or not isinstance(observation, Trained):
            return None
        if directive.decay is not None or directive.distil is not None or directive.within is not None:
            return None
        now = observation.loss
        before = min(x for x in (self._least, observation.least, now) if x is not None)
        self._least = before
        if now < max(_ROSE * before, before + _BY) or self.notes:  # once is enough
            return None
        return (
            f"the training loss rose from {before:.2f} to {now:.2f} ({directive.label}): the learning rate is too "
            "high for this model, which seldom recovers; lower --lr, or limit the gradients by --clip-grad 2"
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        with self.file.open("w" if len(self.rows) == 1 else "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    @property
    def verification(self) -> Verification | None:
        """The removal whose error was largest, relative to its outputs."""
        return max(self.verifications, key=lambda v: v.max_error / max(v.scale, 1e-12), default=None)


def _asked(directive: Directive) -> dict[str, Any]:
    if isinstance(directive, Train):
        return {"label": directive.label, "epochs": directive.epochs}
    if isinstance(directive, Evaluate):
        return {"split": directive.split, "model": directive.model}
    if isinstance(directive, Remove):
        return {"refit": directive.refit, "blocks": list(directive.blocks), "kernels": list(directive.kernels)}
    if isinstance(directive, Snapshot):
        return {"name": directive.name}
    if isinstance(directive, Note):
        return {"note": directive.kind, "values": {k: _plain(v) for k, v in directive.values.items()}}
    return {}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value]

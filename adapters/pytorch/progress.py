"""How far a directive is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training, or a refit, is after each step."""

    label: str
    step: int
    """Steps done, 1-based."""
    total: int
    loss: float | None = None
    lr: float | None = None

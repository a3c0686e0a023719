"""What an adapter can measure for estimators and policies, and how they read it."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from prunus.core.cost import FloatArray


class Signal(StrEnum):
    """A kind of per-unit or per-tensor statistics. Readers see fp64 numpy arrays, read-only."""

    WEIGHT = "weight"
    """By tensor name: the parameter or buffer itself, in its own shape."""
    GATE_GRADIENT = "gate-gradient"
    """By group name, (units,): mean over batches of dLoss/dgate at gate 1, gates on all readers of a unit.
    A gate that scales the writing weights has the same derivative where no reader carries a weight."""
    GATE_FISHER = "gate-fisher"
    """By group name, (units,): mean over batches of the squared dLoss/dgate, times the batch size."""
    ACTIVATION_MEAN = "activation-mean"
    """By the name of a reading weight, (length of its `reads` axis,): mean of what it sees, pooled over
    samples, positions and convolution groups."""
    ACTIVATION_VARIANCE = "activation-variance"
    """As ACTIVATION_MEAN: the centred variance of every input."""
    ACTIVATION_COVARIANCE = "activation-covariance"
    """By the name of a reading weight, (n, n): the centred covariance of its inputs. Not there for readers
    with more than `COVARIANCE_LIMIT` inputs (a flattened map): use the variance."""
    BLOCK_CHANGE = "block-change"
    """By block name, (2,): how much the block changes what passes through, mean over images: the energy of what
    it adds as a share of its output's energy, and 1 - cosine of its input and output."""


COVARIANCE_LIMIT = 4096

NEEDS_DATA = frozenset(Signal) - {Signal.WEIGHT}
NEEDS_LABELS = frozenset({Signal.GATE_GRADIENT, Signal.GATE_FISHER})


class SignalReader(Protocol):
    """Measured signals. Valid until the policy yields its next directive."""

    def read(self, signal: Signal, name: str) -> FloatArray:
        """The array described at `Signal`. Raises ConfigError if the signal was not asked for, KeyError-like
        PlanError if there is none of that name."""
        ...

    def has(self, signal: Signal, name: str) -> bool:
        """True if `read` would answer."""
        ...

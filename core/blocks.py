"""Residual blocks: parts of a model that can vanish as a whole, because their input passes through."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model whose output is its input plus something. Removed, the input passes through unchanged.

    Its gate, under its name among the gates of groups and of shape (1,), scales what it adds: 0 is removal.
    """

    name: str
    """Stable between runs and machines; no channel group has the same."""
    tensors: frozenset[str]
    """Parameters and buffers that vanish with it; groups that run through these alone vanish, too."""
    sources: frozenset[str]
    """Whatever else owes cost (`CostTerm.source`) that vanishes with it."""
    of: str | None = None
    """None for a residual block. Else the convolution that this is a parallel branch of: what is left of it is the
    sum of the other branches, nothing passes through in its place, and it costs nothing once they are merged."""

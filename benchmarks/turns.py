"""Steps of several kinds that take turns, so that a machine's moods hit them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

WARM_UP = 2
"""Rounds that do not count."""


def medians(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Kind -> median of what its step returns, over `rounds` rounds in which the order rotates."""
    kinds = list(steps)
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(-WARM_UP, rounds):
        for k in range(len(kinds)):
            kind = kinds[(i + k) % len(kinds)]
            value = steps[kind]()
            if i >= 0:
                taken[kind].append(value)
    return {kind: statistics.median(values) for kind, values in taken.items()}

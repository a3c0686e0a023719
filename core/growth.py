"""How a channel graph is widened: where every new unit and index is copied from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prunus.core.cost import IntArray

Axis = tuple[str, int]
"""One axis of one tensor: (tensor name, axis number)."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How a graph was widened: for each grown group, the unit each new unit copies."""

    copies: Mapping[str, IntArray]
    """group -> (new units,): the source unit, in the coordinates before the growth."""
    sources: Mapping[Axis, IntArray]
    """axis -> (new length,): the old index that each new index copies."""


def sweeps(unit_of: IntArray, units: int) -> list[tuple[int, int]] | None:
    """(start, run) of each pass over all units in order, each unit `run` indices long; None if irregular."""
    member = np.flatnonzero(unit_of >= 0)
    found: list[tuple[int, int]] = []
    at = 0
    while at < len(member):
        start = int(member[at])
        run = 1
        while start + run < len(unit_of) and unit_of[start + run] == unit_of[start]:
            run += 1
        stop = start + run * units
        if stop > len(unit_of) or not np.array_equal(unit_of[start:stop], np.repeat(np.arange(units), run)):
            return None
        found.append((start, run))
        at += run * units
    return found

"""Importance by the distance from the geometric median (He et al., FPGM, CVPR 2019)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.graph import ChannelGroup, Slice
from prunus.core.importance import ImportanceEstimator
from prunus.core.signals import Signal, SignalReader


class Fpgm(ImportanceEstimator):
    """The sum of distances from a unit's writing weights to those of all other units, over all layers.

    A unit near the geometric median of its layer can be represented by the others, whatever its norm.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})
    comparable_across_groups: ClassVar[bool] = False

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        """(units,): `sum_j ||w_i - w_j||` (eq. 4), summed over the layers that write the group."""
        total = np.zeros(group.units)
        for piece in group.with_role("writes") or group.slices:
            rows = unit_rows(signals.read(Signal.WEIGHT, piece.tensor), piece, group.units)
            total += pairwise_distances(rows).sum(axis=1)
        return total


def unit_rows(weight: FloatArray, piece: Slice, units: int) -> FloatArray:
    """(units, features): all weights of each unit along the slice's axis; short units are padded with zeros."""
    by_index = np.moveaxis(weight, piece.axis, 0).reshape(weight.shape[piece.axis], -1)
    mine = np.flatnonzero(piece.unit_of >= 0)
    owner = piece.unit_of[mine]
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=units)
    place = np.arange(len(mine)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.zeros((units, int(sizes.max(initial=1)), by_index.shape[1]))
    rows[owner[order], place] = by_index[mine[order]]
    return rows.reshape(units, -1)


def pairwise_distances(rows: FloatArray) -> FloatArray:
    """(n, n): Euclidean distances between the rows."""
    gram = rows @ rows.T
    square = np.diag(gram)
    return np.asarray(np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * gram, 0.0)), dtype=np.float64)

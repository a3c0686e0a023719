"""Means and covariances of what readers see, merged batch by batch in double precision.

Nothing holds more than one block of samples: every block is centred on its own mean and merged by the
pairwise update of Chan, Golub and LeVeque (1983), which loses no digits where the mean is large.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20
"""Rows are converted to double precision in blocks of about this size."""


class Moments:
    """Mean and centred second moments of rows, separately for each of `slots` (convolution groups)."""

    def __init__(self, width: int, slots: int = 1, *, full: bool = True, targets: int = 0) -> None:
        """`width`: values in a row of a slot. `full`: covariances, not only variances. `targets`: values
        in a row that is paired with each, for the cross-covariance."""
        self.count = 0
        self.mean = torch.zeros(slots, width, dtype=torch.float64)
        self.target_mean = torch.zeros(slots, targets, dtype=torch.float64)
        shape = (slots, width, width) if full else (slots, width)
        self._scatter = torch.zeros(shape, dtype=torch.float64)
        self._cross = torch.zeros(slots, targets, width, dtype=torch.float64)
        self._full = full

    @property
    def covariance(self) -> Tensor:
        """(slots, width, width), or the variances (slots, width) if not `full`; divided by the count."""
        return self._scatter / max(self.count, 1)

    @property
    def cross_covariance(self) -> Tensor:
        """(slots, targets, width): E[(y - mean y)(x - mean x)^T]."""
        return self._cross / max(self.count, 1)

    def add(self, rows: Tensor, targets: Tensor | None = None) -> None:
        """Merges `rows` (samples, slots, width), with `targets` (samples, slots, targets) if any are kept."""
        for start, stop in _blocks(rows):
            paired = None if targets is None else targets[start:stop]
            self._merge(_slots_first(rows[start:stop]), None if paired is None else _slots_first(paired))

    def copy(self) -> Moments:
        """The same, to be added to on its own."""
        return copy.deepcopy(self)

    def merge(self, other: Moments) -> None:
        """Adds the rows that `other`, of the same widths, has seen."""
        self._shift(other.count, other.mean, other.target_mean)
        self._scatter += other._scatter
        self._cross += other._cross

    def _merge(self, x: Tensor, y: Tensor | None) -> None:
        mean = x.mean(1)
        self._shift(x.shape[1], mean, self.target_mean if y is None else y.mean(1))
        x = x - mean.unsqueeze(1)
        self._scatter += x.mT @ x if self._full else x.square().sum(1)
        if y is not None:
            self._cross += y.mT @ x  # x is centred, so that y need not be

    def _shift(self, fresh: int, mean: Tensor, target_mean: Tensor) -> None:
        """The part of a merger that comes from the difference of the means."""
        total = self.count + fresh
        share = self.count * fresh / max(total, 1)
        shift, target_shift = mean - self.mean, target_mean - self.target_mean
        if self._full:
            self._scatter += share * shift.unsqueeze(2) * shift.unsqueeze(1)
        else:
            self._scatter += share * shift.square()
        self._cross += share * target_shift.unsqueeze(2) * shift.unsqueeze(1)
        self.mean += shift * (fresh / max(total, 1))
        self.target_mean += target_shift * (fresh / max(total, 1))
        self.count = total


def _slots_first(rows: Tensor) -> Tensor:
    return rows.detach().to("cpu", torch.float64).transpose(0, 1)


def _blocks(rows: Tensor) -> Iterator[tuple[int, int]]:
    per_row = max(8 * rows[0].numel(), 1) if len(rows) else 1
    step = max(BLOCK_BYTES // per_row, 1)
    for start in range(0, len(rows), step):
        yield start, min(start + step, len(rows))

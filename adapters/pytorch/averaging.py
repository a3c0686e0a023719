"""A moving average of a model's weights, kept in a model of its own."""

from __future__ import annotations

import torch
from torch import nn


class WeightAverage:
    """Moves `average` towards `model` after each step: average <- d average + (1 - d) model.

    The decay is warmed up, d_t = min(decay, (1 + t) / (10 + t)) with t the number of updates, so that the
    average forgets where it began. Buffers (batch-norm statistics) are averaged too, counters are copied.
    """

    def __init__(self, average: nn.Module, model: nn.Module, decay: float, updates: int = 0) -> None:
        self.updates = updates
        self._average, self._model, self._decay = average, model, decay

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        # looked up each time: a change of memory layout puts other storage behind a parameter
        ours, theirs = self._average.state_dict(), self._model.state_dict()
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floating], [theirs[name] for name in floating], 1 - decay)
        for name in ours.keys() - set(floating):
            ours[name].copy_(theirs[name])
        self.updates += 1

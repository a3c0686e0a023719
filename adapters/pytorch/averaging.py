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
        self._decay = decay
        ours, theirs = average.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        self._average = [ours[name].detach() for name in floating]
        self._model = [theirs[name].detach() for name in floating]
        rest = [name for name in ours if name not in set(floating)]
        self._counters = [(ours[name], theirs[name]) for name in rest]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, self._model, 1 - decay)
        for ours, theirs in self._counters:
            ours.copy_(theirs)
        self.updates += 1

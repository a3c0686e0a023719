"""A moving average of a model's weights, kept in a model of its own, and whether it takes the model's place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from prunus.adapters.pytorch.weights import tensors_of
from prunus.core.directives import Evaluated, Train


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
        ours, theirs = tensors_of(self._average), tensors_of(self._model)
        floating = [name for name, value in ours.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floating], [theirs[name] for name in floating], 1 - decay)
        for name in ours.keys() - set(floating):
            ours[name].copy_(theirs[name])
        self.updates += 1


def decay_of(directive: Train, run: float | None) -> float | None:
    """The decay of the average that a training keeps; None if it keeps none.

    The method's; or that of the `run`, for trainings that lead to a model to be kept: without gates, to the
    end of their schedule.
    """
    if directive.ema is not None:
        return directive.ema
    settles = directive.gates is None and directive.schedule == "cosine" and directive.stop >= 1
    return run if settles else None


def settle(model: nn.Module, average: nn.Module, judge: Callable[[nn.Module], Evaluated]) -> str:
    """Gives `model` the weights of `average` where `judge` finds it better, by accuracy and then by loss.

    Returns what was found and done, in a line.
    """
    plain, averaged = judge(model), judge(average)
    better = (averaged.accuracy, -averaged.loss) > (plain.accuracy, -plain.loss)
    if better:
        model.load_state_dict(average.state_dict())
    return (
        f"held-out accuracy {plain.accuracy:.2%}, of the average of the weights {averaged.accuracy:.2%}: "
        f"the {'average is' if better else 'weights are'} kept"
    )

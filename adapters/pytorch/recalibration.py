"""Batch-norm statistics, estimated again on calibration images.

Pruning shifts what a batch norm sees; its running statistics still describe the dense model. Estimating
them again helps most after a plain copy, and can hurt after a refit, so the old ones are handed back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.adapters.pytorch.batches import Batches
from prunus.adapters.pytorch.evaluation import evaluate
from prunus.adapters.pytorch.signals import Batch, images_of, measuring


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """The running statistics of a model's batch norms at one moment."""

    saved: tuple[tuple[Tensor, Tensor], ...]
    """(buffer, its values then)."""

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the values back, bit for bit, where the buffers still are."""
        for buffer, values in self.saved:
            buffer.copy_(values)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Replaces every batch norm's running statistics by the average over `batches`, in place.

    All batches weigh alike (a cumulative average). Nothing but batch norms is in training mode meanwhile.
    Returns the statistics as they were: `restore` undoes the change. Without images nothing changes.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = Statistics(tuple((b, b.detach().clone()) for norm in norms for b in norm.buffers()))
    momenta = [norm.momentum for norm in norms]
    with measuring(model):
        try:
            for norm in norms:
                norm.train()
                norm.momentum = None  # torch's cumulative average
            for i, batch in enumerate(batches):
                if i == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                model(images_of(batch, model))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    for buffer, values in before.saved:
        if not buffer.is_floating_point():
            buffer.copy_(values)  # the count of training batches is not ours to change
    return before


def recalibrate_if_better(model: nn.Module, batches: Iterable[Batch], holdout: Batches, device: str) -> float:
    """`recalibrate`, undone unless the loss on `holdout` falls. Returns that loss as it was before."""
    loss = evaluate(model, holdout, device).loss
    statistics = recalibrate(model, batches)
    if evaluate(model, holdout, device).loss >= loss:
        statistics.restore()
    return loss

"""One step of a training: passes over a batch, gates, scaled and clipped gradients, decay, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from prunus.adapters.pytorch.batches import Batch
from prunus.adapters.pytorch.compilation import Compiled
from prunus.adapters.pytorch.distillation import (
    Teacher,
    classification_loss,
    distillation_loss,
    logits_of,
    teacher_logits,
)
from prunus.adapters.pytorch.mixed_precision import autocast, make_scaler
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.processes import Processes
from prunus.core.directives import Distillation
from prunus.core.errors import ConfigError, TrainingError

SMALLEST_SCALE = 1e-4
"""Gradients that overflow at this loss scale are not the number format's fault."""


class StepHook(Protocol):
    """Changes the weights for the duration of a step and puts them back (gates)."""

    @property
    def watches(self) -> bool:
        """True if it takes part in the forward passes, which then cannot be compiled."""
        ...

    def before_forward(self) -> None: ...

    def after_backward(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Stepped:
    """What came of a step, over all processes."""

    loss: float
    right: int
    finite: bool
    """False if the step would have poisoned the weights: it was not taken."""


class Stepper:
    """Takes steps for one epoch of one training."""

    def __init__(
        self,
        settings: TrainingSettings,
        network: nn.Module | Compiled,
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        *,
        teachers: Sequence[Teacher],
        distil: Distillation | None,
        hook: StepHook | None,
    ) -> None:
        """`network`: the module as it is called, which may be wrapped; `optimizer` knows its parameters."""
        self._settings, self._network, self._optimizer = settings, network, optimizer
        self._processes, self._hook = processes, hook
        self._teachers, self._distil = teachers, distil if teachers else None
        # a scale of its own for each epoch: a resumed epoch then begins like the first time
        self._scaler = make_scaler(settings.device, settings.amp)

    def passes(self, images: Tensor, labels: Tensor) -> Stepped:
        """Gradients of the mean loss of all processes' images, of the weights without gates; clipped.

        labels: (batch,) classes, or (batch, classes) shares of each.
        """
        self._optimizer.zero_grad(set_to_none=True)
        parts = max(min(self._settings.accumulate, len(labels)), 1)
        loss, right = images.new_zeros(()), images.new_zeros(())
        batches = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
        if self._hook is not None:
            self._hook.before_forward()
        for i, batch in enumerate(batches):
            weight = len(batch[1]) / len(labels)
            if i < len(batches) - 1:
                with self._processes.postponed(self._network):
                    part_loss, logits = self._pass(batch, weight)
            else:
                part_loss, logits = self._pass(batch, weight)
            loss += part_loss * weight
            right += (logits.argmax(1) == _foremost(batch[1])).sum()
        if self._hook is not None:
            self._hook.after_backward()
        both = self._processes.mean(torch.stack([loss, right]))
        right_in_all = round(float(both[1]) * self._processes.place.count)
        return Stepped(float(both[0]), right_in_all, self._finite(both[0]))

    def update(self) -> None:
        """The optimizer's step; left out where a scaled gradient overflowed."""
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()

    def _pass(self, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
        """(loss, logits) of a part of the batch, detached; gradients are added up."""
        images, labels = batch
        with autocast(self._settings.device, self._settings.amp):
            answers = teacher_logits(self._teachers, images) if self._distil is not None else None
            with self._processes.norms():
                output = _answer(self._network, images)
        loss = classification_loss(output, labels)
        logits = logits_of(output)
        if self._distil is not None and answers is not None:
            taught = distillation_loss(logits, answers, labels, self._distil)
            loss = (1 - self._distil.weight) * loss + self._distil.weight * taught
        weighted = loss * weight if weight != 1 else loss
        with self._processes.watched():
            (weighted if self._scaler is None else self._scaler.scale(weighted)).backward()
        return loss.detach(), logits.detach()

    def _finite(self, loss: Tensor) -> bool:
        """False if a step would poison the weights. Clips the gradients on the way."""
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(loss)):
            return False
        if not bool(torch.isfinite(norm)):
            return self._scaler is not None and self._scaler.get_scale() > SMALLEST_SCALE
        if self._settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._settings.clip, norm)
        return True


def _foremost(labels: Tensor) -> Tensor:
    return labels if labels.ndim == 1 else labels.argmax(1)


def _answer(network: Any, images: Tensor) -> Any:
    try:
        return network(images)
    except (RuntimeError, ValueError) as error:  # auxiliary classifiers may need larger images, memory may end
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        failed = f"the model fails in training mode on a batch of {'x'.join(map(str, images.shape))}: {reason}"
        if len(images) == 1 and isinstance(error, ValueError):  # batch norms
            raise ConfigError(
                f"{failed}; take a larger --batch-size or a smaller --accumulate", key="batch_size"
            ) from error
        raise TrainingError(failed) from error

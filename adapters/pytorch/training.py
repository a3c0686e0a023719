"""The training loop: carries out one `Train` directive on a module.

Order, augmentation and dropout derive from (seed, directive, epoch) alone, so that a training stopped at
the end of an epoch and continued from the weights and optimizer of that moment ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from prunus.adapters.pytorch.averaging import WeightAverage
from prunus.adapters.pytorch.batches import Batch, TrainBatches
from prunus.adapters.pytorch.distillation import (
    Teacher,
    classification_loss,
    distillation_loss,
    logits_of,
    teacher_logits,
)
from prunus.adapters.pytorch.evaluation import evaluating
from prunus.adapters.pytorch.optimizers import TrainingSettings, channels_last
from prunus.adapters.pytorch.schedule import Epoch, epoch_seed, epochs_of, learning_rate, total_steps
from prunus.core.directives import Train, Trained
from prunus.core.errors import TrainingError


class StepHook(Protocol):
    """Changes the weights for the duration of a step and puts them back (gates)."""

    def before_forward(self) -> None: ...

    def after_backward(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is, after each step."""

    label: str
    step: int
    """Steps done, 1-based."""
    total: int
    loss: float
    lr: float


@dataclass(frozen=True, slots=True)
class Job:
    """One directive and what goes with it."""

    directive: Train
    index: int
    """Position of the directive in the run: part of the seed."""
    forward_macs: float
    """MACs of one forward pass of one image."""
    teachers: Sequence[Teacher] = ()
    """In the order of `directive.distil.teachers`; none is needed without `distil`."""
    make_hook: Callable[[], StepHook] | None = None
    """Called once the weights are in their layout for training."""
    decay: Callable[[float], None] | None = None
    """Called with the step's learning rate before the optimizer's step."""
    average: WeightAverage | None = None
    first_epoch: int = 0
    """Epochs that were done before a resume."""
    on_epoch_end: Callable[[int], None] | None = None
    """Called with the number of epochs done, after each but the last, with weights in their usual layout."""
    progress: Callable[[Progress], None] | None = None


@dataclass(slots=True)
class _Tally:
    loss: float = 0.0
    right: int = 0
    images: int = 0
    steps: int = 0


class Trainer:
    """Trains modules on one data set with one choice of settings."""

    def __init__(self, settings: TrainingSettings, batches: TrainBatches, seed: int) -> None:
        self.settings, self.batches, self.seed = settings, batches, seed

    def train(self, module: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> Trained:
        """Trains `module` in place; momentum and the like are carried by `optimizer` from job to job.

        Raises TrainingError naming the first step whose loss or gradient is NaN or infinite. That step is
        not taken, and buffers are put back to the beginning of its epoch.
        """
        total = total_steps(job.directive.epochs, self.batches.steps)
        tally = _Tally()
        teachers = [teacher.module for teacher in job.teachers]
        with evaluating(module, *teachers), torch.random.fork_rng():
            module.train()
            for epoch in epochs_of(total, self.batches.steps)[job.first_epoch :]:
                with channels_last(module, self.settings.channels_last):
                    tally = self._epoch(module, optimizer, job, epoch, total)
                if job.on_epoch_end is not None and epoch.first + epoch.steps < total:
                    job.on_epoch_end(epoch.number + 1)
        per_image = 3 * job.forward_macs + sum(teacher.macs for teacher in job.teachers)
        images = total * (tally.images // max(tally.steps, 1))
        return Trained(
            loss=tally.loss / max(tally.steps, 1),
            accuracy=tally.right / tally.images if tally.images else None,
            macs=per_image * images,
            steps=total,
        )

    def _epoch(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, job: Job, epoch: Epoch, total: int
    ) -> _Tally:
        seed = epoch_seed(self.seed, job.index, epoch.number)
        torch.manual_seed(seed)  # dropout and stochastic depth
        hook = job.make_hook() if job.make_hook is not None else None
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        tally = _Tally()
        for position, batch in zip(range(epoch.steps), self.batches.epoch(seed), strict=False):
            step = epoch.first + position
            rate = learning_rate(job.directive, self._peak(job.directive), step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, labels = self._on_device(batch)
            loss, logits = self._gradients(module, optimizer, job, hook, images, labels)
            if not self._finite(loss, optimizer):
                _put_back(module, buffers)
                raise TrainingError(
                    f"{job.directive.label}: the loss or its gradient is NaN or infinite at step {step + 1} of "
                    f"{total} (learning rate {rate:.3g}); try a smaller --lr or --amp off",
                    step=step + 1,
                )
            if job.decay is not None:
                job.decay(rate)
            optimizer.step()
            if job.average is not None:
                job.average.update()
            tally.loss += float(loss)
            tally.right += int((logits.argmax(1) == labels).sum())
            tally.images += len(labels)
            tally.steps += 1
            if job.progress is not None:
                job.progress(Progress(job.directive.label, step + 1, total, float(loss), rate))
        return tally

    def _peak(self, directive: Train) -> float:
        return self.settings.lr if directive.lr is None else directive.lr

    def _on_device(self, batch: Batch) -> Batch:
        images, labels = batch
        device = self.settings.device
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        return images.to(device, memory_format=layout, non_blocking=True), labels.to(device, non_blocking=True)

    def _gradients(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        job: Job,
        hook: StepHook | None,
        images: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(loss, logits), both detached; gradients are those of the weights without gates."""
        optimizer.zero_grad(set_to_none=True)
        distil = job.directive.distil if job.teachers else None
        with self.settings.autocast():
            answers = teacher_logits(job.teachers, images) if distil is not None else None
            if hook is not None:
                hook.before_forward()
            output = _answer(module, images)
        loss = classification_loss(output, labels)
        logits = logits_of(output)
        if distil is not None and answers is not None:
            taught = distillation_loss(logits, answers, labels, distil)
            loss = (1 - distil.weight) * loss + distil.weight * taught
        loss.backward()
        if hook is not None:
            hook.after_backward()
        return loss.detach(), logits.detach()

    def _finite(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """False if a step would poison the weights. Clips the gradients on the way."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
            return False
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return True


def _answer(module: nn.Module, images: Tensor) -> Any:
    try:
        return module(images)
    except RuntimeError as error:  # auxiliary classifiers may need larger images than the rest, memory may end
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        shape = "x".join(map(str, images.shape))
        raise TrainingError(f"the model fails in training mode on a batch of {shape}: {reason}") from error


@torch.no_grad()
def _put_back(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, value in module.named_buffers():
        value.copy_(buffers[name])

"""The training loop: carries out one `Train` directive on a module.

Order, augmentation and dropout derive from (seed, directive, epoch) alone, so that a training stopped at
the end of an epoch and continued from the weights and optimizer of that moment ends in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.averaging import WeightAverage
from prunus.adapters.pytorch.batches import Batch, TrainBatches
from prunus.adapters.pytorch.comparison import evaluating
from prunus.adapters.pytorch.compilation import Compiled
from prunus.adapters.pytorch.distillation import Teacher
from prunus.adapters.pytorch.mixed_precision import depthwise_in_float32
from prunus.adapters.pytorch.optimizers import TrainingSettings, channels_last
from prunus.adapters.pytorch.processes import ALONE, Processes
from prunus.adapters.pytorch.progress import Progress
from prunus.adapters.pytorch.schedule import Epoch, EpochsDone, epoch_seed, epochs_of, total_steps
from prunus.adapters.pytorch.step import StepHook, Stepper
from prunus.core.directives import Train, Trained
from prunus.core.errors import TrainingError


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
    done: EpochsDone = field(default_factory=EpochsDone)
    """Before a resume."""
    on_epoch_end: Callable[[EpochsDone], None] | None = None
    """Called after each epoch but the last, with weights in their usual layout."""
    progress: Callable[[Progress], None] | None = None
    notice: Callable[[str], None] = lambda text: None
    """Told what the user should know, in one line."""


@dataclass(slots=True)
class _Tally:
    loss: float = 0.0
    right: int = 0
    images: int = 0
    steps: int = 0

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.steps, 1)


class Trainer:
    """Trains modules on one data set with one choice of settings."""

    def __init__(
        self, settings: TrainingSettings, batches: TrainBatches, seed: int, processes: Processes = ALONE
    ) -> None:
        """`batches`: this process's share of those of `processes`."""
        self.settings, self.batches, self.seed, self.processes = settings, batches, seed, processes

    def train(self, module: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> Trained:
        """Trains `module` in place; momentum and the like are carried by `optimizer` from job to job.

        Raises TrainingError naming the first step whose loss or gradient is NaN or infinite. That step is
        not taken, and buffers are put back to the beginning of its epoch.
        """
        total = total_steps(job.directive.epochs, self.batches.steps)
        tally, done = _Tally(), job.done
        teachers = [teacher.module for teacher in job.teachers]
        with evaluating(module, *teachers), torch.random.fork_rng(), self._network(module, job) as network:
            module.train()
            for epoch in epochs_of(total, self.batches.steps)[done.count :]:
                with channels_last(module, self.settings.channels_last):
                    tally = self._epoch(module, network, optimizer, job, epoch, total)
                done = done.and_one(tally.mean_loss)
                if job.on_epoch_end is not None and epoch.first + epoch.steps < total:
                    job.on_epoch_end(done)
        optimizer.zero_grad(set_to_none=True)  # as large as the weights, and of no more use
        per_image = 3 * job.forward_macs + sum(teacher.macs for teacher in job.teachers)
        images = total * (tally.images // max(tally.steps, 1))
        return Trained(
            loss=tally.mean_loss,
            accuracy=tally.right / tally.images if tally.images else None,
            macs=per_image * images,
            steps=total,
            least=done.least,
        )

    @contextmanager
    def _network(self, module: nn.Module, job: Job) -> Iterator[nn.Module | Compiled]:
        """`module` as it is to be called: shared with the other processes, or compiled."""
        with ExitStack() as stack:
            if self.settings.amp != "off" and torch.device(self.settings.device).type == "cpu":
                stack.enter_context(depthwise_in_float32(module))
            with channels_last(module, self.settings.channels_last):  # gradients are exchanged in this layout
                network = stack.enter_context(self.processes.parallel(module))
            if self.settings.compile and network is not module:
                job.notice("torch.compile steps aside where several processes train together")
            yield self._compiled(module, job) if self.settings.compile and network is module else network

    def _compiled(self, module: nn.Module, job: Job) -> nn.Module | Compiled:
        hook = job.make_hook() if job.make_hook is not None else None
        if hook is not None and hook.watches:
            job.notice("torch.compile steps aside while gates change the statistics of norms")
            return module
        return Compiled(module, job.notice)

    def _epoch(
        self,
        module: nn.Module,
        network: nn.Module | Compiled,
        optimizer: torch.optim.Optimizer,
        job: Job,
        epoch: Epoch,
        total: int,
    ) -> _Tally:
        seed = epoch_seed(self.seed, job.index, epoch.number)
        place = self.processes.place
        torch.manual_seed(seed + place.rank)  # dropout and stochastic depth
        stepper = Stepper(
            self.settings.clipped(job.directive.clip),
            network,
            optimizer,
            self.processes,
            teachers=job.teachers,
            distil=job.directive.distil,
            hook=job.make_hook() if job.make_hook is not None else None,
        )
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        tally = _Tally()
        rates = self.settings.schedule.rates(job.directive, self._peak(job.directive), total, self.batches.steps)
        for position, batch in zip(range(epoch.steps), self.batches.epoch(seed), strict=False):
            step = epoch.first + position
            rate = rates(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, labels = self.settings.mixing.apply(self._on_device(batch), seed + 1 + position)
            stepped = stepper.passes(images, labels)
            if not stepped.finite:
                _put_back(module, buffers)
                advice = "a smaller --lr or --clip-grad 2" + ("" if self.settings.amp == "off" else " or --no-amp")
                raise TrainingError(
                    f"{job.directive.label}: the loss or its gradient is NaN or infinite at step {step + 1} of "
                    f"{total} (learning rate {rate:.3g}); try {advice}",
                    step=step + 1,
                )
            if job.decay is not None:
                job.decay(rate)
            stepper.update()
            if job.average is not None:
                job.average.update()
            tally.loss += stepped.loss
            tally.right += stepped.right
            tally.images += len(labels) * place.count
            tally.steps += 1
            if job.progress is not None:
                job.progress(Progress(job.directive.label, step + 1, total, stepped.loss, rate))
        return tally

    def _peak(self, directive: Train) -> float:
        return self.settings.lr if directive.lr is None else directive.lr

    def _on_device(self, batch: Batch) -> Batch:
        images, labels = batch
        device = self.settings.device
        wanted = self.settings.channels_last and images.dim() == 4
        layout = torch.channels_last if wanted else torch.contiguous_format
        return images.to(device, memory_format=layout, non_blocking=True), labels.to(device, non_blocking=True)


@torch.no_grad()
def _put_back(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, value in module.named_buffers():
        value.copy_(buffers[name])

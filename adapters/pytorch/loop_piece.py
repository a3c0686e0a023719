"""One `Train` directive, carried out by the steps of the user's loop."""

from __future__ import annotations

import warnings
from collections import deque

from torch import Tensor

from prunus.adapters.pytorch.adapter import PyTorchAdapter
from prunus.adapters.pytorch.averaging import WeightAverage
from prunus.adapters.pytorch.copies import copied, in_eval
from prunus.adapters.pytorch.distillation import distillation_loss, teacher_logits
from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.loop_hooks import LoopHooks
from prunus.adapters.pytorch.run_state import Remembered
from prunus.adapters.pytorch.schedule import learning_rate
from prunus.adapters.pytorch.unit_decay import UnitDecay
from prunus.core.directives import Train, Trained
from prunus.core.errors import ConfigError


class Piece:
    """How far a directive is, and everything it needs: gates, decay, teachers, a moving average."""

    def __init__(self, directive: Train, total: int, steps_per_epoch: int, adapter: PyTorchAdapter) -> None:
        self.directive, self.total, self.done = directive, total, 0
        model, wiring = adapter.model, adapter.shrinking.wiring
        gating = Gating(model, wiring, directive.gates) if directive.gates is not None else None
        decay = UnitDecay(model, wiring, directive.decay) if directive.decay else None
        self.hooks = LoopHooks(model, adapter.optimizer, gating, decay, directive.clip)
        self._teachers = adapter.teachers(directive)
        self._taught = False
        self._losses: deque[float] = deque(maxlen=steps_per_epoch)
        self._macs = 3 * adapter.forward_macs + sum(teacher.macs for teacher in self._teachers)
        self._averaged = copied(model) if directive.ema is not None else None
        self._average = (
            WeightAverage(self._averaged, model, directive.ema)
            if self._averaged is not None and directive.ema is not None
            else None
        )

    def learning_rate(self, run_rate: float) -> float:
        """Of the next step, in the method's schedule; `run_rate` where the method names no peak."""
        directive = self.directive
        peak = run_rate if directive.lr is None else directive.lr
        return learning_rate(directive, peak, self.done, self.total)

    def distil(self, loss: Tensor, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`loss` and what the teachers say, in the directive's proportion."""
        self._taught = True
        wanted = self.directive.distil
        if wanted is None or not self._teachers:
            return loss
        answers = teacher_logits(self._teachers, images)
        return (1 - wanted.weight) * loss + wanted.weight * distillation_loss(logits, answers, labels, wanted)

    def stepped(self, loss: float) -> None:
        """The optimizer has made a step. Raises ConfigError if the model had no part in it."""
        if self.hooks.images == 0:
            raise ConfigError(
                "run.step() was called, but the model that begin() was given has made no forward pass in "
                "training mode; train that very object, and call model.train()"
            )
        self.hooks.settle()
        if self._average is not None:
            self._average.update()
        self._losses.append(loss)
        self.done += 1

    def finished(self, adapter: PyTorchAdapter) -> Trained:
        """What came of it; the model and the optimizer are free of hooks again."""
        self.hooks.close()
        if self._teachers and not self._taught:
            warnings.warn(
                f"{self.directive.label}: the method wanted to distil from "
                f"{', '.join(teacher.name for teacher in self._teachers)}, but the loop does not call "
                "run.distil(loss, logits, images, labels); it was trained without",
                stacklevel=4,
            )
        if self._averaged is not None:
            adapter.snapshots["ema"] = Remembered(in_eval(self._averaged), adapter.plan, adapter.forward_macs)
        adapter.trained()
        loss = sum(self._losses) / len(self._losses)
        return Trained(loss=loss, accuracy=None, macs=self._macs * self.hooks.images, steps=self.done)


__all__ = ["Piece"]

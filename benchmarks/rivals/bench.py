"""What every rival shares with our methods: model and data, the training loop, the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from prunus.adapters.pytorch.adapter import PyTorchAdapter
from prunus.adapters.pytorch.distillation import Teacher
from prunus.adapters.pytorch.evaluation import evaluate
from prunus.adapters.pytorch.recalibration import recalibrate
from prunus.adapters.pytorch.training import Job, StepHook, Trainer
from prunus.core.compare_cell import RivalJob
from prunus.core.compare_record import Outcome
from prunus.core.directives import Distillation, Train
from prunus.core.settings import RunSettings

CALIBRATION = 2000
"""Images that batch-norm statistics are estimated on again."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One choice of settings, carried out; the best on the held-out part is the rival's answer."""

    model: nn.Module
    macs: float
    training_macs: float
    holdout: float
    settings: str


class Bench:
    """Model and data of one rival's cell. Trainings use the product's loop, order and augmentation."""

    def __init__(self, job: RivalJob, settings: RunSettings | None = None) -> None:
        self.job = job
        self.adapter = cast(PyTorchAdapter, job.open_session(settings or job.settings).adapter)
        assert self.adapter.data is not None
        self.graph = self.adapter.graph
        """Of the whole model, with the floors that our methods have."""
        self.data = self.adapter.data
        self.training = self.adapter.settings.training
        self.example = self.adapter.origin.input.example(1)

    @property
    def model(self) -> nn.Module:
        return self.adapter.model

    @property
    def teaching(self) -> tuple[bool, ...]:
        """Whether the dense model teaches: where it may, the held-out part decides."""
        return (False,) if self.job.teaching == "plain" else (False, True)

    def train(
        self,
        model: nn.Module,
        directive: Train,
        macs: float,
        *,
        taught: bool = False,
        make_hook: Callable[[], StepHook] | None = None,
    ) -> float:
        """Train `model`, of `macs` per image, in place, with a fresh optimizer; returns the MACs spent."""
        if directive.epochs <= 0:
            return 0.0
        teachers: list[Teacher] = []
        if taught:
            weight = 0.7 if directive.epochs < 3 else 0.5  # as in our own recovery
            directive = replace(directive, distil=Distillation(weight=weight))
            teachers = [Teacher(self.model, "dense", self.job.dense.macs)]
        trainer = Trainer(self.training, self.data.train, self.adapter.settings.seed)
        job = Job(directive=directive, index=1, forward_macs=macs, teachers=teachers, make_hook=make_hook)
        return trainer.train(model, self.training.make_optimizer(model), job).macs

    def recalibrate(self, model: nn.Module) -> None:
        recalibrate(model, self.data.calibration.part(CALIBRATION))

    def judge(self, model: nn.Module) -> float:
        """Accuracy on the held-out part."""
        return evaluate(model, self.data.holdout, self.training.device).accuracy

    def answer(self, attempts: Sequence[Attempt], *, uses_dense: bool, tried: int = 1, by: str = "") -> Outcome:
        """The best attempt on held-out images, tested. What the other attempts cost is not charged.

        `tried` counts combinations of settings, those that were given up early included; `by` is the package,
        with its version, that did the work.
        """
        best = max(attempts, key=lambda attempt: attempt.holdout)
        said = f"best of {tried} on the held-out part: " if tried > 1 else ""
        return Outcome(
            accuracy=evaluate(best.model, self.data.test, self.training.device).accuracy,
            holdout=best.holdout,
            macs=best.macs,
            params=sum(parameter.numel() for parameter in best.model.parameters()),
            training_macs=best.training_macs,
            uses_dense=uses_dense,
            notes=(said + best.settings, *([by] if by else [])),
        )

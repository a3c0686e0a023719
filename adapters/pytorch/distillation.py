"""Learning from teachers as well as from labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunus.core.directives import Distillation
from prunus.core.errors import LoadError

_TRUST = 0.5
"""Temperature of the weights among teachers (methods, section 1.4)."""
_AUXILIARY = 0.4
"""Weight of an auxiliary classifier's loss (Szegedy et al. 2016; 0.3 in 2015)."""


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A model whose answers are imitated; it is not changed."""

    module: nn.Module
    name: str
    macs: float
    """MACs of one forward pass of one image."""


def logits_of(output: Any) -> Tensor:
    """The main classifier's (batch, classes) of whatever a model's forward returns."""
    main = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else None
    if not isinstance(main, Tensor) or main.ndim != 2:
        raise LoadError(
            f"the model answers with {_described(output)}; only classifiers, which answer with (batch, classes), "
            "can be trained or evaluated here (use --data none)"
        )
    return main


def _described(output: Any) -> str:
    return (
        f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    )


def classification_loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy; auxiliary classifiers, which answer in training mode beside the main one, count 0.4 each.

    labels: (batch,) classes, or (batch, classes) shares of each.
    """
    loss = functional.cross_entropy(logits_of(output).float(), labels)
    if isinstance(output, tuple):
        for extra in output[1:]:
            if isinstance(extra, Tensor) and extra.ndim == 2:
                loss = loss + _AUXILIARY * functional.cross_entropy(extra.float(), labels)
    return loss


@torch.no_grad()
def teacher_logits(teachers: Sequence[Teacher], images: Tensor) -> Tensor:
    """(teachers, batch, classes), float32; the teachers are in eval mode already."""
    return torch.stack([logits_of(teacher.module(images)).float() for teacher in teachers])


def teacher_weights(logits: Tensor, labels: Tensor, per_sample: bool) -> Tensor:
    """(teachers, batch), summing to 1 over teachers: softmax_k(-CE_k(x) / 0.5), or equal weights."""
    count, batch = logits.shape[:2]
    if not per_sample or count == 1:
        return logits.new_full((count, batch), 1 / count)
    repeated = torch.cat([labels] * count)  # classes, or shares of each
    errors = functional.cross_entropy(logits.flatten(0, 1), repeated, reduction="none")
    return torch.softmax(-errors.view(count, batch) / _TRUST, dim=0)


def distillation_loss(student: Tensor, logits: Tensor, labels: Tensor, settings: Distillation) -> Tensor:
    """T^2 sum_k w_k(x) KL(p_k || p_student), mean over the batch (Hinton et al. 2015, for several teachers).

    student: (batch, classes); logits: (teachers, batch, classes).
    """
    if student.shape != logits.shape[1:]:
        raise LoadError(f"the teachers know {logits.shape[2]} classes, the model {student.shape[1]}")
    temperature = settings.temperature
    ours = functional.log_softmax(student.float() / temperature, dim=1)
    theirs = functional.log_softmax(logits / temperature, dim=2)
    divergence = (theirs.exp() * (theirs - ours)).sum(2)
    weights = teacher_weights(logits, labels, settings.per_sample)
    return temperature**2 * (weights * divergence).sum(0).mean()

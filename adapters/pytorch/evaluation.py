"""Loss and accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from prunus.adapters.pytorch.batches import Batch
from prunus.adapters.pytorch.comparison import evaluating
from prunus.adapters.pytorch.distillation import logits_of
from prunus.adapters.pytorch.processes import ALONE, Processes
from prunus.core.directives import Evaluated
from prunus.core.errors import LoadError, TrainingError


@torch.no_grad()
def evaluate(
    module: nn.Module, batches: Iterable[Batch], device: str = "cpu", processes: Processes = ALONE
) -> Evaluated:
    """Mean cross-entropy and top-1 share over all images, in eval mode and float32.

    `batches` are this process's share; the answer is over the shares of all `processes`.
    Raises TrainingError if an output is NaN or infinite, LoadError if there is no image or a label is
    beyond the model's classes.
    """
    loss, right, samples = 0.0, 0, 0
    with evaluating(module):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            logits = logits_of(module(images)).float()
            if not bool(torch.isfinite(logits).all()):
                raise TrainingError("the model's outputs are NaN or infinite; nothing can be evaluated")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= logits.shape[1]:
                wrong = low if low < 0 else high
                raise LoadError(f"the data has a class {wrong}, the model knows 0..{logits.shape[1] - 1}")
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            samples += len(labels)
    total = processes.sum(torch.tensor([loss, right, samples], dtype=torch.float64))
    loss, right, samples = float(total[0]), int(total[1]), int(total[2])
    if not samples:
        raise LoadError("there is no image to evaluate on")
    return Evaluated(loss=loss / samples, accuracy=right / samples, samples=samples)

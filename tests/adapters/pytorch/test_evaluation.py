"""Evaluation counts right, disturbs nothing and refuses nonsense."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prunus.adapters.pytorch.evaluation import evaluate
from prunus.core.errors import LoadError, TrainingError


def identity() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.9))


def test_loss_and_accuracy_are_means_over_images_however_they_are_batched() -> None:
    logits, labels = torch.randn(10, 3), torch.randint(0, 3, (10,))
    whole = evaluate(identity(), [(logits, labels)])
    parts = evaluate(identity(), list(zip(logits.split(3), labels.split(3), strict=True)))
    assert whole.samples == parts.samples == 10
    assert whole.loss == pytest.approx(parts.loss)
    assert whole.accuracy == parts.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_a_blank_answer_costs_the_logarithm_of_the_classes() -> None:
    assert evaluate(identity(), [(torch.zeros(4, 5), torch.arange(4))]).loss == pytest.approx(math.log(5))


def test_every_submodule_is_left_in_the_mode_it_was_in() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model.train()
    model[1].eval()
    evaluate(model, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))])
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(model[2].running_mean, torch.zeros(3))


def test_nonsense_is_refused() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TrainingError, match="NaN or infinite"):
        evaluate(identity(), [(torch.full((2, 3), torch.nan), labels)])
    with pytest.raises(LoadError, match=r"class 3, the model knows 0\.\.2"):
        evaluate(identity(), [(torch.zeros(2, 3), labels + 3)])
    with pytest.raises(LoadError, match="no image"):
        evaluate(identity(), [])

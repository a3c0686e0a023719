"""The distillation loss against its formula, and what counts as a classifier's answer."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch.nn import functional

from prunus.adapters.pytorch.distillation import (
    classification_loss,
    distillation_loss,
    logits_of,
    teacher_weights,
)
from prunus.core.directives import Distillation
from prunus.core.errors import LoadError


def by_the_formula(
    student: np.ndarray, teachers: np.ndarray, labels: np.ndarray, t: float, per_sample: bool
) -> float:
    total = 0.0
    for i, label in enumerate(labels):
        errors = np.array([-log_softmax(z[i])[label] for z in teachers])
        weights = softmax(-errors / 0.5) if per_sample else np.full(len(teachers), 1 / len(teachers))
        for weight, z in zip(weights, teachers, strict=True):
            p, q = log_softmax(z[i] / t), log_softmax(student[i] / t)
            total += weight * t**2 * float((np.exp(p) * (p - q)).sum())
    return total / len(labels)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_the_loss_is_the_weighted_divergence_from_each_teacher(count: int, per_sample: bool) -> None:
    rng = np.random.default_rng(0)
    student, teachers = rng.normal(size=(5, 4)), 2 * rng.normal(size=(count, 5, 4))
    labels = rng.integers(0, 4, 5)
    loss = distillation_loss(
        torch.from_numpy(student),
        torch.from_numpy(teachers),
        torch.from_numpy(labels),
        Distillation(temperature=3.0, per_sample=per_sample),
    )
    assert float(loss) == pytest.approx(by_the_formula(student, teachers, labels, 3.0, per_sample), rel=1e-5)


def test_who_answers_like_the_teacher_loses_nothing() -> None:
    logits = torch.randn(6, 5)
    assert float(distillation_loss(logits, logits[None], torch.zeros(6, dtype=torch.int64), Distillation())) < 1e-6


def test_the_teacher_that_is_right_about_an_image_is_listened_to() -> None:
    right, wrong = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    weights = teacher_weights(torch.stack([right, wrong]), torch.tensor([0]), per_sample=True)
    assert weights[0, 0] > 0.99
    torch.testing.assert_close(weights.sum(0), torch.ones(1))


def test_teachers_of_other_classes_are_refused() -> None:
    with pytest.raises(LoadError, match="teachers know 7 classes, the model 5"):
        distillation_loss(
            torch.zeros(2, 5), torch.zeros(1, 2, 7), torch.zeros(2, dtype=torch.int64), Distillation()
        )


def test_auxiliary_classifiers_count_less_than_the_main_one() -> None:
    outputs = namedtuple("outputs", ["logits", "aux"])
    main, aux, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    loss = classification_loss(outputs(main, aux), labels)
    torch.testing.assert_close(
        loss, functional.cross_entropy(main, labels) + 0.4 * functional.cross_entropy(aux, labels)
    )


@pytest.mark.parametrize("output", [{"out": torch.zeros(1, 2)}, torch.zeros(1, 2, 3, 3), [torch.zeros(1, 2)]])
def test_a_model_that_is_no_classifier_is_refused(output: object) -> None:
    with pytest.raises(LoadError, match="only classifiers"):
        logits_of(output)

"""Batch-norm statistics estimated again, and put back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.recalibration import recalibrate


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    model.append(nn.BatchNorm2d(2, momentum=0.3))
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(1)).split(10))


def test_statistics_are_the_average_over_the_batches(model: nn.Sequential, batches: list[Tensor]) -> None:
    recalibrate(model, batches)
    with torch.no_grad():
        seen = [model[0](batch) for batch in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)


def test_everything_else_is_as_before_and_restoring_undoes_it(model: nn.Sequential, batches: list[Tensor]) -> None:
    model.train()
    model(batches[0])
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    old = recalibrate(model, batches)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
    assert model.training and not model[1].training and model[4].momentum == 0.3
    old.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_images_nothing_changes(model: nn.Sequential) -> None:
    before = copy.deepcopy(model.state_dict())
    recalibrate(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

"""A copy that hides nothing shares all that was not constant, and keeps ties."""

from __future__ import annotations

import torch
from torch import nn

from prunus.adapters.pytorch.structural_copy import expressive_copy, separate_copy, structural_copy


def test_constant_parameters_become_noise_and_the_rest_is_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 5))
    nn.init.zeros_(model[2].weight)
    model[3].weight = model[2].weight
    copied = expressive_copy(model)
    assert copied[0].weight is model[0].weight
    assert copied[2].weight.std() > 0.1
    assert copied[3].weight is copied[2].weight
    assert 0.6 <= float(copied[1].weight.min()) < float(copied[1].weight.max()) <= 1.4
    assert float(copied[1].running_var.min()) >= 0.6
    assert not model[2].weight.any() and bool((model[1].running_var == 1).all())


def test_a_copy_is_the_same_each_time() -> None:
    model = nn.BatchNorm1d(5)
    first, second = expressive_copy(model), expressive_copy(model)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, first.running_var)


def test_computed_tensors_in_containers_are_copied_and_shared_ones_stay_shared() -> None:
    model = nn.Linear(4, 5)
    model.direct = model.weight * 2
    model.kept = [model.weight * 2, model.weight[:2], model.direct]
    shared = structural_copy(model)
    assert shared.weight is model.weight and shared.direct is shared.kept[2] is model.direct
    assert torch.equal(shared.kept[0], model.kept[0]) and shared.kept[0].is_leaf
    assert shared.kept[1].data_ptr() == model.weight.data_ptr()
    own = separate_copy(model)
    assert own.weight is not model.weight and own.direct is own.kept[2] is not model.direct
    assert own.kept[1].data_ptr() == own.weight.data_ptr()
    assert separate_copy(model, parameters=False).weight is model.weight

"""What a call from Python would ignore is refused: names beside objects, objects beside names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from prunus.adapters.pytorch import begin, prune
from prunus.core.errors import ConfigError

IMAGES = torch.zeros(40, 3, 8, 8)
DATA = TensorDataset(IMAGES, torch.arange(40) % 2)


def _module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "ignored",
    [{"train_data": DATA}, {"test_data": DATA}, {"example_inputs": IMAGES[:2]}, {"trained": False}],
    ids=lambda ignored: next(iter(ignored)),
)
def test_a_model_by_name_takes_no_objects(ignored: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="goes with a module; 'prunus/resnet8'") as caught:
        prune("prunus/resnet8", **ignored)
    assert caught.value.key == next(iter(ignored))


@pytest.mark.parametrize(
    "ignored",
    [
        {"data": "fashion-mnist"},
        {"data": "none"},  # beside train_data
        {"pretrained": True},
        {"checkpoint": "weights.safetensors"},
        {"img_size": 32},
        {"adapter": "pytorch"},
    ],
    ids=lambda ignored: "=".join(map(str, *ignored.items())),
)
def test_a_module_takes_nothing_by_name(ignored: dict[str, Any]) -> None:
    model, (key,) = _module(), ignored
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="that has a name") as caught:
        prune(model, IMAGES[:2], train_data=DATA, **ignored)
    assert caught.value.key == key
    with pytest.raises(ConfigError, match="that has a name") as caught:
        begin(model, IMAGES[:2], optimizer=optimizer, train_data=DATA, epochs=1, **ignored)
    assert caught.value.key == key


def test_a_module_may_say_that_it_has_no_data(tmp_path: Path) -> None:
    ranked = {"plugin": "one-shot", "importance": "magnitude", "target": "macs=60%", "output": tmp_path / "run"}
    pruned = prune(_module(), IMAGES[:2], data="none", **ranked)
    assert pruned.report.data == "none"

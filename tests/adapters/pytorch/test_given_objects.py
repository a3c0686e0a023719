"""Models and data given as objects: what cannot be followed is refused, what would be ignored, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from prunus.adapters.pytorch import begin, load, prune
from prunus.core.errors import ConfigError, TraceError

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


class Remembering(nn.Module):
    """Keeps an object in its state dict that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images).mean((2, 3)))
        return out

    def get_extra_state(self) -> dict[str, str]:
        return {"recipe": "mine"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        assert state == {"recipe": "mine"}


def test_state_that_is_no_tensor_is_left_to_the_class_that_keeps_it(tmp_path: Path) -> None:
    trains = {"epochs": 1, "batch_size": 6, "lr": 0.01, "model_ema": True, "output": tmp_path / "run"}
    pruned = prune(Remembering(), IMAGES[:2], train_data=DATA, plugin="iterative", target="macs=60%", **trains)
    again = load(tmp_path / "run", original=Remembering())
    assert torch.equal(again(IMAGES[:2]), pruned.model(IMAGES[:2]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["compiled by torch.jit", "quantized"])
def test_a_model_out_of_pythons_reach_is_refused_with_what_to_do(kind: str) -> None:
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    if kind == "quantized":
        last = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 2)), dtype=torch.qint8)
    else:
        convolution, last = torch.jit.script(convolution), nn.Linear(8, 2)
    model = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    with pytest.raises(TraceError, match=rf"is {kind}; prune the model that it was made from, then"):
        prune(model, IMAGES[:2], plugin="one-shot", importance="magnitude")


class Attending(nn.Module):
    """What enters nn.MultiheadAttention's projections is not measured."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        out: Tensor = self.head(self.hidden(tokens).relu().mean(1))
        return out


@pytest.mark.parametrize("plugin", ["gsm-anneal", "bayes-reparam"])
def test_widths_are_tried_beside_layers_whose_inputs_nobody_measures(plugin: str, tmp_path: Path) -> None:
    config = {"sensitivity": "yes", "sweeps": 1}
    trains = {"epochs": 1, "batch_size": 6, "lr": 0.01, "output": tmp_path / "run"}
    pruned = prune(
        Attending(), IMAGES[:2], train_data=DATA, plugin=plugin, target="macs=60%", config=config, **trains
    )
    assert pruned.report.target_met
    noted = {row.get("kind") for row in pruned.report.history} | {row.get("note") for row in pruned.report.history}
    assert noted & {"energies", "covariance-missing"}

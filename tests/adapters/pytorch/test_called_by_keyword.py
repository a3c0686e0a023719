"""A forward may call its layers by keyword, `conv(input=x)`: nothing depends on how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from prunus.adapters.pytorch import prune


class Network(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 4)
        self.by_keyword = by_keyword

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self._call(self.norm, self._call(self.first, images)))
        return self._call(self.head, torch.relu(self._call(self.second, x)).mean((2, 3)))

    def _call(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(input=x) if self.by_keyword else layer(x)
        return out


@pytest.mark.parametrize(
    "config",
    [{"refit": "least-squares"}, {"expansion": "branches", "layers": "all"}],
    ids=lambda config: "-".join(config.values()),
)
def test_layers_called_by_keyword_are_pruned_as_those_called_by_position(
    config: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(120, 3, 8, 8), torch.randint(0, 4, (120,)))
    weights = Network(by_keyword=False).state_dict()
    found = []
    for by_keyword in (False, True):
        model = Network(by_keyword)
        model.load_state_dict(weights)
        output = tmp_path / str(by_keyword)
        found.append(
            prune(model, data[:2][0], train_data=data, config=config, epochs=1, batch_size=32, output=output)
        )
    one, other = found
    assert one.plan.keep == other.plan.keep and one.plan.keep
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name

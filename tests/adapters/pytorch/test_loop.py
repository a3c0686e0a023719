"""A loop of the user's own: the run does everything but the steps, and everything the loop holds follows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from prunus.adapters.pytorch import begin, load
from prunus.adapters.pytorch.loop import LoopRun
from prunus.core.errors import ConfigError, TrainingError

DIGITS = load_digits()


def images() -> TensorDataset:
    pixels = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16 - 0.3
    return TensorDataset(pixels, torch.tensor(DIGITS.target, dtype=torch.int64))


def part(first: int, count: int) -> Subset[Any]:
    return Subset(images(), range(first, first + count))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.one(x), 2)
        x = x + self.two(x)
        return self.head(self.three(x).mean((2, 3)))


LOADER = DataLoader(part(0, 640), batch_size=64, shuffle=True, drop_last=True)
QUICK: dict[str, dict[str, Any]] = {
    "one-shot": {},
    "iterative": {"rounds": 2},
    "gsm-anneal": {"rounds": 2},
    "bayes-reparam": {"rounds": 2},
}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, y in LOADER:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def start(model: nn.Module, optimizer: torch.optim.Optimizer, **given: Any) -> LoopRun:
    chosen: dict[str, Any] = {"plugin": "one-shot", "target": "macs=50%", "epochs": 1.0, "train_data": LOADER}
    chosen |= {"holdout_data": part(640, 200), "test_data": part(900, 400)}
    return begin(model, torch.randn(2, 1, 8, 8), optimizer=optimizer, **{**chosen, **given})


def steps() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    while True:
        yield from LOADER


def go_on(run: LoopRun, model: nn.Module, optimizer: torch.optim.Optimizer, most: int = 200) -> int:
    """The plain loop; the number of steps that it took."""
    model.train()
    for taken, (x, y) in enumerate(steps()):
        if run.done:
            return taken
        assert taken < most
        optimizer.zero_grad()
        logits = model(x)
        loss = run.distil(functional.cross_entropy(logits, y), logits, x, y)
        loss.backward()
        optimizer.step()
        run.step(loss)
    raise AssertionError


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


@pytest.mark.parametrize("plugin", QUICK)
def test_a_plain_loop_prunes_to_the_target(trained: nn.Module, tmp_path: Path, plugin: str) -> None:
    model = copy.deepcopy(trained)
    optimizer = sgd(model)
    run = start(model, optimizer, plugin=plugin, config=QUICK[plugin], epochs=2.0)
    taken = go_on(run, model, optimizer)
    assert 18 <= taken <= 22  # two epochs of ten steps, in whole steps per round
    finished = run.finish()
    assert finished.model is model
    assert model.training
    report = finished.report
    assert report.target_met
    assert report.pruned.macs <= 0.5 * report.dense.macs
    assert report.verification.kind == "exact"
    assert report.verification.max_error <= 1e-4 * report.verification.scale
    assert report.pruned.accuracy is not None
    assert report.pruned.accuracy > 0.5
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == mine
    for parameter, state in optimizer.state.items():
        assert id(parameter) in mine
        assert state["momentum_buffer"].shape == parameter.shape
    folder = run.save(tmp_path / "run")
    again = load(folder, original=Small())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))

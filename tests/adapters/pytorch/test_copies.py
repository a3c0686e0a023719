"""Models whose classes copy, or change mode, in a way of their own: kept features, locks, a `train` of theirs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as mask
from torch.utils.data import TensorDataset

from prunus.adapters.pytorch import begin, load, prune, trace
from prunus.adapters.pytorch.copies import copied
from prunus.core.errors import TraceError

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(40) % 2)
RANKED: dict[str, Any] = {"plugin": "one-shot", "importance": "magnitude", "target": "macs=60%"}
TRAINED: dict[str, Any] = {"train_data": DATA, "epochs": 1, "batch_size": 12, "lr": 0.01, "target": "macs=60%"}


class Keeping(nn.Module):
    """Keeps what it computed, for a look or a loss; in more than one way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
        self.features: Any = None
        self.by_name: dict[str, list[Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        self.features = self.one(images).relu()
        self.by_name["two"] = [self.two(self.features).relu()]
        out: Tensor = self.head(self.by_name["two"][0].mean((2, 3)))
        return out


def test_tensors_with_a_history_are_copied_without_it() -> None:
    model = Keeping()
    model(IMAGES).sum().backward()
    copy = copied(model)
    assert torch.equal(copy.features, model.features) and copy.features.grad_fn is None
    assert torch.equal(copy.by_name["two"][0], model.by_name["two"][0])
    assert model.features.grad_fn is not None  # the user's own is left alone
    assert torch.equal(copy(IMAGES), model(IMAGES))
    assert not {id(p) for p in copy.parameters()} & {id(p) for p in model.parameters()}


class Borrowing(nn.Module):
    """Reads a part of another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.again = nn.Linear(3, 6), nn.Linear(3, 2)
        self.rows = self.embedding.weight[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x) + x @ self.rows.T


def test_a_view_of_a_weight_is_a_view_of_the_copys_weight() -> None:
    model = Borrowing()
    copy, x = copied(model), torch.randn(2, 3)
    assert torch.equal(copy(x), model(x))
    with torch.no_grad():
        copy.embedding.weight.fill_(1)
    assert torch.equal(copy.rows, torch.ones(2, 3))
    copy(x).sum().backward()
    assert copy.embedding.weight.grad is not None and model.embedding.weight.grad is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "derived",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: mask.l1_unstructured(m, "weight", 0.3)],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_weights_that_are_computed_before_each_pass_are_the_copys_own(derived: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    derived(model[0])
    model(IMAGES)
    model.eval()
    copy = copied(model)
    before = model(IMAGES)
    assert torch.equal(copy(IMAGES), before)
    copy(IMAGES).square().sum().backward()
    torch.optim.SGD(copy.parameters(), lr=0.1).step()
    assert not torch.equal(copy(IMAGES), before)  # the new weights are in use
    assert torch.equal(copied(copy)(IMAGES), copy(IMAGES))
    assert torch.equal(model(IMAGES), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("derived", [nn.utils.weight_norm, lambda m: mask.random_unstructured(m, "weight", 3)])
def test_layers_with_computed_weights_are_pruned(derived: Any, tmp_path: Path) -> None:
    def module() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        derived(model[0])
        return model

    pruned = prune(module(), IMAGES[:2], **RANKED, output=tmp_path / "run")
    assert pruned.report.target_met and pruned.report.verification.kind == "exact"
    assert torch.equal(load(tmp_path / "run", original=module())(IMAGES), pruned.model(IMAGES))


def test_a_run_trains_and_copies_a_model_that_keeps_features(tmp_path: Path) -> None:
    model = Keeping()
    model(IMAGES)
    config = {"rounds": 1, "distil": "never"}
    pruned = prune(model, IMAGES[:2], plugin="iterative", config=config, **TRAINED, output=tmp_path / "run")
    assert pruned.report.target_met
    assert torch.equal(load(tmp_path / "run", original=Keeping())(IMAGES), pruned.model(IMAGES))


def test_what_cannot_be_copied_is_refused_by_name() -> None:
    model = nn.Sequential(Keeping())
    model[0].lock = threading.Lock()
    with pytest.raises(TraceError, match=r"^0\.lock \(lock\) cannot be copied.*set it to None meanwhile"):
        prune(model, IMAGES[:2], **RANKED)
    with pytest.raises(TraceError, match=r"^0\.lock "):
        trace(model, IMAGES[:2])
    del model[0].lock
    model[0].two.register_buffer("table", Uncopyable(torch.zeros(2)))
    with pytest.raises(TraceError, match=r"^0\.two\.table \(Uncopyable\) cannot be copied \(not this one\)"):
        copied(model)


class Uncopyable(Tensor):
    @staticmethod
    def __new__(cls, value: Tensor) -> Uncopyable:
        return value.as_subclass(cls)

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError("not this one")


class Frozen(nn.Module):
    """Keeps its norms in eval mode, as detectors do: nothing is returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 2)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.body[1].eval()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images).mean((2, 3)))
        return out


def test_a_train_that_returns_nothing_is_no_hindrance(tmp_path: Path) -> None:
    pruned = prune(Frozen(), IMAGES[:2], **RANKED, output=tmp_path / "run")
    assert pruned.report.target_met and not pruned.model.training
    assert torch.equal(load(tmp_path / "run", original=Frozen())(IMAGES), pruned.model(IMAGES))


def test_a_train_that_returns_nothing_is_no_hindrance_in_a_loop_of_ones_own() -> None:
    model = Frozen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config: Any = {"train_data": DATA, "steps_per_epoch": 4, "epochs": 2, "config": {"rounds": 2}}
    run = begin(model, IMAGES[:2], optimizer=optimizer, target="macs=60%", batch_size=12, **config)
    model.train()
    while not run.done:
        optimizer.zero_grad()
        logits = model(IMAGES[:12])
        loss = run.distil(nn.functional.cross_entropy(logits, DATA.tensors[1][:12]), logits, IMAGES[:12], IMAGES)
        loss.backward()
        optimizer.step()
        run.step(loss)
    assert run.finish().report.target_met

"""A run that Python began on objects goes on by the same call; commands say that they cannot make its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from prunus.adapters.pytorch import Pruned, load, prune
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.weights import weights_digest
from prunus.core.cli import run
from prunus.core.errors import ConfigError, JournalError


class Network(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU()
            )
            self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images).mean((2, 3)))
        return out


class Images(Dataset[tuple[Tensor, int]]):
    """Noise with labels; after `reads` images the disk is gone."""

    def __init__(self, count: int = 200, reads: int | None = None) -> None:
        self.images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.targets = [i % 4 for i in range(count)]
        self.left = reads

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError(5, "Input/output error")
        return self.images[index], self.targets[index]


def _prune(folder: Path, data: Images | None = None, seed: int = 0, **changes: Any) -> Pruned:
    given: dict[str, Any] = {"plugin": "gsm-anneal", "epochs": 3, "batch_size": 20, "lr": 0.05, "threads": 1}
    given |= {"output": folder, "resume": True, **changes}
    return prune(Network(seed), torch.randn(2, 3, 8, 8), train_data=data or Images(), **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return _prune(tmp_path_factory.mktemp("whole") / "run")  # resume=True where nothing began: begins


@pytest.fixture
def died(tmp_path: Path) -> Path:
    """The folder of a run whose disk went away in its recovery."""
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="Input/output"):
        _prune(folder, Images(reads=900))
    assert len(list((folder / "journal").glob("0*.json"))) > 40
    assert not (folder / "report.json").exists()
    return folder


def test_the_same_call_again_ends_in_the_plan_and_weights_of_an_undisturbed_run(died: Path, whole: Pruned) -> None:
    resumed = _prune(died)
    assert resumed.plan == whole.plan
    assert weights_digest(resumed.model) == weights_digest(whole.model)
    assert resumed.report.pruned == whole.report.pruned
    assert weights_digest(load(died, original=Network())) == weights_digest(whole.model)


def test_a_finished_run_is_given_back_by_the_same_call(whole: Pruned) -> None:
    again = _prune(whole.folder)
    assert again.plan == whole.plan
    assert weights_digest(again.model) == weights_digest(whole.model)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"data": Images(220)}, {"lr": 0.1}, {"target": "macs=40%"}],
    ids=["other weights", "other data", "another rate", "another target"],
)
def test_a_run_goes_on_with_what_it_began_with_alone(died: Path, changes: dict[str, Any]) -> None:
    before = sorted(path.name for path in (died / "journal").iterdir())
    with pytest.raises(JournalError, match="belongs to another model, data set, configuration"):
        _prune(died, **changes)
    assert sorted(path.name for path in (died / "journal").iterdir()) == before


@pytest.mark.parametrize("changes", [{"output": None}, {"overwrite": True}], ids=["no folder", "overwrite"])
def test_resuming_wants_a_folder_and_does_not_overwrite(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="resume=True needs output"):
        _prune(tmp_path / "run", **changes)


@pytest.mark.parametrize("words", [["prune", "--resume"], ["evaluate"], ["export"], ["latency"]])
@pytest.mark.parametrize("trust", [[], ["--trust"]])
def test_a_command_says_that_only_the_program_can_make_the_model_again(
    words: list[str], trust: list[str], whole: Pruned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, str(whole.folder), *trust]) == 2
    assert "was an object in Python" in capsys.readouterr().err


def test_the_report_of_such_a_run_offers_what_works_alone(
    whole: Pruned, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(whole.folder)]) == 0
    said, page = capsys.readouterr().out, (whole.folder / "report.html").read_text()
    assert "original=Network(...)" in "".join(said.split("\n"))
    for text in (said, page):
        assert "optimize evaluate" not in text
        assert "--config" not in text


def test_a_checkpoint_file_that_was_replaced_since_is_another_model(tmp_path: Path) -> None:
    weights, folder = tmp_path / "weights.safetensors", tmp_path / "run"
    tensors = build("prunus/resnet8", classes=10, in_chans=1).module.state_dict()
    save_file(tensors, weights)
    words = ["prune", "--plugin", "one-shot", "--model", "prunus/resnet8", "--data", "digits", "--epochs", "1"]
    words += ["--train-limit", "100", "--batch-size", "50", "--checkpoint", str(weights), "--output", str(folder)]
    assert run([*words, "--json"]) == 0
    assert run(["prune", "--resume", str(folder), "--json"]) == 0
    name = next(name for name, value in tensors.items() if value.dim() == 4)
    save_file({**tensors, name: tensors[name] + 0.01}, weights)
    assert run(["prune", "--resume", str(folder), "--json"]) == 1

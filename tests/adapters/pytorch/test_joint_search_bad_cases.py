"""joint-search on data, targets and teachers that it cannot work with: one clear line and the right exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prunus.adapters.pytorch.api import prune
from prunus.adapters.pytorch.loop import begin
from prunus.adapters.pytorch.session import open_session
from prunus.core.cli import run
from prunus.core.errors import ConfigError, LoadError
from prunus.core.plan import PruningPlan
from prunus.core.settings import RunSettings

SEARCH = (
    *("prune", "--plugin", "joint-search", "--model", "prunus/resnet8", "--img-size", "16", "--batch-size", "8"),
    *("--epochs", "2", "--threads", "1"),
)


def images(root: Path, classes: Sequence[str], train: int = 12, val: int = 3) -> Path:
    """A folder of noise, train/ and val/, each class with as many images."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def finished(folder: Path, data: str) -> Path:
    """A folder as a finished run leaves it: an untrained resnet8 for that data, nothing removed."""
    session = open_session(RunSettings(model="prunus/resnet8", data=data, batch_size=8, threads=1))
    folder.mkdir()
    session.save(folder, PruningPlan(model=session.source), {})
    return folder


def refused(capfd: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The line that the command ends with, having failed with `code`."""
    assert run([*SEARCH, *words]) == code
    said = capfd.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("optimize: ") and "Traceback" not in said.err
    assert not said.out
    return last


def test_one_class_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "data", ["cats"])
    said = refused(capfd, 4, "--data", str(folder), "--output", str(tmp_path / "run"))
    assert "1 class; at least 2 are needed" in said
    assert not (tmp_path / "run").exists()


def test_a_class_of_which_nothing_can_be_held_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "data", ["cats", "dogs"])
    for path in list((folder / "train" / "dogs").iterdir())[1:]:
        path.unlink()
    said = refused(capfd, 4, "--data", str(folder), "--output", str(tmp_path / "run"))
    assert "class 1 has 1 training image; every class needs at least 2, one of them to be held out" in said


def test_a_target_smaller_than_the_narrowest_network(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(capfd, 3, "--data", "digits", "--target", "macs=0.3%", "--output", str(tmp_path / "run"))
    assert "macs=0.3% cannot be reached: the smallest reachable is macs=" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("by", ["folder", "checkpoint"])
def test_a_teacher_of_other_classes(by: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = images(tmp_path / "data", ["cats", "dogs"])
    other = finished(tmp_path / "other", str(images(tmp_path / "three", ["a", "b", "c"])))
    teacher = str(other) if by == "folder" else f"prunus/resnet8={other / 'model.safetensors'}"
    said = refused(capfd, 4, "--data", str(data), "--teacher", teacher, "--output", str(tmp_path / "run"))
    assert f"teacher {teacher!r} " in said
    assert "3 classes, the data has 2" in said if by == "folder" else "no weights for the data's 2 classes" in said


def test_a_teacher_of_other_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grey = finished(tmp_path / "grey", "digits")
    data = images(tmp_path / "data", ["cats", "dogs"])
    said = refused(capfd, 4, "--data", str(data), "--teacher", str(grey), "--output", str(tmp_path / "run"))
    assert f"teacher {str(grey)!r} cannot take images of 3x16x16" in said


def test_a_teacher_that_is_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(capfd, 4, "--data", "digits", "--teacher", str(tmp_path / "run-7"), "--output", str(tmp_path))
    assert "a teacher is the folder of a finished run, MODEL=CHECKPOINT, or a model with published weights" in said


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def of_labels(labels: Sequence[int]) -> TensorDataset:
    return TensorDataset(torch.randn(len(labels), 1, 8, 8), torch.tensor(labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 0, 1], r"no image of class 2 \(1 such classes\)"),
        ([0, 1, 2, 3], "has a class 3, train_data has the classes 0..2"),
    ],
)
def test_a_held_out_part_of_the_users_own_that_lacks_a_class_or_has_another(
    labels: list[int], message: str
) -> None:
    model = Small()
    with pytest.raises(LoadError, match=message):
        begin(
            model,
            torch.randn(2, 1, 8, 8),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            plugin="joint-search",
            epochs=1.0,
            train_data=DataLoader(of_labels([0, 1, 2] * 40), batch_size=8),
            holdout_data=of_labels(labels),
        )


def test_one_class_of_the_users_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 class") as caught:
        prune(
            Small(),
            torch.randn(2, 1, 8, 8),
            train_data=of_labels([0] * 24),
            plugin="joint-search",
            epochs=1,
            batch_size=8,
            output=tmp_path / "run",
        )
    assert caught.value.exit_code == 2

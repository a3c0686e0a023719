"""Bad data is counted and named, and left out with a notice or refused in one line; never a traceback."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from prunus.adapters.pytorch.api import prune
from prunus.adapters.pytorch.broken_images import BrokenImages
from prunus.adapters.pytorch.weights import write_tensors
from prunus.core.cli import run
from prunus.core.errors import LoadError

SIDE = 16
PRUNE = (
    *("prune", "--model", "prunus/resnet8", "--plugin", "one-shot", "--img-size", str(SIDE), "--batch-size", "4"),
    *("--epochs", "1", "--dense-epochs", "1", "--threads", "1"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ of two classes, eight and three images of each, one of them grey."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name in ("bright", "dark"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(128, 256, (SIDE, SIDE, 3)) - (128 if name == "dark" else 0)
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.convert("L" if i == 0 else "RGB").save(tmp_path / "data" / part / name / f"{i}.png")
    return tmp_path / "data"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _text(path: Path) -> None:
    path.write_text("this is no picture")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_left_out_named_and_counted_on_the_terminal_and_in_the_report(
    workers: int, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _truncate(folder / "train" / "dark" / "3.png")
    _text(folder / "train" / "bright" / "5.png")
    _empty(folder / "val" / "dark" / "1.png")
    output = tmp_path / "run"
    assert run([*PRUNE, "--data", str(folder), "--workers", str(workers), "--output", str(output)]) == 0
    said = " ".join(capfd.readouterr().err.split())
    report = json.loads((output / "report.json").read_text())
    (note,) = [note for note in report["notes"] if "cannot be read" in note]
    assert note.startswith("3 images that cannot be read were left out")
    for name in ("train/dark/3.png", "train/bright/5.png", "val/dark/1.png"):
        assert name in note
        assert name in (output / "report.html").read_text()
    assert said.count("left out an image that cannot be read") == 3
    assert "Traceback" not in said
    assert report["pruned"]["accuracy"] in [k / 5 for k in range(6)]


def test_a_split_without_any_readable_image_is_refused(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / "val").rglob("*.png"):
        _text(path)
    assert run([*PRUNE, "--data", str(folder), "--output", str(tmp_path / "run")]) == 4
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("optimize: 6 images in a row cannot be read, the first is ")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images_is_refused_by_name(
    part: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / part / "dark").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert run([*PRUNE, "--data", str(folder), "--output", str(tmp_path / "run")]) == 4
    assert f"{part}/dark holds no images; every class needs some" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_class_of_one_split_alone_is_refused_by_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "val" / "dark")
    assert run([*PRUNE, "--data", str(folder)]) == 4
    assert "dark is in one of them only" in " ".join(capfd.readouterr().err.split())


def test_data_smaller_than_a_batch_are_refused_with_what_to_do(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*PRUNE, "--data", str(folder), "--batch-size", "64"]) == 4
    said = " ".join(capfd.readouterr().err.split())
    assert "has 14 images, fewer than one batch of 64; pass a smaller --batch-size" in said


def test_notices_name_ten_and_count_the_rest() -> None:
    heard: list[str] = []
    broken = BrokenImages()
    broken.listen(heard.append)
    for _ in range(2):
        broken.meet("\n".join(f"{i}.png (cut)" for i in range(25)))
    assert len(heard) == 11
    assert heard[-1] == "further images that cannot be read are counted, not named"
    assert broken.notes[0].startswith("25 images that cannot be read were left out")


class _Samples(list[tuple[Any, Any]]):
    """Two classes of noise, as a user's own data set."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__((torch.randn(1, 8, 8, generator=generator), i % 2) for i in range(24))


def _network(classes: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def _with(index: int, sample: Callable[[Tensor], tuple[Any, Any]]) -> _Samples:
    data = _Samples()
    data[index] = sample(data[index][0])
    return data


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda x: (x.fill_(float("nan")), 0), "sample 7 of the data set holds NaN or infinity"),
        (lambda x: (x / 0, 1), "sample 7 of the data set holds NaN or infinity"),
        (lambda x: (x, -1), "one label of at least 0"),
        (lambda x: (x, "cat"), "sample 7 of the data set has the label 'cat', no class number"),
        (lambda x: (x.numpy(), 0), "sample 7 of the data set is a ndarray, not an image tensor"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused_by_number(
    sample: Callable[[Tensor], tuple[Any, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=message):
        prune(
            _network(),
            torch.zeros(2, 1, 8, 8),
            train_data=_with(7, sample),
            plugin="one-shot",
            batch_size=8,
            output=tmp_path / "run",
        )


@pytest.mark.parametrize("trained", [True, False])
def test_a_label_beyond_the_models_outputs_is_refused(trained: bool, tmp_path: Path) -> None:
    data = _Samples()
    data[3:5] = [(data[3][0], 5), (data[4][0], 5)]
    with pytest.raises(LoadError, match=r"5.*the model"):
        prune(
            _network(),
            torch.zeros(2, 1, 8, 8),
            train_data=data,
            plugin="one-shot",
            batch_size=8,
            trained=trained,
            output=tmp_path / "run",
        )


def test_a_negative_label_in_the_test_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"the data has a class -1, the model knows 0\.\.1"):
        prune(
            _network(),
            torch.zeros(2, 1, 8, 8),
            train_data=_Samples(),
            test_data=_with(7, lambda x: (x, -1)),
            plugin="one-shot",
            batch_size=8,
            epochs=0,
            output=tmp_path / "run",
        )


def test_a_disk_without_room_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("prunus.adapters.pytorch.weights.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())

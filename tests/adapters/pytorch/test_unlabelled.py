"""Images without labels: `--data images:DIR` calibrates a trained model, and refuses what needs labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunus.adapters.pytorch.artifact import load
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.datasets import LoadOptions, load_data, open_data
from prunus.adapters.pytorch.weights import write_tensors
from prunus.core.cli import run


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Forty images in two folders whose names mean nothing, one of them cut short, and a text."""
    rng = np.random.default_rng(0)
    for i in range(40):
        place = tmp_path / "photographs" / ("2019" if i % 2 else "2020/summer")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{i}.png")
    cut = tmp_path / "photographs" / "2019" / "7.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (tmp_path / "photographs" / "read.txt").write_text("no image")
    return tmp_path / "photographs"


@pytest.fixture
def model(tmp_path: Path) -> tuple[str, ...]:
    """Words that name a resnet8 with weights for four classes."""
    file = tmp_path / "four.safetensors"
    write_tensors(file, build("prunus/resnet8", classes=4, in_chans=3).module.state_dict())
    return ("--model", "prunus/resnet8", "--checkpoint", str(file), "--img-size", "16", "--threads", "1")


@pytest.mark.parametrize("method", ["bayes-reparam", "gsm-anneal", "one-shot", "iterative"])
def test_a_trained_model_is_pruned_by_images_alone(
    method: str, photographs: Path, model: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("prune", "--plugin", method, *model, "--data", f"images:{photographs}", "--json")
    assert run([*words, "--output", str(tmp_path / "run")]) == 0
    said = capfd.readouterr()
    facts = json.loads(said.out)
    assert facts["target_met"] and facts["pruned"]["accuracy"] is None and facts["dense"]["accuracy"] is None
    shown = " ".join(said.err.replace("│", " ").split())  # lines break where the folder's name is long
    assert "40 calibration" in shown and "7.png" in shown
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "Remove" in {row["kind"] for row in rows}
    assert not {"Train", "Evaluate"} & {row["kind"] for row in rows}
    assert load(tmp_path / "run")(torch.randn(2, 3, 16, 16)).shape == (2, 4)


def test_every_part_is_all_images_in_one_order(photographs: Path) -> None:
    source = open_data(f"images:{photographs}")
    assert source is not None and not source.classes
    spec = build("prunus/resnet8", img_size=16).input
    parts = load_data(source, spec, LoadOptions(batch_size=8, workers=0))
    shapes = [(tuple(images.shape[1:]), set(labels.tolist())) for images, labels in parts.calibration]
    assert set(map(str, shapes)) == {str((spec.size, {-1}))}
    assert sum(len(images) for images, _ in parts.calibration) == 39  # one cannot be read
    few = load_data(source, spec, LoadOptions(batch_size=8, train_limit=10, workers=0))
    first = next(iter(parts.calibration))[0]
    assert few.calibration.samples == 10
    assert torch.equal(next(iter(few.calibration))[0], first)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--plugin", "joint-search"), 2, "needs labelled images"),
        (("--plugin", "bayes-reparam", "--epochs", "1"), 2, "nothing can be trained without labels"),
        (("--plugin", "one-shot", "--importance", "taylor"), 2, "importance taylor measures gate-"),
        (("--plugin", "bayes-reparam", "--teacher", "prunus/resnet8"), 2, "--teacher needs labelled data"),
    ],
)
def test_what_needs_labels_is_refused_before_anything_starts(
    words: tuple[str, ...],
    code: int,
    message: str,
    photographs: Path,
    model: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    assert run(["prune", *words, *model, "--data", f"images:{photographs}", "--output", str(output)]) == code
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("optimize: ") and message in last
    assert not output.exists()


def test_a_model_without_weights_is_refused(photographs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("prune", "--plugin", "bayes-reparam", "--model", "prunus/resnet8", "--data", f"images:{photographs}")
    assert run(list(words)) == 2
    assert "the model needs weights: give --pretrained or --checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["images:", "images:nowhere"])
def test_a_folder_that_is_not_there_is_named(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["prune", "--plugin", "bayes-reparam", "--data", name]) == 4
    assert "give the folder of the images: images:DIR" in capfd.readouterr().err


def test_a_folder_without_images_or_without_parts_is_told_what_is_missing(
    photographs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["prune", "--plugin", "bayes-reparam", "--data", f"images:{tmp_path / 'empty'}"]) == 4
    assert "holds no images" in capfd.readouterr().err
    assert run(["prune", "--plugin", "bayes-reparam", "--data", str(photographs)]) == 4
    assert f"images without labels are given as images:{photographs}" in capfd.readouterr().err


def test_a_finished_run_is_exported_with_such_images_to_compare_by(
    photographs: Path, model: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grey = ("--model", "prunus/resnet8", "--dense-epochs", "0", "--epochs", "0", "--threads", "1")
    for name, words in {
        "colour": (*model, "--data", f"images:{photographs}"),
        "trained": (*model, "--data", "none"),
        "grey": (*grey, "--data", "digits"),
    }.items():
        assert run(["prune", "--plugin", "one-shot", *words, "--output", str(tmp_path / name)]) == 0
    capfd.readouterr()
    other = ("--data", f"images:{photographs}", "--format", "program")
    for name in ("colour", "trained"):
        assert run(["export", str(tmp_path / name), *other]) == 0
        assert "real images, batch 8: differs by at most" in capfd.readouterr().out
    assert run(["export", str(tmp_path / "grey"), *other]) == 2
    assert "has images of 3 channels, the run's model takes 1" in capfd.readouterr().err
    assert run(["evaluate", str(tmp_path / "colour"), *other[:2]]) == 2
    assert "there is nothing to evaluate without labels" in capfd.readouterr().err

"""`optimize export` and `optimize latency` on a run made by `optimize prune`."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from prunus.adapters.pytorch.artifact import load
from prunus.core.cli import run


def pruned(folder: Path, data: str) -> Path:
    words = ["prune", "--plugin", "one-shot", "--model", "prunus/resnet8", "--target", "macs=50%", "--seed", "3"]
    assert run([*words, "--data", data, "--epochs", "0", "--dense-epochs", "0", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tmp_path_factory.mktemp("runs") / "blank", "none")


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned(tmp_path_factory.mktemp("runs") / "digits", "digits")


def test_export_writes_beside_the_run_and_prints_one_json_object(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(finished), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["file"] == str(finished / "model.onnx")
    assert facts["dynamic_batch"] and facts["max_error"] <= facts["tolerance"] == 1e-4
    assert {(c["inputs"], c["batch"]) for c in facts["checks"]} == {("random", 2), ("random", 1)}
    onnx.checker.check_model(str(finished / "model.onnx"))


def test_a_run_on_data_is_compared_on_its_test_images(on_digits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(on_digits), "--format", "program", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert ("real", 8) in {(c["inputs"], c["batch"]) for c in facts["checks"]}
    program = torch.export.load(on_digits / "model.pt2").module()
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(images), load(on_digits)(images))


def test_people_are_told_file_and_differences(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.pt2"
    assert run(["export", str(finished), "--format", "program", "--output", str(file)]) == 0
    text = capfd.readouterr().out
    assert file.is_file() and "any batch size" in text and "random images, batch 2: differs by at most" in text


def test_latency_compares_dense_and_pruned_as_json(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["latency", str(finished), "--batch", "2", "--threads", "1", "--repeats", "3", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["batch"], facts["threads"], facts["dense"]["samples"]) == (2, 1, 3)
    assert 0.45 <= facts["macs_share"] <= 0.5
    assert facts["won_per_macs"] == pytest.approx((1 - facts["ratio"]) / (1 - facts["macs_share"]))
    assert facts["speedup"] == pytest.approx(1 / facts["ratio"])
    low, high = facts["pruned"]["quartiles"]
    assert facts["pruned"]["fastest"] <= low <= facts["pruned"]["median"] <= high


def test_latency_is_shown_to_people_with_its_spread(on_digits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["latency", str(on_digits), "--repeats", "2"]) == 0
    text = capfd.readouterr().out
    assert "Latency (batch 1" in text and "pruned / dense" in text and "of the MACs; latency won per" in text


@pytest.mark.parametrize("command", ["export", "latency"])
def test_a_folder_without_a_finished_run_is_one_clear_line(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([command, str(tmp_path), "--json"]) == 4
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == f"optimize: {tmp_path} holds no finished run (report.json is missing)\n"


def test_an_unknown_type_is_a_wrong_call(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["latency", str(finished), "--dtype", "int3"]) == 2
    assert "dtype 'int3' is not one of float32" in capfd.readouterr().err

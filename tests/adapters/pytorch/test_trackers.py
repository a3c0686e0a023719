"""A run's figures arrive at a real experiment tracker, at the training steps where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prunus.core.cli import run

RUN = (
    *("prune", "--model", "prunus/resnet8", "--train-limit", "400", "--batch-size", "36"),
    *("--dense-epochs", "1", "--epochs", "2", "--output", "run", "--json"),
)


def test_tensorboard_gets_what_metrics_jsonl_has_at_its_training_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*RUN, "--track", "tensorboard"]) == 0
    test_accuracy = json.loads(capsys.readouterr().out)["pruned"]["accuracy"]
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [row["accuracy"] for row in rows if row["kind"] == "Evaluate" and not row["model"]]
    assert [e.value for e in events.Scalars("holdout/accuracy")] == pytest.approx(held_out)
    assert [e.step for e in events.Scalars("dense/loss")] == [10]
    assert [e.step for e in events.Scalars("recover/loss")] == [30]
    assert [e.step for e in events.Scalars("recover/step_loss")] == [20, 30]
    (last,) = events.Scalars("test/accuracy")
    assert (last.step, last.value) == (30, pytest.approx(test_accuracy))


@pytest.mark.parametrize(("name", "what"), [("neptun", "known are"), ("clearml", "not installed")])
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_trained(
    name: str,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*RUN, "--track", name]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prunus.core.directives import Evaluate, Measure, Remove, Train
from prunus.core.errors import ConfigError, UnreachableTargetError
from prunus.core.signals import NEEDS_LABELS
from prunus.core.testing.simulation import SimulatedAdapter
from prunus.core.testing.transcript import Transcript, drive
from prunus.plugins.bayes_reparam import BayesReparam, BayesReparamConfig


def run(target: str = "macs=30%", *, epochs: float = 0.0, seed: int = 0, **config: Any) -> Transcript:
    adapter = SimulatedAdapter((8, 32, 24, 4), seed=seed)
    return drive(BayesReparam(BayesReparamConfig(**config)), adapter.task(target, epochs=epochs), adapter)


@pytest.mark.parametrize("target", ["macs=75%", "macs=50%", "macs=25%", "params=30%"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_budget_is_met_and_nearly_used_up(target: str, rounds: int) -> None:
    adapter = SimulatedAdapter((8, 64, 48, 4), seed=1)
    task = adapter.task(target)
    transcript = drive(BayesReparam(BayesReparamConfig(rounds=rounds)), task, adapter)
    load = task.budget.load(task.graph.cost(transcript.plan.kept_counts))
    assert 0.97 < load <= 1.0
    assert len(transcript.of(Remove)) == rounds


def test_rules_of_the_groups_are_respected() -> None:
    adapter = SimulatedAdapter(
        (8, 32, 32, 30, 4), h0={"equal_count": "t"}, h1={"equal_count": "t"}, h2={"multiple_of": 4}
    )
    task = adapter.task("macs=40%")
    counts = drive(BayesReparam(), task, adapter).plan.kept_counts
    assert counts["h0"] == counts["h1"]
    assert counts["h2"] % 4 == 0
    assert task.budget.met(task.graph.cost(counts))


def test_locked_groups_stay_whole() -> None:
    adapter = SimulatedAdapter((8, 32, 24, 4), h0={"locked": "for the test"})
    assert drive(BayesReparam(), adapter.task("macs=60%"), adapter).plan.kept_counts["h0"] == 32


def test_the_same_observations_give_the_same_directives() -> None:
    first, second = run(epochs=4.0, rounds=3), run(epochs=4.0, rounds=3)
    assert first.plan == second.plan
    assert [type(d) for d in first.directives] == [type(d) for d in second.directives]
    assert [n.values for n in first.notes] == [n.values for n in second.notes]


def test_pure_calibration_needs_no_labels_and_no_training() -> None:
    adapter = SimulatedAdapter((8, 32, 24, 4))
    transcript = drive(BayesReparam(), adapter.task("macs=40%", has_labels=False), adapter)
    assert not transcript.of(Train) and not transcript.of(Evaluate)
    assert all(not (m.signals & NEEDS_LABELS) for m in transcript.of(Measure))
    assert all(r.recalibrate == "no" for r in transcript.of(Remove))


def test_without_images_it_says_so_before_anything_starts() -> None:
    adapter = SimulatedAdapter((8, 32, 24, 4))
    with pytest.raises(ConfigError, match="needs images"):
        drive(BayesReparam(), adapter.task("macs=40%", has_data=False, has_labels=False), adapter)


def test_an_unreachable_target_is_named_before_anything_starts() -> None:
    with pytest.raises(UnreachableTargetError, match="smallest reachable"):
        run("macs=0.5%")


def test_every_forecast_is_scored_against_the_round_it_foretold() -> None:
    notes = [n for n in run("macs=20%", rounds=4).notes if n.kind == "prediction"]
    assert [n.values["round"] for n in notes] == [2, 3, 4]
    for note in notes:
        for key in ("auc", "overlap", "brier", "no_memory_auc", "previous_auc"):
            assert 0.0 <= float(note.values[key]) <= 1.0  # type: ignore[arg-type]


def test_forecasts_beat_chance_clearly() -> None:
    notes = [n for seed in range(3) for n in run("macs=20%", rounds=3, seed=seed).notes if n.kind == "prediction"]
    assert np.mean([float(n.values["auc"]) for n in notes]) > 0.7  # type: ignore[arg-type]


def test_kept_weights_are_refitted_with_the_probability_to_go_next() -> None:
    first, second = run(rounds=2).of(Remove)
    assert first.survival is not None and second.survival is None
    for name, p in first.survival.items():
        gone = np.setdiff1d(np.arange(len(p)), first.keep[name])
        assert not p[gone].any() and ((p >= 0) & (p <= 0.9)).all()
    assert all(r.survival is None for r in run(rounds=2, survival=False).of(Remove))


def test_the_function_is_kept_better_than_by_magnitude_and_copying() -> None:
    better = []
    for seed in range(3):
        accuracy = {}
        for refit in ("none", "sequential"):
            adapter = SimulatedAdapter((8, 32, 24, 4), seed=seed)
            drive(BayesReparam(BayesReparamConfig(refit=refit)), adapter.task("macs=25%"), adapter)
            accuracy[refit] = adapter.evaluate(Evaluate()).loss
        better.append(accuracy["sequential"] < accuracy["none"])
    assert all(better)


def test_wide_readers_without_covariance_are_named_and_handled() -> None:
    adapter = SimulatedAdapter((8, 32, 24, 4), covariances=False)
    task = adapter.task("macs=40%")
    transcript = drive(BayesReparam(), task, adapter)
    assert task.budget.met(task.graph.cost(transcript.plan.kept_counts))
    assert any(n.kind == "covariance-missing" for n in transcript.notes)


def test_recovery_between_rounds_is_short_and_the_rest_goes_to_the_result() -> None:
    trains = run(epochs=3.0, rounds=3).of(Train)
    assert [t.epochs for t in trains[:-1]] == [0.15, 0.15]
    assert sum(t.epochs for t in trains) == pytest.approx(3.0)
    assert all(t.lr == 0.01 for t in trains[:-1])


def test_a_broken_tolerance_halves_the_steps_once_and_then_stops() -> None:
    with pytest.raises(UnreachableTargetError, match="tolerance"):
        run("macs=5%", rounds=3, refit="none", tolerance=0.001, recalibrate="no")


def test_memory_and_compensation_can_be_switched_off() -> None:
    for config in ({"memory": "none"}, {"refit": "none"}, {"refit": "bias"}, {"refit": "least-squares"}):
        assert run(rounds=2, **config).plan.kept_counts


def test_groups_are_weighed_by_their_loss_where_there_are_labels() -> None:
    assert [n for n in run(sensitivity="yes").notes if n.kind == "sensitivity"]
    assert not [n for n in run(sensitivity="no").notes if n.kind == "sensitivity"]

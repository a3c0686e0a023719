from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.core.directives import Evaluate, Measure, Note, Remove, Train
from prunus.core.errors import ConfigError, PluginError, UnreachableTargetError
from prunus.core.graph import ChannelGroup
from prunus.core.importance import ImportanceEstimator
from prunus.core.policy import PruningPolicy
from prunus.core.signals import Signal, SignalReader
from prunus.core.testing.simulation import SimulatedAdapter
from prunus.core.testing.transcript import drive
from prunus.plugins.bn_scale import BnScale
from prunus.plugins.fpgm import Fpgm
from prunus.plugins.iterative import Iterative, IterativeConfig
from prunus.plugins.magnitude import Magnitude
from prunus.plugins.one_shot import OneShot, OneShotConfig
from prunus.plugins.random_scores import RandomScores
from prunus.plugins.recovery import TAIL, rate_factor
from prunus.plugins.taylor import Taylor

ALL = (Magnitude, Taylor, BnScale, Fpgm, RandomScores)
WIDTHS = (8, 32, 24, 4)


@pytest.mark.parametrize("estimator", ALL)
@pytest.mark.parametrize("policy", [OneShot, Iterative])
@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_every_estimator_fits_every_plain_method_and_the_budget_is_met(
    estimator: type[ImportanceEstimator], policy: type[PruningPolicy], scope: str
) -> None:
    adapter = SimulatedAdapter(WIDTHS)
    task = adapter.task("macs=50%", epochs=1.0, estimator=estimator())
    plan = drive(policy(policy.Config(scope=scope)), task, adapter).plan
    cost = task.graph.cost({name: len(units) for name, units in plan.keep.items()})
    assert 0.95 <= task.budget.load(cost) <= 1
    assert adapter.graph.cost() == cost


@pytest.mark.parametrize("policy", [OneShot, Iterative])
def test_without_data_nothing_is_trained_evaluated_or_refitted(policy: type[PruningPolicy]) -> None:
    adapter = SimulatedAdapter(WIDTHS)
    task = adapter.task("macs=50%", epochs=5.0, estimator=Magnitude(), has_data=False)
    transcript = drive(policy(), task, adapter)
    assert not transcript.of(Train) and not transcript.of(Evaluate)
    assert all(r.refit == "none" and r.recalibrate == "no" for r in transcript.of(Remove))
    assert all(m.signals == {Signal.WEIGHT} for m in transcript.of(Measure))


@pytest.mark.parametrize("policy", [OneShot, Iterative])
def test_with_no_epochs_the_refit_still_happens_and_nothing_is_trained(policy: type[PruningPolicy]) -> None:
    adapter = SimulatedAdapter(WIDTHS)
    transcript = drive(policy(), adapter.task("macs=50%", estimator=Magnitude()), adapter)
    assert not transcript.of(Train)
    assert all(r.refit == "sequential" for r in transcript.of(Remove))


def test_an_estimator_that_needs_images_says_so_before_anything_starts() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    with pytest.raises(ConfigError, match="needs images"):
        drive(OneShot(), adapter.task("macs=50%", estimator=Taylor(), has_data=False), adapter)
    with pytest.raises(ConfigError, match="needs labels"):
        drive(OneShot(), adapter.task("macs=50%", estimator=Taylor(), has_labels=False), adapter)
    with pytest.raises(ConfigError, match="--importance"):
        drive(OneShot(), adapter.task("macs=50%"), adapter)


def test_an_unreachable_target_is_an_error_before_anything_is_removed() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    with pytest.raises(UnreachableTargetError, match="smallest reachable"):
        drive(OneShot(), adapter.task("macs=1%", estimator=Magnitude()), adapter)
    assert adapter.graph.units == {"h0": 32, "h1": 24}


def test_the_iterative_method_spends_its_epochs_and_no_more() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    config = IterativeConfig(rounds=4, between=0.3)
    trained = drive(Iterative(config), adapter.task("macs=30%", epochs=10.0, estimator=Taylor()), adapter).of(
        Train
    )
    assert sum(t.epochs for t in trained) == pytest.approx(10.0)
    # between rounds the run's cycle ends, after the last it begins anew
    assert [(t.lr, t.start) for t in trained] == [(None, 0.75)] * 3 + [(None, 0.0)]
    assert trained[-1].epochs == pytest.approx(7.0)


def test_what_a_removal_left_is_trained_at_the_rate_of_recoveries() -> None:
    task = SimulatedAdapter(WIDTHS).task("macs=50%", epochs=4.0, estimator=Magnitude())
    task = dataclasses.replace(task, recovery_lr=0.07)
    trained = drive(Iterative(), task, SimulatedAdapter(WIDTHS)).of(Train)
    assert [t.lr for t in trained] == [0.07] * len(trained)
    assert [t.start for t in trained] == [TAIL] * (len(trained) - 1) + [0.0]  # gentle between the rounds
    (recovery,) = drive(OneShot(), task, SimulatedAdapter(WIDTHS)).of(Train)
    assert (recovery.lr, recovery.start) == (0.07, 0.0)


def test_without_a_rate_a_recovery_finds_its_own_from_what_was_lost_and_how_long_it_lasts() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    task = adapter.task("macs=50%", epochs=1.5, estimator=Magnitude())
    task = dataclasses.replace(task, recovery_base_lr=0.05)
    transcript = drive(OneShot(), task, adapter)
    (recovery,) = transcript.of(Train)
    (found,) = [note.values for note in transcript.of(Note) if note.kind == "recovery"]
    assert recovery.lr == found["lr"] == 0.05 * rate_factor(1 - found["start"] / found["dense"], 1.5)
    between = [t for t in drive(Iterative(), task, SimulatedAdapter(WIDTHS)).of(Train) if t.start == TAIL]
    assert between and {t.lr for t in between} == {0.05}  # the tail of a usual cycle


def test_the_usual_recovery_has_the_usual_rate_and_its_length_and_its_loss_raise_it_alike() -> None:
    assert rate_factor(0.03, 6) == 1
    assert rate_factor(0.03, 6 / 8) == rate_factor(0.03 / 4, 3) == pytest.approx(1 / 2)
    assert rate_factor(0.03 / 8, 6 * 4) == rate_factor(0.005, 24) == pytest.approx((4 / 6) ** (1 / 3))
    assert rate_factor(-0.01, 6) == rate_factor(0.005, 6)  # a refitted model may seem better than it was
    assert (rate_factor(0, 0.1), rate_factor(0.9, 100)) == (0.4, 1.5)


@given(lost=st.floats(-1, 1), more=st.floats(0, 1), epochs=st.floats(0.01, 300), longer=st.floats(1, 10))
def test_the_rate_of_a_recovery_never_falls_with_the_loss_or_the_length(
    lost: float, more: float, epochs: float, longer: float
) -> None:
    assert 0.4 <= rate_factor(lost, epochs) <= rate_factor(lost + more, longer * epochs) <= 1.5


def test_budgets_of_the_rounds_fall_geometrically() -> None:
    adapter = SimulatedAdapter((16, 128, 128, 4))
    task = adapter.task("macs=25%", estimator=Magnitude())
    config = IterativeConfig(rounds=2)
    removals = drive(Iterative(config), task, adapter).of(Remove)
    halfway = task.graph.cost({name: len(units) for name, units in removals[0].keep.items()})
    assert halfway.macs / task.graph.cost().macs == pytest.approx(0.5, rel=0.02)


def test_refit_keeps_more_of_the_function_than_copying() -> None:
    losses = {}
    for refit in ("none", "sequential"):
        found = []
        for seed in range(3):
            adapter = SimulatedAdapter(WIDTHS, seed=seed)
            drive(OneShot(OneShotConfig(refit=refit)), adapter.task("macs=40%", estimator=Magnitude()), adapter)
            found.append(adapter.evaluate(Evaluate()).loss)
        losses[refit] = float(np.mean(found))
    assert losses["sequential"] < 0.7 * losses["none"]


@pytest.mark.parametrize(("good_start", "taught"), [(0.0, True), (1.01, False)])
def test_the_dense_model_teaches_only_after_a_good_start(good_start: float, taught: bool) -> None:
    adapter = SimulatedAdapter(WIDTHS)
    config = OneShotConfig(good_start=min(good_start, 1.0), refit="sequential" if taught else "none")
    target = "macs=60%" if taught else "macs=15%"
    transcript = drive(OneShot(config), adapter.task(target, epochs=1.0, estimator=Magnitude()), adapter)
    (train,) = transcript.of(Train)
    assert (train.distil is not None) == taught
    (note,) = [n for n in transcript.of(Note) if n.kind == "distillation"]
    assert note.values["used"] == int(taught)


@pytest.mark.parametrize(("epochs", "weight"), [(1.0, 0.7), (3.0, 0.5), (6.0, 0.5)])
def test_short_recoveries_lean_more_on_the_teacher(epochs: float, weight: float) -> None:
    adapter = SimulatedAdapter(WIDTHS, samples=128)
    config = OneShotConfig(distil="always")
    transcript = drive(OneShot(config), adapter.task("macs=60%", epochs=epochs, estimator=Magnitude()), adapter)
    assert transcript.of(Train)[0].distil.weight == weight


class Broken(ImportanceEstimator):
    needs = frozenset()

    def score(self, group: ChannelGroup, signals: SignalReader) -> np.ndarray:
        return np.full(group.units, np.nan)


def test_an_estimator_that_returns_nan_is_blamed_by_name() -> None:
    adapter = SimulatedAdapter(WIDTHS)
    with pytest.raises(PluginError, match="Broken") as caught:
        drive(OneShot(), adapter.task("macs=50%", estimator=Broken()), adapter)
    assert caught.value.plugin == "Broken"

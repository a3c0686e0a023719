"""A run is checked, journaled and resumable: laws of the engine, on a network in numpy."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunus.core.checkpoints import Checkpoints
from prunus.core.directives import (
    Changed,
    Directive,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Note,
    Observation,
    Remove,
    Snapshot,
    Train,
    Trained,
)
from prunus.core.errors import JournalError, PluginError
from prunus.core.journal import Journal
from prunus.core.observations import RecordingReader
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.run import Preamble, execute
from prunus.core.signals import Signal
from prunus.core.testing.simulation import SimulatedAdapter

BELONGS = "0" * 64


class Recorder:
    """Events that remember, and that can stop the run at a chosen directive or step."""

    def __init__(self) -> None:
        self.began_at: list[int] = []
        self.notices: list[str] = []
        self.stop_before: int | None = None
        self.stop_after: int | None = None
        self.stop_at_step: int | None = None
        self.steps = 0

    def began(self, index: int, directive: Directive) -> None:
        self.began_at.append(index)
        if index == self.stop_before:
            raise KeyboardInterrupt

    def carried_out(self, index: int, directive: Directive, observation: Observation) -> None:
        if index == self.stop_after:
            raise KeyboardInterrupt

    def answered(self, index: int, directive: Directive, observation: Observation, seconds: float) -> None: ...

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        self.steps += 1
        if self.steps == self.stop_at_step:
            raise KeyboardInterrupt

    def notice(self, text: str) -> None:
        self.notices.append(text)


class EpochwiseAdapter(SimulatedAdapter):
    """Trains epoch by epoch, and can be continued from the end of each."""

    def __init__(self) -> None:
        super().__init__(samples=192, dense_epochs=2)
        self._epoch = 0

    def train(self, directive: Train) -> Trained:
        if directive.epochs <= 1 or not hasattr(self, "_epoch"):
            return super().train(directive)
        epochs = int(directive.epochs)
        for epoch in range(self._epoch, epochs):
            answer = super().train(Train(1.0, start=epoch / epochs, stop=(epoch + 1) / epochs))
            if epoch + 1 < epochs:
                self._epoch = epoch + 1
                assert self._watcher is not None
                self._watcher.boundary()
        self._epoch = 0
        return answer

    def checkpoint(self, folder: Path) -> None:
        super().checkpoint(folder)
        (folder / "epoch.json").write_text(json.dumps(self._epoch))

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self._epoch = int(json.loads((folder / "epoch.json").read_text()))


class EveryDirective(PruningPolicy):
    """Uses every directive, with widths that follow from the signals and from its random numbers."""

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        name = next(iter(task.graph.prunable))
        yield Grow({name: task.graph.groups[name].units + 4})
        signals = yield Measure(frozenset({Signal.GATE_FISHER, Signal.ACTIVATION_VARIANCE}), images=64)
        before = signals.read(Signal.GATE_FISHER, name).copy()
        assert not signals.has(Signal.GATE_FISHER, "nothing")
        yield Note("widths", {"grown": len(before)})
        trained = yield Train(epochs=3, label="grown")
        assert isinstance(trained, Trained)
        plan = None
        for share in (0.8, 0.4):
            signals = yield Measure(frozenset({Signal.GATE_FISHER}), images=64)
            keep = {}
            for group in task.graph.prunable:
                scores = signals.read(Signal.GATE_FISHER, group)
                noisy = scores + 1e-3 * task.rng.random(len(scores)) + 1e-9 * trained.loss
                count = max(3, int(share * task.graph.groups[group].units))
                keep[group] = np.sort(np.argsort(-noisy, kind="stable")[:count])
            changed = yield Remove(keep, refit="sequential", images=64)
            plan = changed.plan
            yield Snapshot(f"after-{share}")
            held_out = yield Evaluate()
            assert isinstance(held_out, Evaluated)
            trained = yield Train(epochs=2, label="recover")
        assert plan is not None
        return plan


def _run(
    folder: Path, events: Recorder, policy: PruningPolicy | None = None
) -> tuple[PruningPlan, dict[str, Any]]:
    adapter = EpochwiseAdapter()
    if (folder / "journal" / "head.json").exists():
        journal = Journal.open(folder / "journal", "1", BELONGS)
    else:
        journal = Journal.create(folder / "journal", "1", BELONGS)
    plan = execute(
        policy or EveryDirective(),
        adapter.task("params=60%", epochs=2),
        adapter,
        plugin="every",
        events=events,
        preamble=Preamble(dense_epochs=2.0),
        journal=journal,
        checkpoints=Checkpoints(folder / "checkpoint"),
    )
    return plan, adapter.weights


def _same(first: tuple[PruningPlan, dict[str, Any]], second: tuple[PruningPlan, dict[str, Any]]) -> None:
    assert first[0] == second[0]
    assert first[1].keys() == second[1].keys()
    for name, weight in first[1].items():
        np.testing.assert_array_equal(weight, second[1][name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[PruningPlan, dict[str, Any], int, int]:
    """Plan, weights, number of directives and of training steps of a run that nobody disturbs."""
    events = Recorder()
    plan, weights = _run(tmp_path_factory.mktemp("whole"), events)
    return plan, weights, len(events.began_at), events.steps


def _stopped(folder: Path, prepare: Callable[[Recorder], None]) -> Recorder:
    events = Recorder()
    prepare(events)
    with pytest.raises(KeyboardInterrupt):
        _run(folder, events)
    return events


def test_a_run_stopped_before_or_after_any_directive_resumes_to_the_same_plan_and_weights(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    for index in range(whole[2]):
        where = ("stop_before", "stop_after")[index % 2]
        folder = tmp_path / f"{where}-{index}"
        _stopped(folder, lambda events, w=where, i=index: setattr(events, w, i))
        _same(_run(folder, Recorder()), whole[:2])


def test_a_run_stopped_at_any_training_step_resumes_to_the_same_weights(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    for step in range(1, whole[3], 11):
        folder = tmp_path / str(step)
        _stopped(folder, lambda events, s=step: setattr(events, "stop_at_step", s))
        _same(_run(folder, Recorder()), whole[:2])


def test_a_run_that_dies_again_and_again_still_arrives(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    for index in range(whole[2]):
        _stopped(tmp_path, lambda events, i=index: setattr(events, "stop_after", i))
    _same(_run(tmp_path, Recorder()), whole[:2])


def test_a_resumed_run_carries_out_nothing_twice_but_what_was_in_flight(tmp_path: Path) -> None:
    _stopped(tmp_path, lambda events: setattr(events, "stop_before", 7))
    events = Recorder()
    _run(tmp_path, events)
    assert events.began_at[0] == 7


def test_training_goes_on_inside_the_epoch_that_was_interrupted(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    first = _stopped(tmp_path, lambda events: setattr(events, "stop_at_step", 8))
    second = Recorder()
    _same(_run(tmp_path, second), whole[:2])
    assert first.steps + second.steps < whole[3] + 5


def test_a_finished_run_can_be_resumed_and_does_nothing(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    _run(tmp_path, Recorder())
    events = Recorder()
    _same(_run(tmp_path, events), whole[:2])
    assert events.began_at == []


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    _stopped(tmp_path, lambda events: setattr(events, "stop_before", 12))
    newest = Checkpoints(tmp_path / "checkpoint").newest_first()[0]
    raw = (newest.path / "weights.npz").read_bytes()
    (newest.path / "weights.npz").write_bytes(raw[: len(raw) // 2])
    events = Recorder()
    _same(_run(tmp_path, events), whole[:2])
    assert any("cannot be used" in text and newest.path.name in text for text in events.notices)


def test_without_any_usable_checkpoint_the_run_starts_again(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int]
) -> None:
    _stopped(tmp_path, lambda events: setattr(events, "stop_before", 12))
    for checkpoint in Checkpoints(tmp_path / "checkpoint").newest_first():
        (checkpoint.path / "state.json").write_text("{")
    events = Recorder()
    _same(_run(tmp_path, events), whole[:2])
    assert events.began_at[0] == 0


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    _run(tmp_path, Recorder())
    assert len(list((tmp_path / "checkpoint").iterdir())) == 2


def test_a_full_disk_leaves_a_run_that_resumes(
    tmp_path: Path, whole: tuple[PruningPlan, dict[str, Any], int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: EpochwiseAdapter, folder: Path) -> None:
        (folder / "weights.npz").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        calls = 0
        original = EpochwiseAdapter.checkpoint

        def sometimes(self: EpochwiseAdapter, folder: Path) -> None:
            nonlocal calls
            calls += 1
            (full if calls == 4 else original)(self, folder)

        patched.setattr(EpochwiseAdapter, "checkpoint", sometimes)
        with pytest.raises(OSError, match="No space left"):
            _run(tmp_path, Recorder())
    assert not list((tmp_path / "checkpoint").glob(".*"))
    _same(_run(tmp_path, Recorder()), whole[:2])


class Forgetful(PruningPolicy):
    """Measures, then trains; what it measured it forgets."""

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        measured = yield Measure(frozenset({Signal.WEIGHT}), images=8)
        assert isinstance(measured, RecordingReader)
        measured.read(Signal.WEIGHT, next(iter(task.graph.tensors)))
        del measured
        yield Train(epochs=0.5)
        keep = {name: range(group.units // 2) for name, group in task.graph.prunable.items()}
        changed = yield Remove(keep)
        assert isinstance(changed, Changed)
        return changed.plan


class Counting(SimulatedAdapter):
    """Counts the measurements that are still alive when it trains."""

    alive = -1

    def train(self, directive: Train) -> Trained:
        gc.collect()
        self.alive = sum(type(thing) is RecordingReader for thing in gc.get_objects())
        return super().train(directive)


def test_measurements_that_a_policy_forgets_are_gone_before_the_next_directive() -> None:
    adapter = Counting((8, 16, 16, 4), seed=0)
    execute(Forgetful(), adapter.task("macs=50%", epochs=1.0), adapter, plugin="forgetful", events=Recorder())
    assert adapter.alive == 0


class Coin(PruningPolicy):
    """Not deterministic: yields another directive every time."""

    flips = 0

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        Coin.flips += 1
        yield Snapshot(f"flip-{Coin.flips}")
        changed = yield Remove({})
        return changed.plan


def test_a_policy_that_is_not_deterministic_is_blamed_on_resume(tmp_path: Path) -> None:
    events = Recorder()
    events.stop_before = 4
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, events, Coin())
    with pytest.raises(PluginError, match="'every' broke a rule: it must be a deterministic function"):
        _run(tmp_path, Recorder(), Coin())


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    Journal.create(tmp_path / "journal", "1", BELONGS)
    with pytest.raises(JournalError, match="belongs to another model"):
        Journal.open(tmp_path / "journal", "1", "1" * 64)

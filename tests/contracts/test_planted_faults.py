"""The contract kit finds what it is for: each planted fault is caught by the rule that names it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from prunus.core import (
    ChannelGroup,
    Directive,
    Distillation,
    Evaluate,
    FloatArray,
    ImportanceEstimator,
    Measure,
    Note,
    Observation,
    PluginConfig,
    PruningPlan,
    PruningPolicy,
    PruningTask,
    Remove,
    Signal,
    SignalReader,
    Snapshot,
    Train,
)
from prunus.core.allocation import global_keep
from prunus.core.testing.contract import check_estimator_contract, check_policy_contract
from prunus.plugins.magnitude import Magnitude

FINITE = "score returns one finite float64 per unit"
USABLE = "it is a usable class whose Config has valid defaults"


class _Faulty(ImportanceEstimator):
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})

    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return self.spoil(Magnitude().score(group, signals), group, signals)

    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        raise AssertionError


class ReturnsNan(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return np.log(scores - scores.max())


class OneTooFew(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return scores[1:]


class HalfPrecision(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> Any:
        return scores.astype(np.float16)


class ReturnsAList(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> Any:
        return scores.tolist()


class DividesByTheMean(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return scores / scores.mean()


class ReadsTheUndeclared(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return signals.read(Signal.GATE_FISHER, group.name)


class WritesIntoSignals(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        signals.read(Signal.WEIGHT, group.slices[0].tensor)[:] = 0
        return scores


class KeepsState(_Faulty):
    def __init__(self, config: PluginConfig | None = None) -> None:
        super().__init__(config)
        self.calls = 0

    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        self.calls += 1
        return scores + self.calls


class PrefersTheFirst(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return scores - np.arange(len(scores))


class ExpectsOneInputPerUnit(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        reader = group.with_role("reads")[:1]
        weights = [np.moveaxis(signals.read(Signal.WEIGHT, piece.tensor), piece.axis, 0) for piece in reader]
        return sum((np.abs(w.reshape(len(w), -1)).sum(axis=1)[: group.units] for w in weights), scores)


class ExpectsAReader(_Faulty):
    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return scores + len(signals.read(Signal.WEIGHT, group.with_role("reads")[0].tensor))


class ExpectsCovariances(_Faulty):
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT, Signal.ACTIVATION_COVARIANCE})

    def spoil(self, scores: FloatArray, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        for piece in group.with_role("reads"):
            signals.read(Signal.ACTIVATION_COVARIANCE, piece.tensor)
        return scores


class Abstract(ImportanceEstimator):
    needs: ClassVar[frozenset[Signal]] = frozenset()


class NoNeeds(ImportanceEstimator):
    def score(self, group: ChannelGroup, signals: SignalReader) -> FloatArray:
        return np.ones(group.units)


class _Loose(PluginConfig):
    model_config = ConfigDict(extra="allow")


class LooseConfig(_Faulty):
    Config: ClassVar[type[PluginConfig]] = _Loose


class _Demanding(PluginConfig):
    ratio: float


class NoDefaults(_Faulty):
    Config: ClassVar[type[PluginConfig]] = _Demanding


class _Foreign(BaseModel):
    pass


class ForeignConfig(_Faulty):
    Config: ClassVar[Any] = _Foreign


class NotEvenOne:
    pass


ESTIMATORS: dict[type, str] = {
    ReturnsNan: FINITE,
    OneTooFew: FINITE,
    HalfPrecision: FINITE,
    ReturnsAList: FINITE,
    DividesByTheMean: "scores of dead units are finite",
    ReadsTheUndeclared: FINITE,
    WritesIntoSignals: "score is pure and leaves its signals as they are",
    KeepsState: "score is pure and leaves its signals as they are",
    ExpectsOneInputPerUnit: "scores follow the units when these change places",
    ExpectsAReader: FINITE,
    ExpectsCovariances: FINITE,
    PrefersTheFirst: "scores follow the units when these change places",
    Abstract: USABLE,
    NoNeeds: USABLE,
    LooseConfig: USABLE,
    NoDefaults: USABLE,
    ForeignConfig: USABLE,
    NotEvenOne: USABLE,
}


class _Method(PruningPolicy):
    """Removes what has the smallest weights, correctly: the faults are planted into copies of it."""

    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        scores = {n: Magnitude().score(g, signals) for n, g in task.graph.groups.items()}
        return dict(global_keep(task.graph, task.budget, scores))

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        signals = yield Measure(frozenset({Signal.WEIGHT}))
        changed = yield Remove(self.keep(task, signals))
        if task.epochs:
            yield Train(epochs=task.epochs)
        return changed.plan


class Correct(_Method):
    pass


class IgnoresTheBudget(_Method):
    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        return {}


class IgnoresMultiples(_Method):
    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        return {n: np.arange(max(2, 3 * g.units // 8)) for n, g in task.graph.prunable.items()}


class PrunesLocked(_Method):
    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        return {n: np.arange(g.units // 4) for n, g in task.graph.groups.items()}


class BreaksTies(_Method):
    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        return {n: np.arange(g.units // (4 + i)) for i, (n, g) in enumerate(task.graph.prunable.items())}


class DrawsFromElsewhere(_Method):
    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        scores = {n: np.random.random(g.units) for n, g in task.graph.groups.items()}
        return dict(global_keep(task.graph, task.budget, scores))


class KeepsCount(_Method):
    runs = 0

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        KeepsCount.runs += 1
        yield Note("run", {"number": KeepsCount.runs})
        return (yield from super().run(task))


class TrainsTooLong(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        plan = yield from super().run(task)
        yield Train(epochs=20)
        return plan


class EvaluatesAlways(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        yield Evaluate()
        return (yield from super().run(task))


class ReadsTooLate(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        signals = yield Measure(frozenset({Signal.WEIGHT}))
        yield Note("later")
        changed = yield Remove(self.keep(task, signals))
        return changed.plan


class LoopsForEver(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        while True:
            yield Note("round")


class RaisesInTheMiddle(_Method):
    def keep(self, task: PruningTask, signals: SignalReader) -> dict[str, Any]:
        raise KeyError("conv1")


class ForgetsThePlan(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, Any]:
        yield from super().run(task)


class PrunesNan(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        signals = yield Measure(frozenset({Signal.WEIGHT}))
        keep = self.keep(task, signals)
        gates = {n: np.full(task.graph.groups[n].units, np.nan) for n in keep}
        changed = yield Remove(keep, gates=gates)
        return changed.plan


class ChecksWrongly(_Method):
    def check(self, task: PruningTask) -> None:
        task.graph.no_such_thing  # type: ignore[attr-defined]  # noqa: B018


class JudgesWithoutLabels(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        if task.has_data:
            yield Evaluate()
        return (yield from super().run(task))


class TakesTheDenseModelsName(_Method):
    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        plan = yield from super().run(task)
        yield Snapshot("dense")
        return plan


class LearnsFromNobody(_Method):
    starts_from: ClassVar[Literal["trained", "scratch"]] = "scratch"

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        plan = yield from super().run(replace(task, epochs=0.0))
        yield Train(epochs=task.epochs, distil=Distillation())
        return plan


POLICIES: dict[type[PruningPolicy], str] = {
    IgnoresTheBudget: "the plan meets every target",
    IgnoresMultiples: "kept counts are whole multiples",
    PrunesLocked: "locked groups keep everything",
    BreaksTies: "groups that are tied keep equal counts",
    DrawsFromElsewhere: "equal task and observations, equal directives",
    KeepsCount: "equal task and observations, equal directives",
    TrainsTooLong: "a policy trains no longer than task.epochs",
    EvaluatesAlways: "a policy that declares no data runs without data",
    ReadsTooLate: "the plan meets every target",
    LoopsForEver: "the plan meets every target",
    RaisesInTheMiddle: "the plan meets every target",
    ForgetsThePlan: "the plan meets every target",
    PrunesNan: "the plan meets every target",
    ChecksWrongly: "the plan meets every target",
    JudgesWithoutLabels: "a policy serves images without labels, or says at once that it cannot",
    TakesTheDenseModelsName: "the plan meets every target",
    LearnsFromNobody: "the plan meets every target",
}


@pytest.mark.parametrize("fault", ESTIMATORS, ids=lambda cls: cls.__name__)
def test_a_faulty_estimator_is_caught_by_the_right_rule_and_named(fault: Any) -> None:
    with np.errstate(all="ignore"):
        results = {r.rule: r.problem for r in check_estimator_contract(fault, "guilty")}
    problem = results[ESTIMATORS[fault]]
    assert problem is not None
    assert "'guilty'" in problem


@pytest.mark.parametrize("fault", POLICIES, ids=lambda cls: cls.__name__)
def test_a_faulty_method_is_caught_by_the_right_rule_and_named(fault: type[PruningPolicy]) -> None:
    results = {r.rule: r.problem for r in check_policy_contract(fault, "guilty")}
    problem = results[POLICIES[fault]]
    assert problem is not None
    assert "'guilty'" in problem


def test_a_correct_method_passes() -> None:
    assert [r.problem for r in check_policy_contract(Correct, "correct") if r.problem] == []


FROM_A_SET = """
import numpy as np
from prunus.core import Measure, PruningPolicy, Remove, Signal
from prunus.core.allocation import global_keep

class FromASet(PruningPolicy):
    def run(self, task):
        yield Measure(frozenset({Signal.WEIGHT}))
        worth = {name: 1.0 + i for i, name in enumerate({*task.graph.groups})}
        scores = {n: worth[n] * np.arange(1.0, g.units + 1) for n, g in task.graph.groups.items()}
        return (yield Remove(global_keep(task.graph, task.budget, scores))).plan
"""


def test_a_method_that_depends_on_the_order_of_a_set_is_caught_by_a_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "from_a_set.py").write_text(FROM_A_SET)
    monkeypatch.syspath_prepend(str(tmp_path))
    fault = importlib.import_module("from_a_set").FromASet
    (problem,) = [r for r in check_policy_contract(fault, "guilty") if r.problem]
    assert problem.rule == "equal task and observations, equal directives, in every process"
    assert "set of names" in str(problem.problem)


STRANGERS_TESTS = """
import pytest
from prunus.core.testing.importance_contract import ImportanceContract
from prunus.plugins.magnitude import Magnitude

class TestEstimator(ImportanceContract):
    @pytest.fixture
    def estimator(self):
        return Magnitude

class TestForgotten(ImportanceContract):
    pass
"""


def test_the_kit_runs_as_pytest_classes(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(STRANGERS_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "5 passed" in done.stdout, done.stdout
    assert "override the fixture `estimator`" in done.stdout

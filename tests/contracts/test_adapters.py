"""Adapters keep their contract, and the contract finds adapters that do not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from prunus.core.directives import Changed, Evaluate, Evaluated, Grow, Measure, Remove, Train, Trained
from prunus.core.errors import PluginError
from prunus.core.settings import make_settings
from prunus.core.signals import Signal, SignalReader
from prunus.core.testing.adapter_contract import AdapterContract
from prunus.core.testing.adapter_rules import ADAPTER_RULES, Fresh
from prunus.core.testing.simulation import SimulatedAdapter

T = TypeVar("T")


def _simulated(cls: type[SimulatedAdapter] = SimulatedAdapter) -> SimulatedAdapter:
    return cls(samples=128, dense_epochs=2)


class TestSimulated(AdapterContract):
    @pytest.fixture
    def fresh(self) -> Fresh:
        return _simulated


class TestPyTorch(AdapterContract):
    @pytest.fixture
    def fresh(self) -> Fresh:
        from prunus.adapters.pytorch.session import open_session

        settings = make_settings(
            {"model": "prunus/resnet14", "data": "digits", "img_size": 16, "train_limit": 256, "threads": 1}
        )
        return lambda: open_session(settings).adapter


class RemovesTheWrongUnits(SimulatedAdapter):
    def remove(self, directive: Remove) -> Changed:
        wrong = {name: np.arange(len(units)) if max(units) else units for name, units in directive.keep.items()}
        return super().remove(dataclasses.replace(directive, keep=wrong))


class PredictsWrongly(SimulatedAdapter):
    def remove(self, directive: Remove) -> Changed:
        changed = super().remove(directive)
        graph = changed.graph.with_terms(changed.graph.terms[:1])
        return dataclasses.replace(changed, graph=graph)


class LearnsFromEvaluation(SimulatedAdapter):
    def evaluate(self, directive: Evaluate) -> Evaluated:
        answer = super().evaluate(directive)
        if directive.gates is not None:
            self._state.weights["fc0.bias"] = self._state.weights["fc0.bias"] + 0.1
        return answer


class GrowsAtRandom(SimulatedAdapter):
    def grow(self, directive: Grow) -> Changed:
        changed = super().grow(directive)
        self._state.weights["fc1.weight"] = self._state.weights["fc1.weight"] * 1.5
        return changed


class ForgetsItsSnapshots(SimulatedAdapter):
    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self._snapshots = {name: self._copy(self._state) for name in self._snapshots}


class ForgetsHowOftenItTrained(SimulatedAdapter):
    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self._trainings = 0


class MeasuresTooMuch(SimulatedAdapter):
    def measure(self, directive: Measure) -> SignalReader:
        return super().measure(dataclasses.replace(directive, signals=frozenset(Signal)))


class TrainsDifferently(SimulatedAdapter):
    runs = 0

    def train(self, directive: Train) -> Trained:
        TrainsDifferently.runs += 1
        self._trainings += TrainsDifferently.runs
        return super().train(directive)


class DrawsInMeasuring(SimulatedAdapter):
    def measure(self, directive: Measure) -> SignalReader:
        self._trainings += 1  # the seed of the next training
        return super().measure(directive)


class InventsGradients(SimulatedAdapter):
    def measure(self, directive: Measure) -> SignalReader:
        reader = super().measure(directive)
        if Signal.GATE_GRADIENT in directive.signals:
            rng = np.random.default_rng(0)
            for key, array in reader._arrays.items():  # type: ignore[attr-defined]
                if key[0] is Signal.GATE_GRADIENT:
                    reader._arrays[key] = rng.normal(size=array.shape)  # type: ignore[attr-defined]
        return reader


class Deaf(SimulatedAdapter):
    """Does not hear one field of one directive."""

    deaf_to = ""

    def train(self, directive: Train) -> Trained:
        return super().train(self._heard(directive))

    def remove(self, directive: Remove) -> Changed:
        return super().remove(self._heard(directive))

    def measure(self, directive: Measure) -> SignalReader:
        return super().measure(self._heard(directive))

    def _heard(self, directive: T) -> T:
        kind, _, field = self.deaf_to.partition(".")
        if type(directive).__name__ != kind:
            return directive
        nothing = next(f.default for f in dataclasses.fields(directive) if f.name == field)  # type: ignore[arg-type]
        return dataclasses.replace(directive, **{field: nothing})  # type: ignore[type-var]


class ShrugsAtDamage(SimulatedAdapter):
    def restore(self, folder: Path) -> None:
        if (folder / "state.json").exists():
            super().restore(folder)


FAULTS: dict[type[SimulatedAdapter], str] = {
    RemovesTheWrongUnits: "masked equals pruned",
    PredictsWrongly: "a removal does what the graph says, at the cost that it predicts",
    LearnsFromEvaluation: "measuring and evaluating leave the model as it was",
    GrowsAtRandom: "growth preserves the function",
    ForgetsItsSnapshots: "a checkpoint restores everything",
    ForgetsHowOftenItTrained: "a checkpoint restores everything",
    MeasuresTooMuch: "signals have their shapes",
    TrainsDifferently: "a checkpoint restores everything",
    DrawsInMeasuring: "measuring and evaluating draw no random numbers of a training",
    InventsGradients: "gate gradients are slopes of the loss",
    ShrugsAtDamage: "an unreadable checkpoint is a JournalError",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda cls: cls.__name__)
def test_a_faulty_adapter_is_caught_by_the_right_rule(fault: type[SimulatedAdapter]) -> None:
    with pytest.raises(PluginError, match="'guilty'"):
        ADAPTER_RULES[FAULTS[fault]](lambda: _simulated(fault), "guilty")


@pytest.mark.parametrize(
    "field",
    ["Train.gates", "Train.decay", "Train.within", "Train.distil", "Train.clip", "Remove.gates", "Measure.fold"],
)
def test_an_adapter_that_does_not_hear_a_field_is_caught(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deaf, "deaf_to", field)
    with pytest.raises(PluginError, match="'guilty'"):
        ADAPTER_RULES["what a directive says is heard"](lambda: _simulated(Deaf), "guilty")

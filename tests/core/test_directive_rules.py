"""What a policy may not do: every broken rule is the plugin's fault, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from prunus.core import plan as plan_module
from prunus.core.blocks import Block
from prunus.core.directive_rules import DirectiveRules
from prunus.core.directives import (
    Changed,
    Directive,
    Distillation,
    Evaluate,
    Grow,
    Measure,
    Merge,
    Note,
    Observation,
    Remove,
    Snapshot,
    Train,
)
from prunus.core.errors import PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.kernels import Kernel
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.run import MAX_IDLE, execute
from prunus.core.signals import Signal
from prunus.core.testing.graphs import residual_graph
from prunus.core.testing.policy_rules import Seen
from prunus.core.testing.simulation import SimulatedAdapter


def _policy(*directives: Any, plan: Any = None) -> PruningPolicy:
    class Listed(PruningPolicy):
        def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
            answer: Any = None
            for directive in directives:
                answer = yield directive(answer) if callable(directive) else directive
            return plan if plan is not None else getattr(answer, "plan", None)

    return Listed()


def _execute(policy: PruningPolicy, **task: Any) -> PruningPlan:
    adapter = SimulatedAdapter(samples=128, dense_epochs=1)
    return execute(policy, adapter.task("params=90%", **task), adapter, plugin="guilty", events=Seen("guilty"))


BROKEN: dict[str, tuple[PruningPolicy, str]] = {
    "no directive": (_policy("prune please"), "must yield directives"),
    "unknown group": (_policy(Remove({"nobody": [0]})), "unknown channel group 'nobody'"),
    "unit out of range": (_policy(Remove({"h0": [0, 1, 99]})), "must lie in 0..23"),
    "fractional units": (_policy(Remove({"h0": [0.5, 1.5]})), "whole unit numbers"),
    "under the floor": (_policy(Remove({"h0": [0]})), "smallest allowed is 2"),
    "NaN gates": (_policy(Evaluate(gates={"h0": np.full(24, np.nan)})), "gates are finite"),
    "negative gates": (_policy(Evaluate(gates={"h0": np.full(24, -1.0)})), "lie in 0..2"),
    "gates of a wrong shape": (_policy(Evaluate(gates={"h0": np.ones(23)})), "one number per unit"),
    "survival above one": (_policy(Remove({}, survival={"h0": np.full(24, 1.5)})), "lie in 0..1"),
    "negative epochs": (_policy(Train(epochs=-1)), "Train.epochs lies in"),
    "NaN learning rate": (_policy(Train(epochs=1, lr=float("nan"))), "Train.lr lies in"),
    "no gradient at all": (_policy(Train(epochs=1, clip=0.0)), "Train.clip lies in"),
    "test split": (_policy(Evaluate(split="test")), "a split is one of"),  # type: ignore[arg-type]
    "empty fold": (_policy(Measure(frozenset({Signal.WEIGHT}), fold=(2, 2))), "0 <= k < n"),
    "no such teacher": (_policy(Evaluate(model="stranger")), "a model is one of"),
    "shrinking growth": (_policy(Grow({"h0": 3})), "Grow does not shrink"),
    "path as a name": (_policy(Snapshot("../../etc")), "a snapshot's name"),
    "the dense model's name": (_policy(Snapshot("dense")), "not one that the run itself uses"),
    "the average's name": (_policy(Snapshot("ema")), "not one that the run itself uses"),
    "a teacher that is not there": (_policy(Train(1, distil=Distillation())), "a teacher is one of"),
    "an average that is not there": (_policy(Evaluate(model="ema")), "a model is one of"),
    "an average of what is thrown away": (
        _policy(Train(0.1, within={"h0": range(8)}, ema=0.9), Evaluate(model="ema")),
        "a model is one of",
    ),
    "endless temperature": (
        _policy(Snapshot("a"), Train(1, distil=Distillation(("a",), temperature=float("inf")))),
        "Distillation.temperature lies in",
    ),
    "a snapshot with gates": (
        _policy(Snapshot("a"), Evaluate(model="a", gates={"h0": np.zeros(24)})),
        "evaluated as it is",
    ),
    "unknown recalibration": (_policy(Remove({}, recalibrate="sometimes")), "recalibrate is one of"),  # type: ignore[arg-type]
    "unknown schedule": (_policy(Train(1, schedule="linear")), "a schedule is one of"),  # type: ignore[arg-type]
    "half a unit": (_policy(Grow({"h0": 26.5})), "a width is a whole number"),  # type: ignore[dict-item]
    "half an image": (_policy(Evaluate(images=1.5)), "images are a whole number"),  # type: ignore[arg-type]
    "NaN in a note": (_policy(Note("n", {"x": float("nan")})), "numbers are finite"),
    "never removes": (_policy(Evaluate()), "must return a PruningPlan"),
    "measured without a block that is none": (
        _policy(Measure(frozenset({Signal.WEIGHT}), blocks=("h0",))),
        "Measure.blocks names blocks of the current graph",
    ),
    "unknown block": (_policy(Remove({}, blocks=("h0",))), "There is no 'h0'"),
    "blocks in a list": (_policy(Remove({}, blocks=["h0"])), "tuple of names"),  # type: ignore[arg-type]
    "over the budget": (_policy(Remove({})), "must meet every target"),
    "object that is no data": (_policy(Note("n", {"x": object()})), "declared types"),  # type: ignore[dict-item]
    "loops for ever": (_policy(*[Note("again")] * (MAX_IDLE + 1)), "may change nothing"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_directive_is_the_plugins_fault_by_name(fault: str) -> None:
    policy, message = BROKEN[fault]
    with pytest.raises(PluginError, match=message) as caught:
        _execute(policy)
    assert caught.value.plugin == "guilty"
    assert "'guilty'" in str(caught.value)


def test_a_policy_that_raises_in_the_middle_is_blamed_and_the_cause_is_kept() -> None:
    def fail(answer: Any) -> Any:
        raise ZeroDivisionError("by hand")

    with pytest.raises(PluginError, match=r"must not raise.*ZeroDivisionError: by hand") as caught:
        _execute(_policy(Evaluate(), fail))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_signals_cannot_be_read_after_the_next_directive() -> None:
    class Late(PruningPolicy):
        def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
            signals = yield Measure(frozenset({Signal.WEIGHT}))
            yield Evaluate()
            signals.read(Signal.WEIGHT, "fc0.weight")
            changed = yield Remove({})
            return changed.plan

    with pytest.raises(PluginError, match="only until the next directive"):
        _execute(Late())


def test_what_a_policy_reads_cannot_be_written() -> None:
    class Vandal(PruningPolicy):
        def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
            signals = yield Measure(frozenset({Signal.WEIGHT}))
            signals.read(Signal.WEIGHT, "fc0.weight")[:] = 0
            changed = yield Remove({})
            return changed.plan

    with pytest.raises(PluginError, match="read-only"):
        _execute(Vandal())


@pytest.mark.parametrize(
    "directive",
    [
        Train(epochs=1),
        Evaluate(),
        Measure(frozenset({Signal.ACTIVATION_MEAN})),
        Remove({}, refit="sequential"),
        Remove({}, recalibrate="yes"),
    ],
)
def test_without_data_only_weights_can_be_asked_for(directive: Directive) -> None:
    with pytest.raises(PluginError, match="without"):
        _execute(_policy(directive), has_data=False, has_labels=False)


def test_another_plan_than_the_adapters_last_one_is_refused() -> None:
    keep = {"h0": list(range(8)), "h1": list(range(8))}
    adapter = SimulatedAdapter(samples=128, dense_epochs=1)
    foreign = adapter.remove(Remove({"h0": [0, 1, 2], "h1": [0, 1, 2]})).plan
    with pytest.raises(PluginError, match="plan of its last Remove"):
        _execute(_policy(Remove(keep), plan=foreign))


def test_groups_of_one_width_grow_together() -> None:
    tied: Any = {"h0": {"equal_count": "t"}, "h1": {"equal_count": "t"}}
    task = SimulatedAdapter((8, 16, 16, 4), samples=128, dense_epochs=1, **tied).task("macs=50%")
    rules = DirectiveRules("guilty", task, task.graph)
    rules.check(Grow({"h0": 20, "h1": 20}))
    for widths in ({"h0": 20}, {"h0": 20, "h1": 18}):
        with pytest.raises(PluginError, match="groups of equal width grow together"):
            rules.check(Grow(widths))


def test_a_block_goes_once_and_its_gate_is_one_number_that_no_removal_folds() -> None:
    graph = residual_graph(8, [6, 4])
    task = dataclasses.replace(SimulatedAdapter(samples=128, dense_epochs=1).task("macs=50%"), graph=graph)
    rules = DirectiveRules("guilty", task, graph)
    rules.check(Evaluate(gates={"block1": np.zeros(1), "inner0": np.ones(6)}))
    rules.check(Remove({}, blocks=("block1", "block0")))
    for wrong, message in (
        (Remove({}, blocks=("block1", "block1")), "Remove.blocks says each name once"),
        (Evaluate(gates={"block1": np.zeros(2)}), "one number per unit"),
        (Remove({}, gates={"block1": np.zeros(1)}), "There is no 'block1'"),
        (Train(epochs=1, decay={"block1": np.zeros(1)}), "There is no 'block1'"),
    ):
        with pytest.raises(PluginError, match=message):
            rules.check(wrong)


def test_branches_are_merged_before_a_refit_and_one_of_them_stays() -> None:
    kernels = [Kernel("block0.conv1", "block0.conv1.weight", 3, ("kernel", "point"))]
    graph = residual_graph(8, [6, 4]).with_kernels(kernels)
    task = dataclasses.replace(SimulatedAdapter(samples=128, dense_epochs=1).task("macs=50%"), graph=graph)
    rules = DirectiveRules("guilty", task, graph)
    rules.check(Grow({}, branches=("block0.conv1",)))
    rules.check(Remove({}, kernels=("block0.conv1",)))
    branches = [Block(f"block0.conv1.{kind}", frozenset({kind}), frozenset(), "block0.conv1") for kind in "ab"]
    graph = residual_graph(8, [6, 4])
    branched = ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, [*graph.blocks.values(), *branches])
    running = DirectiveRules("guilty", task, branched)
    running.check(Merge())
    running.check(Remove({}, blocks=("block0.conv1.a",)))
    running.check(Train(epochs=1, decay={"block0.conv1.a": np.ones(1)}))
    for judge, wrong, message in (
        (rules, Merge(), "Merge needs branches"),
        (rules, Grow({}, branches=("block1.conv1",)), "kernels of the graph that can run as branches"),
        (rules, Grow({"inner0": 8}, branches=("block0.conv1",)), "not both at once"),
        (rules, Remove({}, kernels=("block1.conv1",)), "There is no 'block1.conv1'"),
        (
            running,
            Remove({}, blocks=("block0.conv1.a",), refit="sequential"),
            "merged before anything",
        ),
        (running, Evaluate(within={}, refit="sequential"), "merged before anything"),
        (
            running,
            Remove({}, blocks=("block0.conv1.a", "block0.conv1.b")),
            "one branch of every",
        ),
    ):
        with pytest.raises(PluginError, match=message):
            judge.check(wrong)


def test_layers_are_left_out_of_a_measurement_that_has_neither_gates_nor_branches() -> None:
    kernels = [Kernel("block0.conv1", "block0.conv1.weight", 3, ("kernel", "point"))]
    graph = residual_graph(8, [6, 4]).with_kernels(kernels)
    task = dataclasses.replace(SimulatedAdapter(samples=128, dense_epochs=1).task("macs=50%"), graph=graph)
    rules = DirectiveRules("guilty", task, graph)
    signals = frozenset({Signal.ACTIVATION_COVARIANCE})
    rules.check(Measure(signals, blocks=("block1",), kernels=("block0.conv1",), refit="sequential"))
    rules.check(Measure(signals, gates={"inner0": np.ones(6), "block1": np.zeros(1)}))
    branches = [Block(f"block0.conv1.{kind}", frozenset({kind}), frozenset(), "block0.conv1") for kind in "ab"]
    branched = ChannelGraph(graph.groups.values(), graph.terms, graph.tensors, [*graph.blocks.values(), *branches])
    for judge, layers in (
        (rules, {"blocks": ("block1",), "gates": {"inner0": np.ones(6)}}),
        (rules, {"kernels": ("block0.conv1",), "gates": {"inner0": np.ones(6)}}),
        (DirectiveRules("guilty", task, branched), {"blocks": ("block1",)}),
    ):
        with pytest.raises(PluginError, match="neither gates nor branches"):
            judge.check(Measure(signals, **layers))  # type: ignore[arg-type]


def test_a_plan_that_still_has_branches_is_refused() -> None:
    class Branching(SimulatedAdapter):
        def remove(self, directive: Remove) -> Changed:
            changed = super().remove(directive)
            running = {"conv": plan_module.Branching(kinds=["kernel"], inner=0, norm=None)}
            return dataclasses.replace(changed, plan=changed.plan.branched(running))

    adapter = Branching(samples=128, dense_epochs=1)
    policy = _policy(Remove({"h0": list(range(8)), "h1": list(range(8))}))
    with pytest.raises(PluginError, match="'conv' still runs as branches"):
        execute(policy, adapter.task("params=90%"), adapter, plugin="guilty", events=Seen("guilty"))

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prunus.core.cli import run
from prunus.core.directives import Changed, Directive, Distillation, Remove, Train, Trained, Verification
from prunus.core.history import History
from prunus.core.plan import ModelSource, PruningPlan
from prunus.core.testing.graphs import mlp_graph


def after(*losses: float, second: Directive | None = None, between: bool = False) -> list[str]:
    """Notes on trainings that ended with these losses; `second` is what every one but the first is."""
    history, graph = History(), mlp_graph([4, 8, 2])
    for k, loss in enumerate(losses):
        directive = second if second is not None and k else Train(1.0, label=f"piece {k}")
        said = history.add(2 * k, directive, Trained(loss, 0.5, 1.0, 8), 1.0)
        assert (said is not None) == (said in history.notes)
        if between:
            plan = PruningPlan(model=ModelSource(name="m"))
            history.add(2 * k + 1, Remove({}), Changed(graph, plan, Verification("exact", 0.0, 1.0)), 1.0)
    return history.notes


def test_a_training_that_lost_what_was_learned_is_named_with_what_helps() -> None:
    (note,) = after(0.8, 0.61, 0.55, 1.05, 2.4)  # said once
    assert note.startswith("the training loss rose from 0.55 to 1.05 (piece 3): the learning rate is too high")
    assert "lower --lr" in note and "--clip-grad 2" in note


def test_a_training_that_lost_what_its_own_epochs_had_learned_is_named() -> None:
    history = History()
    said = history.add(0, Train(20.0, label="dense"), Trained(1.05, 0.5, 1.0, 8, least=0.55), 1.0)
    assert said is not None and said.startswith("the training loss rose from 0.55 to 1.05 (dense)")
    assert history.add(0, Train(20.0), Trained(0.56, 0.5, 1.0, 8, least=0.55), 1.0) is None


@pytest.mark.parametrize("losses", [(0.8, 0.61, 0.55, 0.6), (0.003, 0.01, 0.08), (1.0, 1.35), (2.0,)])
def test_losses_that_fall_or_waver_are_not_remarked_on(losses: tuple[float, ...]) -> None:
    assert not after(*losses)


@pytest.mark.parametrize(
    "second",
    [
        Train(1.0, decay={"h0": np.ones(8)}),
        Train(1.0, distil=Distillation(("dense",))),
        Train(1.0, within={"h0": [0, 1]}),
    ],
)
def test_a_loss_that_is_another_or_rises_by_intent_is_not_compared(second: Train) -> None:
    assert not after(0.5, 1.5, second=second)


def test_a_changed_model_is_judged_anew() -> None:
    assert not after(0.5, 1.5, between=True)


DIVERGING = """
import numpy as np

from prunus.core import PruningPolicy
from prunus.core.allocation import uniform_keep
from prunus.core.directives import Remove, Train


class Diverging(PruningPolicy):
    def run(self, task):
        yield Train(task.epochs, lr=0.05)
        yield Train(task.epochs, lr=20.0, clip=2.0, label="too fast")
        same = {name: np.ones(group.units) for name, group in task.graph.prunable.items()}
        return (yield Remove(uniform_keep(task.graph, task.budget, same))).plan
"""
PROTOCOL = """
title = "One"
adapter = "simulated"
model = "simulated/small"
data = "digits"
targets = ["macs=50%"]
epochs = [2.0]
seeds = [0]
dense = {epochs = 2.0}
entries = [{name = "fast", plugin = "methods:Diverging"}]
import_from = "."
"""


def test_a_cell_of_a_comparison_keeps_the_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("methods.py").write_text(DIVERGING)
    Path("registry.toml").write_text(
        '[adapters.simulated]\ntarget = "prunus.core.testing.simulated_session:open_session"\n'
    )
    Path("p.toml").write_text(PROTOCOL)
    assert run(["compare", "p.toml", "--output", "out", "--registry", "registry.toml"]) == 0
    (cell,) = Path("out/cells").glob("*.json")
    (note,) = json.loads(cell.read_text())["outcome"]["notes"]
    assert note.startswith("the training loss rose from ") and "(too fast)" in note

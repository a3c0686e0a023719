"""The rivals do what they say: MACs within 1%, on real networks; and the digits protocol runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunus.adapters.pytorch.session import open_session
from prunus.core.cli import run
from prunus.core.compare_cell import RivalJob, load_rival
from prunus.core.compare_protocol import read_protocol
from prunus.core.compare_record import DenseRecord
from prunus.core.errors import PlanError
from prunus.core.settings import make_settings

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = sorted((ROOT / "benchmarks" / "protocols").glob("*.toml"))


def job(target: float, epochs: float = 0.0, **config: Any) -> RivalJob:
    """On an untrained ResNet-8: what is removed does not depend on how good it is."""
    settings = make_settings(
        {
            "model": "prunus/resnet8",
            "data": "digits",
            "targets": (f"macs={target:.0%}",),
            "epochs": epochs,
            "batch_size": 64,
            "threads": 1,
        }
    )
    macs = open_session(settings).graph.cost().macs
    dense = DenseRecord(seed=0, accuracy=0, holdout=0, macs=macs, training_macs=1, seconds=0, content="")
    return RivalJob(settings, "plain", config, dense, 0.2, target * macs, open_session)


def module(name: str) -> ModuleType:
    """A rival's module, by the way that a comparison finds it."""
    load_rival(f"benchmarks.rivals.{name}:__name__", ROOT)
    import importlib

    return importlib.import_module(f"benchmarks.rivals.{name}")


def measured(model: torch.nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.randn(1, 1, 8, 8))
    return float(counter.get_total_flops() / 2)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("method", ["magnitude", "bn-scale", "group-norm", "growing-reg", "taylor", "obdc"])
def test_torch_pruning_meets_the_macs_within_one_percent(method: str, scope: str) -> None:
    depgraph, steps, bench = module("depgraph"), module("steps"), module("bench")
    chosen = depgraph.DepGraphConfig(method=method, scope=scope)
    place = bench.Bench(job(0.25))
    model = copy.deepcopy(place.model)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)  # fresh scales are all 1: ties, none is ever removed
    pruner = depgraph.make_pruner(model, place.example, chosen, place.data.classes)
    macs = steps.prune_to(place, model, pruner, floor=0.05)
    assert macs == measured(model)
    assert abs(macs / place.job.limit - 1) <= 0.01


def test_no_group_falls_under_its_floor() -> None:
    depgraph, steps, bench = module("depgraph"), module("steps"), module("bench")
    place = bench.Bench(job(0.1))
    model = copy.deepcopy(place.model)
    chosen = depgraph.DepGraphConfig(method="magnitude", scope="global")
    steps.prune_to(place, model, depgraph.make_pruner(model, place.example, chosen, 10), floor=0.2)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.out_channels >= 0.2 * place.model.get_submodule(name).out_channels


@pytest.mark.parametrize("method", ["bn-scale", "group-norm", "growing-reg"])
def test_sparse_learning_shrinks_what_it_regularises(method: str) -> None:
    """The regulariser's gradient points along the weights it should shrink, and the budget is split."""
    outcome = module("depgraph").prune(job(0.5, epochs=0.2, method=method, sparse_shares=(0.5,)))
    plain = module("depgraph").prune(job(0.5, epochs=0.2, method=method))
    assert outcome.uses_dense
    assert outcome.training_macs == pytest.approx(plain.training_macs * 1.5, rel=0.02)
    assert "0.5 of the epochs sparse" in outcome.notes[0]
    assert outcome.notes[1].startswith("torch-pruning ")


def test_the_best_attempt_is_chosen_on_held_out_images() -> None:
    outcome = module("depgraph").prune(job(0.5, epochs=0.1, lrs=(0.05, 1e-6), floors=(0.0, 0.1)))
    assert outcome.notes[0].startswith("best of 4 on the held-out part: lr ")


def test_floors_that_leave_the_macs_out_of_reach_drop_out() -> None:
    """Groups that all keep half of their channels cost more than a tenth of the MACs."""
    depgraph = module("depgraph")
    outcome = depgraph.prune(job(0.1, scope="global", floors=(0.0, 0.5)))
    assert outcome.notes[0].endswith("floor 0")
    with pytest.raises(PlanError, match="torch-pruning ended at"):
        depgraph.prune(job(0.1, scope="global", floors=(0.5,)))


def test_a_long_budget_carries_out_the_two_best_of_short_recoveries() -> None:
    """A hopeless rate is given up after the short recoveries; what wins is trained for the whole budget."""
    depgraph = module("depgraph")
    whole = depgraph.prune(job(0.5, epochs=1.5, lrs=(0.05, 0.1), screen=1.0))
    outcome = depgraph.prune(job(0.5, epochs=1.5, lrs=(0.05, 1e-6, 0.1), screen=1.0))
    assert outcome.notes[0].startswith("best of 3 on the held-out part: lr 0.")
    assert (outcome.accuracy, outcome.training_macs) == (whole.accuracy, whole.training_macs)


@pytest.mark.parametrize(("budget", "epochs"), [("epochs", 0.6), ("macs", 1.2)])
def test_a_narrow_network_trains_for_equal_epochs_or_equal_macs(budget: str, epochs: float) -> None:
    """Dense 0.2 epochs, recovery 0.4: narrow at 25% gets 0.6 epochs, or 0.2 / 0.25 + 0.4."""
    asked = job(0.25, epochs=0.4, budget=budget)
    outcome = module("narrow").train_narrow(asked)
    assert 0.99 <= outcome.macs / asked.limit <= 1
    images = 1293 // 64 * 64
    assert outcome.training_macs == pytest.approx(3 * outcome.macs * images * epochs, rel=0.05)
    assert not outcome.uses_dense


def test_narrow_weights_have_the_scale_of_a_fresh_narrow_network() -> None:
    narrow, bench = module("narrow"), module("bench")
    asked = job(0.25)
    place = bench.Bench(asked)
    narrow._narrow(place)
    for layer in place.model.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.weight.numel() > 400:
            fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
            assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_committed_protocols_are_valid_and_their_entries_exist(path: Path) -> None:
    protocol = read_protocol(path)
    for entry in protocol.entries:
        if entry.rival is not None:
            assert callable(load_rival(entry.rival, ROOT))
    sides = {entry.side for entry in protocol.entries}
    assert sides >= {"method", "rival"}


def test_a_slice_of_the_digits_protocol_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One method and one rival without recovery, from the protocol's own dense model."""
    text = (ROOT / "benchmarks" / "protocols" / "digits.toml").read_text()
    text = text.replace("epochs = 15", "epochs = 6").replace('"../.."', json.dumps(str(ROOT)))
    (tmp_path / "digits.toml").write_text(text)
    cells = ["gsm-anneal/macs=50%/0ep/plain/seed0", "TP L2 uniform/macs=50%/0ep/plain/seed0"]
    words = ["compare", str(tmp_path / "digits.toml"), "--output", str(tmp_path / "out"), "--json"]
    assert run([*words, *(word for cell in cells for word in ("--only", cell))]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 2
    records = json.loads((tmp_path / "out" / "table.json").read_text())["cells"]
    ours, theirs = (record["outcome"] for record in records)
    assert all(abs(o["macs"] / (0.5 * records[0]["dense"]["macs"]) - 1) <= 0.01 for o in (ours, theirs))
    assert records[0]["dense"]["accuracy"] > 0.9
    assert ours["accuracy"] > 0.85

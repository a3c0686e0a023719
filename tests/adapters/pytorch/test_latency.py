"""Measured latency on real models. Bounds are wide: the machine may be busy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch import surgery
from prunus.adapters.pytorch.latency import measure, measure_pair
from prunus.adapters.pytorch.latency_table import latency, latency_table
from prunus.adapters.pytorch.verification import Prepared, prepare
from prunus.adapters.pytorch.zoo import ZOO, SmallResNet
from prunus.core.allocation import uniform_keep
from prunus.core.budget import Budget, Target
from prunus.core.errors import ConfigError
from prunus.core.latency import LatencyTable

TIMED = pytest.mark.slow
"""Times real operators: on a machine whose clock drifts by factors no limit holds."""

EXAMPLE = (torch.randn(2, 3, 32, 32),)


@TIMED
def test_a_wider_model_takes_longer() -> None:
    narrow, wide = SmallResNet(1, widths=(8, 16, 32)), SmallResNet(1, widths=(64, 128, 256))
    found = measure_pair(wide, narrow, EXAMPLE, repeats=15, threads=1)
    assert found.ratio < 0.9
    assert found.pruned.fastest < 0.5 * found.dense.fastest
    assert (found.batch, found.threads, found.dtype, len(found.dense.samples)) == (2, 1, "float32", 15)
    low, high = found.dense.quartiles
    assert low <= found.dense.median <= high


def test_measuring_leaves_modes_types_and_threads_as_they_were() -> None:
    model = ZOO["resnet8"]().train()
    threads = torch.get_num_threads()
    measure([model], EXAMPLE, repeats=1, threads=1, dtype="bfloat16")
    assert all(module.training for module in model.modules())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.get_num_threads() == threads


def test_models_take_turns() -> None:
    calls: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.name)
            return torch.linalg.matrix_power(x, 9)

    measure_pair(Noted("a"), Noted("b"), (torch.rand(400, 400),), repeats=4, threads=1)
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert turns[-8:] == ["a", "b"] * 4


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="dtype 'float8' is not one of float32, bfloat16, float16"):
        measure([ZOO["resnet8"]()], EXAMPLE, dtype="float8")


class OnlySingle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("mkldnn_bf16 is not here\nand more")
        return x


def test_a_type_that_the_model_cannot_run_in_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"^the model does not run in bfloat16 here: mkldnn_bf16 is not here$"):
        measure([OnlySingle()], EXAMPLE, dtype="bfloat16")


Shrink = Callable[[Mapping[str, Sequence[int]]], nn.Module]


def shrinker(model: nn.Module, prepared: Prepared) -> Shrink:
    def shrink(keep: Mapping[str, Sequence[int]]) -> nn.Module:
        small, graph = copy.deepcopy(model), prepared.graph
        after = {**graph.units, **{name: len(units) for name, units in keep.items()}}
        surgery.remove(small, graph, keep, prepared.bindings.edits(graph.units, after))
        return small

    return shrink


def tabled(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Prepared, Shrink, LatencyTable]:
    prepared = prepare(model.eval(), example)
    shrink = shrinker(model, prepared)
    return prepared, shrink, latency_table(prepared.trace, prepared.graph, model, example, shrink, threads=1)


def check_table(prepared: Prepared, shrink: Shrink, table: LatencyTable, example: tuple[Tensor, ...]) -> None:
    assert float(np.median(np.abs(table.errors))) < 0.2
    graph = prepared.graph.with_terms(table.terms)
    assert graph.cost().latency == pytest.approx(table.dense, rel=0.3)
    budget = Budget.resolve([Target.parse("latency=60%")], graph.cost())
    scores = {name: np.ones(group.units) for name, group in graph.groups.items()}
    keep = uniform_keep(graph, budget, scores)
    expected = graph.cost({name: len(units) for name, units in keep.items()}).latency
    assert expected <= budget.limits["latency"]
    assert latency(shrink({n: u.tolist() for n, u in keep.items()}), example, threads=1) == pytest.approx(
        expected, rel=0.3
    )


@TIMED
def test_a_table_of_timed_operators_foretells_whole_models_and_makes_latency_a_target() -> None:
    torch.manual_seed(0)
    check_table(*tabled(ZOO["resnet14"](), EXAMPLE), EXAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("mobilenetv3_small_050", 224), ("test_vit", 160), ("resnet18", 224)])
def test_tables_of_other_architectures_foretell_whole_models(name: str, size: int) -> None:
    torch.manual_seed(0)
    example = (torch.randn(1, 3, size, size),)
    _, _, table = tabled(timm.create_model(name), example)
    assert float(np.median(np.abs(table.errors))) < 0.2


@TIMED
def test_every_operator_that_can_shrink_has_a_term() -> None:
    model = ZOO["resnet8"]()
    prepared, _, table = tabled(model, EXAMPLE)
    shrinking = {term.source for term in prepared.graph.terms if term.quantity == "macs" and term.extents}
    assert shrinking <= {term.source for term in table.terms if term.extents}
    assert all(term.coefficient > 0 for term in table.terms)

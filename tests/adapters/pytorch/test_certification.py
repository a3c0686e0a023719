"""What the Python code cannot follow is locked, that alone, and soon found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch import certification
from prunus.adapters.pytorch.verification import Prepared, prepare


class Chain(nn.Module):
    """Ten convolutions; behind some of them the code takes a number from the width at run time."""

    def __init__(self, *stubborn: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 1) for i in range(10))
        self.head = nn.Linear(6, 3)
        self.stubborn = stubborn
        with torch.no_grad():  # a factor anywhere is a factor of the output
            for layer in self.layers:
                layer.weight.abs_()
                layer.bias.zero_()
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).relu()
            if number in self.stubborn:
                x = x / float(torch.tensor(x.shape[1])) ** 0.5
        return self.head(x.mean((2, 3)))


class Chooser(nn.Module):
    """Looks channels up by index where it finds something, which it does not while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.maps = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.gate = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).relu()
        maps, found = self.maps(features), self.gate(features).mean() > 0
        if found:
            maps = maps[:, torch.arange(2) * 2]
        return maps.sum((1, 2, 3))


def _counted(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> tuple[Prepared, int]:
    """The prepared model, and how many removals were tried."""
    tried = 0
    whole = certification._Probe.fault

    def fault(*args: object) -> object:
        nonlocal tried
        tried += 1
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(certification._Probe, "fault", fault)
    torch.manual_seed(0)
    return prepare(model.eval(), torch.randn(1, 3, 4, 4)), tried


def test_nothing_is_locked_in_code_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, tried = _counted(monkeypatch, Chain())
    assert len(prepared.graph.prunable) == 10
    assert tried == len(certification.SEEDS)


@pytest.mark.parametrize("stubborn", [(0,), (9,), (4,), (2, 7), (0, 1, 9)])
def test_the_groups_at_fault_are_locked_and_no_others(
    stubborn: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, tried = _counted(monkeypatch, Chain(*stubborn))
    locked = {n for n, g in prepared.graph.groups.items() if g.locked and "cannot follow" in g.locked}
    assert {int(name.split(".")[1]) for name in locked} == set(stubborn)
    assert tried <= 3 + 5 * len(stubborn) + 2


def test_a_group_that_is_needed_on_a_path_not_traced_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Chooser()
    with torch.no_grad():  # the whole model finds nothing; with seven of its eight channels it does
        for tensor, value in ((model.body.weight, 0.0), (model.body.bias, 1.0)):
            tensor.fill_(value)
        for tensor, value in ((model.gate.weight, -1.0), (model.gate.bias, 7.5)):
            tensor.fill_(value)
    prepared, tried = _counted(monkeypatch, model)
    reasons = [g.locked for g in prepared.graph.groups.values() if g.locked]
    assert any("looked up by index" in reason for reason in reasons)
    assert tried <= 2 + len(certification.SEEDS)


class Rounding(nn.Module):
    """Adds and takes away what leaves the rest with three digits."""

    def __init__(self, stubborn: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 50)
        self.stubborn = stubborn

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x / float(torch.tensor(x.shape[-1])) ** 0.5 if self.stubborn else x
        return self.second(x + 1e4) - self.second(torch.full_like(x, 1e4))


@pytest.mark.parametrize("stubborn", [False, True])
def test_rounding_is_told_from_a_fault_without_float64(stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    follows = certification.follows_program
    monkeypatch.setattr(certification, "follows_program", lambda *args: asked.append(1) or follows(*args))
    torch.manual_seed(0)
    prepared = prepare(Rounding(stubborn).eval(), torch.randn(1, 6))
    assert len(prepared.graph.prunable) == (0 if stubborn else 1)
    assert asked or stubborn


def test_a_bare_assertion_is_quoted_in_the_reason() -> None:
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if x.shape[1] != 12:
                raise AssertionError  # twelve and no other
            return self.second(x)

    reasons = [g.locked or "" for g in prepare(Asserting().eval(), torch.randn(1, 4)).graph.groups.values()]
    assert any("twelve and no other" in reason for reason in reasons)


class Scaled(nn.Module):
    """With `fixed`, it knows one size of images; with `stubborn`, the code takes a number from the width."""

    def __init__(self, fixed: bool, stubborn: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.position = nn.Parameter(torch.randn(1, 8, 256, 256)) if fixed else None
        self.stubborn = stubborn

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.position is None else self.first(x) + self.position
        if self.stubborn:
            x = x / float(torch.tensor(x.shape[1]))
        return self.second(x.relu()).mean((2, 3))


class TiedWhenSmall(nn.Module):
    """Small images take a path that ties the channels of two convolutions to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.third, self.fourth = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        if x.shape[-1] < 256:
            return self.third(a + b)
        return self.third(a) + self.fourth(b)


def _widths_compared(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Filled with the widths of the images on which pruned and masked are compared; every model is expensive."""
    seen: set[int] = set()
    compare = certification.compare

    def watched(*args: Any, **named: Any) -> object:
        seen.add(args[4][0].shape[-1])
        return compare(*args, **named)

    monkeypatch.setattr(certification, "EXPENSIVE", 0.0)
    monkeypatch.setattr(certification, "compare", watched)
    torch.manual_seed(0)
    return seen


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("stubborn", [False, True])
def test_an_expensive_model_is_certified_on_smaller_images_where_it_takes_them(
    fixed: bool, stubborn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _widths_compared(monkeypatch)
    prepared = prepare(Scaled(fixed, stubborn).eval(), torch.randn(1, 3, 256, 256))
    assert seen == {256 if fixed else 64}
    assert len(prepared.graph.prunable) == (0 if stubborn else 1)


def test_smaller_images_prove_nothing_where_other_units_shrink_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _widths_compared(monkeypatch)
    prepared = prepare(TiedWhenSmall().eval(), torch.randn(1, 3, 256, 256))
    assert seen == {256}
    assert len(prepared.graph.prunable) == 2


class Blind(nn.Module):
    """Its classifier is zero, so that its output says nothing of what the code does wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.head(x / float(torch.tensor(x.shape[1])))


def test_zeros_of_a_fresh_model_hide_no_fault() -> None:
    torch.manual_seed(0)
    model = Blind().eval()
    prepared = prepare(model, torch.randn(1, 6))
    assert not prepared.graph.prunable
    assert not model.head.weight.any() and not model.norm.weight.any()

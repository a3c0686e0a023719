"""Which modules are blocks: by proof on the captured forward pass, never by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.adapters.pytorch.tracing import trace_model


class Around(nn.Module):
    """A module whose forward is `rule(self, x)`, with one convolution as its branch."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.rule = rule
        self.f = nn.Conv2d(channels, channels, 3, padding=1)
        self.g = nn.Conv2d(channels, channels, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


class Net(nn.Module):
    """A stem that may clamp, the module in question, and a head."""

    def __init__(self, block: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.stem, self.act, self.block = nn.Conv2d(3, 8, 3), act, block
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.act(self.stem(x))).mean((2, 3)))


def _blocks(block: nn.Module, act: nn.Module | None = None) -> list[str]:
    torch.manual_seed(0)
    net = Net(block, act if act is not None else nn.Identity())
    return list(trace_model(net.eval(), torch.randn(1, 3, 10, 10)).graph.blocks)


def _two_adds(m: Any, x: Tensor) -> Tensor:
    x = x + m.drop(m.f(x))
    return x + m.g(x)


def _through_a_layout(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    tokens = tokens + m.f(x).flatten(2).transpose(1, 2)
    return tokens.transpose(1, 2).reshape(x.shape)


def _in_place(m: Any, x: Tensor) -> Tensor:
    x += m.f(x)
    return x


PROVEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a sum": lambda m, x: x + m.f(x),
    "a sum the other way round": lambda m, x: m.f(x) + x,
    "two sums": _two_adds,
    "dropout on the branch and on the trunk": lambda m, x: m.drop(x) + m.drop(m.f(x)),
    "a sum of tokens": _through_a_layout,
    "a sum in place": _in_place,
    "three terms": lambda m, x: m.g(x) + x + m.f(x),
}
REFUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no sum": lambda m, x: m.f(x),
    "a product": lambda m, x: x * m.f(x),
    "a scaled input": lambda m, x: 0.5 * x + m.f(x),
    "a scaled addend": lambda m, x: torch.add(m.f(x), x, alpha=2),
    "the input twice": lambda m, x: x + x + m.f(x),
    "an activation of anything": lambda m, x: F.relu(x + m.f(x)),
    "a smooth activation": lambda m, x: F.silu(x + m.f(x)),
    "a norm after the sum": lambda m, x: F.layer_norm(x + m.f(x), x.shape[1:]),
    "transposed rows and columns": lambda m, x: x.transpose(2, 3) + m.f(x),
    "a difference": lambda m, x: m.f(x) - x,
}


@pytest.mark.parametrize("what", PROVEN)
def test_a_module_that_adds_to_its_input_is_a_block(what: str) -> None:
    assert _blocks(Around(PROVEN[what])) == ["block"]


@pytest.mark.parametrize("what", REFUSED)
def test_a_module_that_does_anything_else_is_none(what: str) -> None:
    assert _blocks(Around(REFUSED[what])) == []


@pytest.mark.parametrize(
    ("act", "after", "proven"),
    [
        (nn.ReLU(), F.relu, True),
        (nn.ReLU6(), F.relu6, True),
        (nn.ReLU6(), F.relu, True),
        (nn.ReLU(), F.relu6, False),
        (nn.SiLU(), F.silu, False),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), F.relu, True),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), F.relu, False),
    ],
)
def test_an_activation_after_the_sum_is_allowed_only_where_the_input_has_been_through_it(
    act: nn.Module, after: Callable[[Tensor], Tensor], proven: bool
) -> None:
    assert bool(_blocks(Around(lambda m, x: after(x + m.f(x))), act)) == proven


def test_a_sequence_of_blocks_is_none_itself() -> None:
    stage = nn.Sequential(Around(PROVEN["a sum"]), Around(PROVEN["two sums"]))
    assert _blocks(stage) == ["block.0", "block.1"]


def test_a_block_that_adds_on_its_own_may_hold_another() -> None:
    outer = Around(lambda m, x: m.inner(x) + m.f(x))
    outer.inner = Around(PROVEN["a sum"])
    assert _blocks(outer) == ["block", "block.inner"]


def test_a_module_that_runs_twice_goes_only_with_the_whole_that_runs_once() -> None:
    shared = Around(PROVEN["a sum"])
    assert _blocks(nn.Sequential(shared, shared)) == ["block"]
    assert _blocks(nn.Sequential(shared, nn.Conv2d(8, 8, 1), shared)) == []


def test_a_module_that_shares_a_weight_with_another_is_no_block() -> None:
    first, second = Around(PROVEN["a sum"]), Around(lambda m, x: m.f(x))
    second.f.weight = first.f.weight
    assert _blocks(nn.Sequential(first, second)) == []


def test_a_module_of_which_more_than_the_result_is_used_is_no_block() -> None:
    def remembering(m: Any, x: Tensor) -> Tensor:
        m.seen = m.f(x)
        return x + m.seen

    class Nosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Around(remembering)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.inner.seen

    assert _blocks(Nosy()) == []


def test_a_module_without_parameters_is_no_block() -> None:
    assert _blocks(nn.Sequential(Bare(), nn.Conv2d(8, 8, 1))) == []


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.sin()

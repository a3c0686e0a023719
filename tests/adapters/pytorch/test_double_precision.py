"""In float64, rounding is no difference, whatever types the code names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.adapters.pytorch.comparison import compare, state_of
from prunus.adapters.pytorch.double_precision import DoublePrecision
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import trace_model


class Insistent(nn.Module):
    """Computes in float32 by name, and cancels almost everything that it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        offset = torch.full((1,), 3e6, dtype=torch.float32)
        y = self.second(self.first(x).float().to(torch.float32)) + offset
        return (y - offset).type_as(x) * torch.ones(5, dtype=torch.float32)


def test_code_that_names_float32_runs_in_float64() -> None:
    model, x = Insistent().eval(), torch.randn(3, 6)
    exact = F.linear(
        F.linear(x.double(), model.first.weight.double(), model.first.bias.double()),
        model.second.weight.double(),
        model.second.bias.double(),
    )
    rounded = model(x)
    with torch.no_grad(), DoublePrecision():
        result = model.double()(x.double())
    assert result.dtype == torch.float64
    assert float((result - exact).detach().abs().max()) < 1e-8
    assert float((rounded - exact).detach().abs().max()) > 1e-3


def test_a_right_removal_from_a_model_that_rounds_coarsely_is_exact() -> None:
    torch.manual_seed(0)
    model, x = Insistent().eval(), torch.randn(3, 6)
    trace = trace_model(model, x)
    (name,) = trace.graph.prunable
    keep, pruned = {name: list(range(0, 64, 3))}, structural_copy(model)
    remove(pruned, trace.graph, keep, [])
    assert compare(pruned, trace, state_of(model), keep, (x,), bare=model).max_error < 1e-8

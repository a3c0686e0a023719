"""What a method asks of the steps of a loop that is not its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.loop_hooks import LoopHooks


def moved(*, fused: bool, scale: float | None, clip: float | None, passes: int = 1) -> float:
    """How far one step of SGD with a rate of 1 moves the weights of a linear layer."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    hooks = LoopHooks(model, optimizer, clip=clip)
    for _ in range(passes):
        loss: Tensor = model(torch.ones(2, 8)).square().sum()
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    hooks.close()
    steps = [(a.detach() - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]
    return float(torch.cat(steps).norm())


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_one_update_are_no_longer_than_the_method_wants(fused: bool, scale: float | None) -> None:
    whole = moved(fused=fused, scale=scale, clip=None)
    assert whole > 1
    assert moved(fused=fused, scale=scale, clip=0.25) == pytest.approx(0.25, rel=1e-4)
    assert moved(fused=fused, scale=scale, clip=0.25, passes=3) == pytest.approx(0.25, rel=1e-4)
    assert moved(fused=fused, scale=scale, clip=2 * whole) == pytest.approx(whole, rel=1e-5)


def test_nothing_is_limited_after_the_last_step() -> None:
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    LoopHooks(model, optimizer, clip=0.25).close()
    model(torch.ones(2, 8)).square().sum().backward()
    length = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    after = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(length, after) and length > 0.25

"""After a removal an optimizer must behave as if the small model had been trained all along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.optimizer_state import carry_state
from prunus.adapters.pytorch.surgery import Changes, reindex
from prunus.core.errors import ConfigError

KEPT = np.array([0, 2, 3])
INDICES = {("0.weight", 0): KEPT, ("0.bias", 0): KEPT, ("2.weight", 1): KEPT}
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def _step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def _cut_by_hand(net: nn.Sequential) -> dict[str, Tensor]:
    kept = torch.from_numpy(KEPT)
    state = net.state_dict()
    return {
        "0.weight": state["0.weight"][kept],
        "0.bias": state["0.bias"][kept],
        "2.weight": state["2.weight"][:, kept],
        "2.bias": state["2.bias"],
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_after_removal_equals_the_masked_models_step(name: str) -> None:
    net = _net()
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(3):
        _step(net, optimizer, seed)
    with torch.no_grad():  # gate the units where they are read: their gradient elsewhere is untouched
        net[2].weight[:, [1, 4, 5]] = 0
    masked, masked_optimizer = copy.deepcopy((net, optimizer))
    carry_state(optimizer, reindex(net, INDICES))
    _step(net, optimizer, 9)
    _step(masked, masked_optimizer, 9)
    for key, expected in _cut_by_hand(masked).items():
        torch.testing.assert_close(net.state_dict()[key], expected)


def test_rows_and_columns_of_a_square_matrix_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(6, 6))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rows, columns = torch.arange(6.0), torch.arange(6.0) * 10
    optimizer.state[net[0].weight] = {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
    carry_state(optimizer, reindex(net, {("0.weight", 1): KEPT}))
    state = optimizer.state[net[0].weight]
    assert torch.equal(state["exp_avg_sq_row"], rows)
    assert torch.equal(state["exp_avg_sq_col"], columns[torch.from_numpy(KEPT)])


def test_settings_of_parameter_groups_stay() -> None:
    net = _net()
    optimizer = torch.optim.SGD(
        [
            {"params": [net[0].weight, net[2].weight], "weight_decay": 0.5},
            {"params": [net[0].bias], "lr": 3.0},
        ],
        lr=0.1,
    )
    carry_state(optimizer, reindex(net, INDICES))
    first, second = optimizer.param_groups
    assert first["params"][0] is net[0].weight and first["params"][1] is net[2].weight
    assert first["weight_decay"] == 0.5 and second["lr"] == 3.0 and second["params"][0] is net[0].bias


def test_a_schedulers_hold_on_its_optimizer_survives() -> None:
    net = _net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    _step(net, optimizer, 0)
    carry_state(optimizer, reindex(net, INDICES))
    scheduler.step()
    before = net[0].weight.detach().clone()
    _step(net, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert not torch.equal(before, net[0].weight)


def test_state_dicts_of_the_carried_optimizer_load_into_a_new_one() -> None:
    net = _net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    _step(net, optimizer, 0)
    carry_state(optimizer, reindex(net, INDICES))
    twin = copy.deepcopy(net)
    restored = OPTIMIZERS["adamw"](twin.parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _step(net, optimizer, 1)
    _step(twin, restored, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_growth_copies_the_state_of_the_copied_unit() -> None:
    net = _net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    _step(net, optimizer, 0)
    before = optimizer.state[net[0].weight]["exp_avg"].clone()
    source = np.array([0, 1, 2, 3, 4, 5, 3, 5])
    carry_state(optimizer, reindex(net, dict.fromkeys(INDICES, source)))
    torch.testing.assert_close(optimizer.state[net[0].weight]["exp_avg"], before[torch.from_numpy(source)])
    _step(net, optimizer, 1)


def test_factored_second_moments_follow() -> None:
    net = _net()
    optimizer = torch.optim.Adafactor(net.parameters(), lr=1e-2)
    _step(net, optimizer, 0)
    row = optimizer.state[net[2].weight]["col_var"].clone()
    carry_state(optimizer, reindex(net, INDICES))
    assert torch.equal(optimizer.state[net[2].weight]["col_var"], row[..., torch.from_numpy(KEPT)])
    _step(net, optimizer, 1)


def test_state_that_cannot_follow_is_refused_by_name() -> None:
    net = _net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = net(torch.ones(2, 4)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with pytest.raises(ConfigError, match="LBFGS"):
        carry_state(optimizer, reindex(net, INDICES))


def test_state_in_a_list_is_refused_by_name_before_anything_is_changed() -> None:
    net = _net()
    weight = net[0].weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[weight]["factors"] = [torch.zeros(6, 6), torch.zeros(4, 4)]
    with pytest.raises(ConfigError, match=r"SGD keeps 'factors' of 0\.weight in a list, which cannot follow"):
        carry_state(optimizer, reindex(net, INDICES))
    assert optimizer.param_groups[0]["params"][0] is weight


def test_without_changes_nothing_happens() -> None:
    net = _net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    _step(net, optimizer, 0)
    held = list(optimizer.param_groups[0]["params"])
    carry_state(optimizer, Changes())
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"], strict=True))

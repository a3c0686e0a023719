"""Optimizers that a loop of the user's brings along: wrapped, with names, or of a kind that cannot follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from prunus.adapters.pytorch import begin
from prunus.adapters.pytorch.loop import LoopRun
from prunus.adapters.pytorch.optimizer_state import adopt, carry_state, check_state, drop_state, nested
from prunus.adapters.pytorch.optimizer_trial import refuse_stuck
from prunus.adapters.pytorch.shrinking_model import ShrinkingModel
from prunus.adapters.pytorch.surgery import reindex
from prunus.core.errors import ConfigError

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 2
DATA = TensorDataset(IMAGES, LABELS)
KEPT = np.array([0, 2, 3])
INDICES = {("0.weight", 0): KEPT, ("0.bias", 0): KEPT, ("2.weight", 1): KEPT}
Make = Callable[[Any], torch.optim.Optimizer]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def _model(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


def _step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def _begin(model: nn.Module, optimizer: torch.optim.Optimizer, **given: Any) -> LoopRun:
    chosen: dict[str, Any] = {"plugin": "one-shot", "target": "macs=60%", "epochs": 1, "steps_per_epoch": 4}
    chosen |= {"batch_size": 12, "importance": "magnitude"}
    return begin(model, IMAGES[:2], optimizer=optimizer, train_data=DATA, **{**chosen, **given})


def _train(run: LoopRun, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    while not run.done:
        optimizer.zero_grad()
        logits = model(IMAGES[:12])
        loss = run.distil(functional.cross_entropy(logits, LABELS[:12]), logits, IMAGES[:12], LABELS[:12])
        loss.backward()
        optimizer.step()
        run.step(loss)


@pytest.mark.parametrize("inner", ["lookahead_sgd", "lookahead_adamw"])
def test_what_a_wrapped_optimizer_remembers_follows(inner: str) -> None:
    net = _net()
    wrapper: Any = create_optimizer_v2(net, inner, lr=0.1, momentum=0.9)
    key = "momentum_buffer" if inner.endswith("sgd") else "exp_avg"
    for _ in range(6):
        _step(net, wrapper)
    base = wrapper._base_optimizer
    assert nested(wrapper) == [wrapper, base]
    before = {name: base.state[parameter][key].clone() for name, parameter in net.named_parameters()}
    carry_state(wrapper, reindex(net, INDICES))
    assert {id(p) for p in base.state} == {id(p) for p in net.parameters()}
    assert torch.equal(base.state[net[0].weight][key], before["0.weight"][torch.from_numpy(KEPT)])
    assert base.state[net[2].weight]["lookahead_slow_buff"].shape == (3, 3)
    twin = _net()
    reindex(twin, INDICES)
    create_optimizer_v2(twin, inner, lr=0.1, momentum=0.9).load_state_dict(copy.deepcopy(wrapper.state_dict()))
    for _ in range(6):
        _step(net, wrapper)


def test_gates_come_off_before_the_update_of_a_wrapped_optimizer() -> None:
    model = _model()
    optimizer = create_optimizer_v2(model, "lookahead_sgd", lr=1e-3)
    config = {"rounds": 1, "sensitivity": "no"}
    run = _begin(model, optimizer, plugin="gsm-anneal", importance=None, config=config, dense_epochs=1)
    _train(run, model, optimizer)
    assert run.finish().report.target_met
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


class Copying(torch.optim.Optimizer):
    """Wraps another beside groups of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = [inner]
        super().__init__([dict(group, params=list(group["params"])) for group in inner.param_groups], {})


def test_names_of_parameters_stay_beside_their_parameters() -> None:
    net = _net()
    optimizer = Copying(torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9))
    new, name = nn.Parameter(torch.zeros(3, 3)), "2.other.weight"
    adopt(optimizer, [(new, net[2].weight)], {id(new): name})
    drop_state(optimizer, [net[0].weight, net[2].weight])
    for one in (optimizer, *optimizer.inner):
        (group,) = one.param_groups
        assert [id(p) for p in group["params"]] == [id(net[0].bias), id(net[2].bias), id(new)]
    assert optimizer.inner[0].param_groups[0]["param_names"] == ["0.bias", "2.bias", name]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def test_a_loops_named_optimizer_loses_the_names_of_blocks_that_are_gone() -> None:
    torch.manual_seed(0)
    tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(Residual(8) for _ in range(3)), *tail)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
    config = {"depth": True, "rounds": 1}
    run = _begin(model, optimizer, plugin="iterative", config=config, target="macs=45%", dense_epochs=1)
    _train(run, model, optimizer)
    assert run.finish().plan.removed_blocks
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], map(id, group["params"]), strict=True)) == {
        name: id(parameter) for name, parameter in model.named_parameters()
    }


STUCK: dict[str, Make] = {
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters()),
    "Adafactor": lambda model: create_optimizer_v2(model, "adafactor", lr=1e-3),
    "AdafactorBigVision": lambda model: create_optimizer_v2(model, "lookahead_adafactorbv", lr=1e-3),
}


@pytest.mark.parametrize("name", STUCK)
def test_an_optimizer_that_cannot_follow_is_refused_before_the_loop(name: str) -> None:
    model = _model(40)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = STUCK[name](model)
    with pytest.raises(ConfigError, match=f"^{name} cannot be used here: its trial with a removal failed"):
        _begin(model, optimizer, dense_epochs=1)
    assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Peculiar(torch.optim.SGD):
    """Cannot be tried: its steps are of use inside its own world alone."""

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("call switch_on() first")


def test_optimizers_that_can_follow_pass_and_keep_their_schedule_hooks_and_random_numbers() -> None:
    model = _model(40)
    for make in (
        lambda: torch.optim.AdamW(model.named_parameters(), lr=1e-3, fused=True),
        lambda: torch.optim.Adafactor(model.parameters(), lr=1e-3),
        lambda: torch.optim.Adagrad(model.parameters(), lr=1e-3),
        lambda: create_optimizer_v2(model, "lamb", lr=1e-3, weight_decay=0.1),
        lambda: create_optimizer_v2(model, "muon", lr=1e-3),
        lambda: Peculiar(model.parameters(), lr=1e-3),
    ):
        optimizer, calls = make(), []
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.register_step_pre_hook(lambda *given, calls=calls: calls.append(1))
        before, state = [p.clone() for p in model.parameters()], len(optimizer.state)
        torch.manual_seed(3)
        refuse_stuck(optimizer)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
        assert not calls and len(optimizer.state) == state and scheduler.last_epoch == 0
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())


def test_state_that_cannot_follow_is_found_before_the_model_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[6].bias]["odd"] = [torch.zeros(3)]  # of a parameter that stays whole: no matter
    check_state(optimizer, {"0.weight": model[0].weight})
    optimizer.state[model[0].weight]["odd"] = torch.zeros(7)
    run = _begin(model, optimizer, dense_epochs=1)
    monkeypatch.setattr(ShrinkingModel, "cut", lambda *given: pytest.fail("the model was cut"))
    with pytest.raises(ConfigError, match=r"SGD keeps 'odd' of 0\.weight in shape \(7,\)"):
        _train(run, model, optimizer)
    assert model[0].weight.shape[0] == 8


class Marked(nn.Parameter):
    """A class that some optimizers look for."""


def test_hooks_and_classes_of_parameters_follow_a_removal() -> None:
    net = _net()
    net[0].weight = Marked(net[0].weight.detach())
    called: list[str] = []
    handle = net[0].weight.register_hook(lambda gradient: (called.append("gradient"), 0 * gradient)[1])
    net[0].weight.register_post_accumulate_grad_hook(lambda parameter: called.append(str(tuple(parameter.shape))))
    reindex(net, INDICES)
    assert type(net[0].weight) is Marked and type(net[2].weight) is nn.Parameter
    net(torch.ones(2, 4)).sum().backward()
    assert called == ["gradient", "(3, 4)"] and not net[0].weight.grad.any()
    handle.remove()
    net.zero_grad()
    net(torch.ones(2, 4)).sum().backward()
    assert called[2:] == ["(3, 4)"]

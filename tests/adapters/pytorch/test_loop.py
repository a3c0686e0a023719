"""A loop of the user's own: the run does everything but the steps, and everything the loop holds follows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from prunus.adapters.pytorch import begin, load, prune
from prunus.adapters.pytorch.branching import branched_convs
from prunus.adapters.pytorch.loop import LoopRun
from prunus.adapters.pytorch.schedule import epoch_seed
from prunus.adapters.pytorch.user_data import bundle_of
from prunus.core.errors import ConfigError, PrunusError, TrainingError

DIGITS = load_digits()


def images() -> TensorDataset:
    pixels = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16 - 0.3
    return TensorDataset(pixels, torch.tensor(DIGITS.target, dtype=torch.int64))


def part(first: int, count: int) -> Subset[Any]:
    return Subset(images(), range(first, first + count))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.one(x), 2)
        x = x + self.two(x)
        return self.head(self.three(x).mean((2, 3)))


LOADER = DataLoader(part(0, 640), batch_size=64, shuffle=True, drop_last=True)
QUICK: dict[str, dict[str, Any]] = {
    "one-shot": {},
    "iterative": {"rounds": 2},
    "gsm-anneal": {"rounds": 2},
    "bayes-reparam": {"rounds": 2},
}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, y in LOADER:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def start(model: nn.Module, optimizer: torch.optim.Optimizer, **given: Any) -> LoopRun:
    chosen: dict[str, Any] = {"plugin": "one-shot", "target": "macs=50%", "epochs": 1.0, "train_data": LOADER}
    chosen |= {"holdout_data": part(640, 200), "test_data": part(900, 400)}
    return begin(model, torch.randn(2, 1, 8, 8), optimizer=optimizer, **{**chosen, **given})


def steps() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    while True:
        yield from LOADER


def go_on(run: LoopRun, model: nn.Module, optimizer: torch.optim.Optimizer, most: int = 200) -> int:
    """The plain loop; the number of steps that it took."""
    model.train()
    for taken, (x, y) in enumerate(steps()):
        if run.done:
            return taken
        assert taken < most
        optimizer.zero_grad()
        logits = model(x)
        loss = run.distil(functional.cross_entropy(logits, y), logits, x, y)
        loss.backward()
        optimizer.step()
        run.step(loss)
    raise AssertionError


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


@pytest.mark.parametrize("plugin", QUICK)
def test_a_plain_loop_prunes_to_the_target(trained: nn.Module, tmp_path: Path, plugin: str) -> None:
    model = copy.deepcopy(trained)
    optimizer = sgd(model)
    run = start(model, optimizer, plugin=plugin, config=QUICK[plugin], epochs=2.0)
    taken = go_on(run, model, optimizer)
    assert 18 <= taken <= 22  # two epochs of ten steps, in whole steps per round
    finished = run.finish()
    assert finished.model is model
    assert model.training
    report = finished.report
    assert report.target_met
    assert report.pruned.macs <= 0.5 * report.dense.macs
    assert report.verification.kind == "exact"
    assert report.verification.max_error <= 1e-4 * report.verification.scale
    assert report.pruned.accuracy is not None
    assert report.pruned.accuracy > 0.5
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == mine
    for parameter, state in optimizer.state.items():
        assert id(parameter) in mine
        assert state["momentum_buffer"].shape == parameter.shape
    folder = run.save(tmp_path / "run")
    again = load(folder, original=Small())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), model.eval()(x))


def test_joint_search_works_from_scratch_and_trains_inside_the_network_by_itself(trained: nn.Module) -> None:
    model = Small()
    optimizer = sgd(model)
    small = {"rounds": 1, "evaluations": 0, "images": 128, "reward_images": 64}
    run = start(model, optimizer, plugin="joint-search", config=small, epochs=3.0, target="macs=60%")
    go_on(run, model, optimizer)
    assert run.finish().report.target_met
    assert run.finish().report.dense.accuracy is None  # there was no dense model


def nesterov(model: nn.Module) -> torch.optim.SGD:
    """As the run's own trainer makes it."""
    weights = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-4}
    vectors = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.SGD([weights, vectors], lr=0.05, momentum=0.9, nesterov=True)


def test_the_same_training_gives_the_same_plan_and_weights_as_a_run_that_owns_its_loop(
    trained: nn.Module, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"config": {"rounds": 2}, "target": "macs=50%", "epochs": 2.0, "train_data": LOADER}
    chosen |= {"lr": 0.05, "weight_decay": 1e-4}
    example = torch.randn(2, 1, 8, 8)
    owned = prune(trained, example, output=tmp_path / "run", test_data=part(900, 50), **chosen)

    model = copy.deepcopy(trained)
    optimizer = nesterov(model)
    batches = bundle_of(LOADER, None).train
    run = begin(model, example, optimizer=optimizer, steps_per_epoch=batches.steps, **chosen)
    model.train()
    while (piece := run.wants) is not None:
        changes = run._adapter._state_changes  # what order and augmentation are seeded with
        epoch = 0
        while run.wants is piece:
            for x, y in batches.epoch(epoch_seed(0, changes, epoch)):
                for group in optimizer.param_groups:
                    group["lr"] = run.lr
                optimizer.zero_grad()
                logits = model(x)
                loss = run.distil(functional.cross_entropy(logits, y), logits, x, y)
                loss.backward()
                optimizer.step()
                run.step(loss)
                if run.wants is not piece:
                    break
            epoch += 1
    assert run.finish().plan == owned.plan
    theirs = owned.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def test_average_scheduler_and_scaler_go_on_through_removals(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    undisturbed = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=0.01), T_max=40
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    ema = ModelEmaV3(model, decay=0.9)
    run = start(model, optimizer, plugin="gsm-anneal", config={"rounds": 2}, epochs=2.0, ema=ema)
    model.train()
    taken = 0
    for x, y in steps():
        if run.done:
            break
        optimizer.zero_grad()
        logits = model(x)
        loss = run.distil(functional.cross_entropy(logits, y), logits, x, y)
        overflow = torch.inf if taken == 1 else 1.0  # this step is left out by the scaler
        (scaler.scale(loss) * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update(model)
        scheduler.step()
        undisturbed.optimizer.step()
        undisturbed.step()
        run.step(loss)
        taken += 1
        shapes = [[v.shape for v in module.state_dict().values()] for module in (ema.module, model)]
        assert shapes[0] == shapes[1]
    assert optimizer.param_groups[0]["lr"] == undisturbed.optimizer.param_groups[0]["lr"]
    assert scaler.get_scale() == 2.0**7
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert int(state["step"]) == taken - 1
    x, y = next(iter(DataLoader(part(900, 400), batch_size=400)))
    assert (ema.module(x).argmax(1) == y).float().mean() > 0.5


def test_branches_come_and_go_with_optimizer_and_average(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer, ema = sgd(model), ModelEmaV3(model, decay=0.9)
    config = {"expansion": "branches", "round_share": 0.8, "distil": "never", "sensitivity": "yes"}
    run = start(model, optimizer, plugin="gsm-anneal", config=config, epochs=4.0, ema=ema)
    model.train()
    ran_as_branches = 0
    for x, y in steps():
        if run.done:
            break
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        ema.update(model)
        ran_as_branches += bool(branched_convs(model))
        run.step(0.5)
        mine = {id(p) for p in model.parameters() if p.requires_grad}  # an identity stays one
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == mine
        shapes = [{name: v.shape for name, v in module.state_dict().items()} for module in (ema.module, model)]
        assert shapes[0] == shapes[1]
    assert ran_as_branches > 5
    assert not branched_convs(model)
    report = run.finish().report
    assert report.target_met
    assert report.verification.max_error <= 1e-4 * report.verification.scale


def test_accumulated_gradients_are_those_of_one_large_batch(trained: nn.Module) -> None:
    ends = []
    for pieces in (1, 2):
        model = copy.deepcopy(trained)
        optimizer = sgd(model)
        run = start(model, optimizer, plugin="gsm-anneal", config={"rounds": 2, "round_share": 0.8}, epochs=2.0)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # statistics of a batch are no sum over its halves
        x, y = next(iter(DataLoader(part(0, 64), batch_size=64)))
        optimizer.zero_grad()
        for small_x, small_y in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (functional.cross_entropy(model(small_x), small_y) / pieces).backward()
        optimizer.step()
        run.step(0.1)
        assert run.wants is not None
        assert run.wants.gates is not None
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert not torch.equal(ends[0], torch.cat([p.detach().flatten() for p in trained.parameters()]))


def test_an_optimizer_that_calls_a_closure_is_served_as_well(trained: nn.Module) -> None:
    ends = []
    for by_closure in (False, True):
        model = copy.deepcopy(trained)
        optimizer = sgd(model)
        run = start(model, optimizer, plugin="gsm-anneal", config={"rounds": 2}, epochs=2.0)
        model.train()
        for x, y in list(DataLoader(part(0, 128), batch_size=64)):

            def compute(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()  # noqa: B023 - called at once
                loss = functional.cross_entropy(model(x), y)  # noqa: B023
                loss.backward()
                return loss

            loss = compute() if not by_closure else None
            loss = optimizer.step(compute) if by_closure else (optimizer.step(), loss)[1]
            run.step(loss)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])


class Unhooked(torch.optim.SGD):
    """Updates weights behind the back of the step hooks."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad

    step.hooked = True  # type: ignore[attr-defined]


def test_mistakes_in_the_loop_are_said_at_the_first_step(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = Unhooked(model.parameters(), lr=0.1)
    run = start(model, optimizer, plugin="gsm-anneal", config={"rounds": 2}, epochs=2.0)
    x, y = next(iter(LOADER))
    with pytest.raises(ConfigError, match="no forward pass in training mode"):
        run.step(1.0)
    model.train()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="without calling its step hooks"):
        run.step(1.0)
    with pytest.raises(ConfigError, match=r"has not ended: .* at step"):
        run.finish()


def test_a_loss_that_is_not_finite_stops_the_run(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = sgd(model)
    run = start(model, optimizer, plugin="iterative", config={"rounds": 2}, epochs=1.0)
    model.train()
    functional.cross_entropy(model(next(iter(LOADER))[0]), torch.zeros(64, dtype=torch.int64)).backward()
    optimizer.step()
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        run.step(float("nan"))


def test_a_forgotten_teacher_and_a_wrong_epoch_are_warned_about(trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    optimizer = sgd(model)
    run = start(model, optimizer, epochs=0.3, config={"distil": "always"})
    model.train()
    with pytest.warns(UserWarning, match=r"distil from dense, but the loop does not call run\.distil"):
        for x, y in LOADER:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            run.step(loss)
    assert run.done
    model = copy.deepcopy(trained)
    run = start(model, sgd(model), epochs=1.0)
    with pytest.warns(UserWarning, match="the epoch had 0 steps, but begin"):
        run.epoch()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target": "latency=1ms"}, "latency targets are for prune"),
        ({"train_data": part(0, 200)}, "steps_per_epoch must be"),
        ({"ema": nn.Linear(2, 2)}, "not an average of this model"),
        ({"plugin": "gsm-aneal"}, "gsm-anneal"),
    ],
)
def test_mistakes_in_the_call_are_found_before_anything_starts(
    trained: nn.Module, given: dict[str, Any], says: str
) -> None:
    model = copy.deepcopy(trained)
    with pytest.raises(PrunusError, match=says):
        start(model, sgd(model), **given)


def test_an_optimizer_of_another_model_is_refused(trained: nn.Module) -> None:
    with pytest.raises(ConfigError, match="trains no parameter of the model"):
        start(copy.deepcopy(trained), sgd(trained))

"""Training learns, resumes to the bit, stops before NaN spreads, and obeys its hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from prunus.adapters.pytorch.averaging import WeightAverage
from prunus.adapters.pytorch.batches import Batch, DataBundle
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.datasets import LoadOptions, load_data, open_data
from prunus.adapters.pytorch.distillation import Teacher
from prunus.adapters.pytorch.evaluation import evaluate
from prunus.adapters.pytorch.inputs import ImageFacts
from prunus.adapters.pytorch.optimizers import TrainingSettings, channels_last
from prunus.adapters.pytorch.progress import Progress
from prunus.adapters.pytorch.schedule import EpochsDone
from prunus.adapters.pytorch.training import Job, Trainer
from prunus.adapters.pytorch.unit_decay import UnitDecay
from prunus.core.directives import Distillation, Train
from prunus.core.errors import ConfigError, PlanError, TrainingError
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice

SETTINGS = TrainingSettings(lr=0.1)


@pytest.fixture(scope="module")
def data() -> DataBundle:
    source = open_data("digits")
    assert source is not None
    return load_data(source, student().input, LoadOptions(batch_size=64))


def student(name: str = "prunus/resnet8", seed: int = 0):  # type: ignore[no-untyped-def]
    return build(name, classes=10, in_chans=1, image=ImageFacts((8, 8), 0.3, 0.37), seed=seed)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", [SETTINGS, TrainingSettings(lr=0.005, optimizer="adamw", weight_decay=0.05)])
def test_a_small_network_learns_the_digits(data: DataBundle, settings: TrainingSettings) -> None:
    module = student().module
    optimizer = settings.make_optimizer(module)
    trained = Trainer(settings, data.train, 0).train(module, optimizer, Job(Train(epochs=6), 0, 1000.0))
    assert trained.steps == 6 * data.train.steps
    assert trained.macs == 3 * 1000 * trained.steps * 64
    assert trained.accuracy is not None
    assert trained.accuracy > 0.85
    assert evaluate(module, data.test).accuracy > 0.9


def test_a_training_resumed_at_the_end_of_an_epoch_ends_in_the_same_weights(data: DataBundle) -> None:
    whole = student("prunus/vgg11_bn_small").module  # its dropout draws random numbers, too
    optimizer = SETTINGS.make_optimizer(whole)
    directive = Train(epochs=1.4, ema=0.9)
    kept: dict[EpochsDone, tuple[nn.Module, dict[str, object], nn.Module, int]] = {}
    average = WeightAverage(copy_of := copy.deepcopy(whole), whole, 0.9)

    def keep(done: EpochsDone) -> None:
        state = copy.deepcopy(optimizer.state_dict())
        kept[done] = copy.deepcopy(whole), state, copy.deepcopy(copy_of), average.updates

    trainer = Trainer(SETTINGS, data.train, 3)
    first = trainer.train(whole, optimizer, Job(directive, 1, 1.0, average=average, on_epoch_end=keep))
    assert [done.count for done in kept] == [1]
    assert first.least is not None and first.least <= first.loss
    for done, (module, state, averaged, updates) in kept.items():
        torch.manual_seed(done.count)  # whatever the process drew before must not matter
        resumed = SETTINGS.make_optimizer(module)
        resumed.load_state_dict(state)
        job = Job(directive, 1, 1.0, average=WeightAverage(averaged, module, 0.9, updates), done=done)
        second = Trainer(SETTINGS, data.train, 3).train(module, resumed, job)
        assert equal(weights(whole), weights(module))
        assert equal(weights(copy_of), weights(averaged))
        assert first == second


def test_seed_and_directive_decide_order_and_augmentation(data: DataBundle) -> None:
    ends = []
    for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1)):
        module = student().module
        job = Job(Train(epochs=0.2), index, 1.0)
        Trainer(SETTINGS, data.train, seed).train(module, SETTINGS.make_optimizer(module), job)
        ends.append(weights(module))
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])
    assert not equal(ends[0], ends[3])


def test_training_leaves_modes_random_numbers_and_layout_alone(data: DataBundle) -> None:
    module = student().module
    module.stem.eval()
    before = torch.get_rng_state()
    Trainer(SETTINGS, data.train, 0).train(module, SETTINGS.make_optimizer(module), Job(Train(epochs=0.1), 0, 1.0))
    assert torch.equal(before, torch.get_rng_state())
    assert not module.training
    assert all(p.is_contiguous() for p in module.parameters())


def test_no_epochs_change_nothing(data: DataBundle) -> None:
    module = student().module
    before = weights(module)
    job = Job(Train(epochs=0), 0, 1.0)
    trained = Trainer(SETTINGS, data.train, 0).train(module, SETTINGS.make_optimizer(module), job)
    assert (trained.steps, trained.macs, trained.accuracy) == (0, 0.0, None)
    assert equal(before, weights(module))


class Poisoned:
    """Real batches, of which one holds a NaN."""

    def __init__(self, data: DataBundle, at: int) -> None:
        self._batches, self._at = data.train, at
        self.samples, self.steps = data.train.samples, data.train.steps

    def epoch(self, seed: int) -> Iterator[Batch]:
        for i, (images, labels) in enumerate(self._batches.epoch(seed)):
            yield (images.fill_(torch.nan) if i == self._at else images), labels


def test_nan_stops_the_training_at_its_step_and_spreads_no_further(data: DataBundle) -> None:
    module = student().module
    with pytest.raises(TrainingError, match=r"at step 4 of") as caught:
        Trainer(SETTINGS, Poisoned(data, 3), 0).train(
            module, SETTINGS.make_optimizer(module), Job(Train(epochs=1), 0, 1.0)
        )
    assert caught.value.step == 4
    assert str(caught.value).endswith("try a smaller --lr or --clip-grad 2")  # there is no --amp to be put off
    mixed = replace(SETTINGS, amp="bf16")
    module = student().module
    with pytest.raises(TrainingError, match=r"try a smaller --lr or --clip-grad 2 or --no-amp$"):
        Trainer(mixed, Poisoned(data, 0), 0).train(
            module, mixed.make_optimizer(module), Job(Train(epochs=1), 0, 1.0)
        )
    assert all(bool(torch.isfinite(value).all()) for value in module.state_dict().values())


class Choosy(nn.Module):
    """Works in evaluation only, as models do whose auxiliary classifiers need larger images."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)[:, : 63 if self.training else 64])


def test_a_model_that_fails_in_training_mode_alone_ends_in_one_clear_line(data: DataBundle) -> None:
    module = Choosy()
    with pytest.raises(TrainingError, match=r"training mode on a batch of 64x1x8x8: [^\n]+$"):
        Trainer(SETTINGS, data.train, 0).train(
            module, SETTINGS.make_optimizer(module), Job(Train(epochs=1), 0, 1.0)
        )


def test_parts_too_small_for_batch_norms_are_refused_with_what_to_do(data: DataBundle) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    settings = replace(SETTINGS, accumulate=64)
    with pytest.raises(ConfigError, match=r"more than 1 value.*; take a larger --batch-size or a smaller --acc"):
        Trainer(settings, data.train, 0).train(
            module, settings.make_optimizer(module), Job(Train(epochs=1), 0, 1.0)
        )


def test_a_learning_rate_beyond_reason_ends_in_a_training_error(data: DataBundle) -> None:
    module = student().module
    with pytest.raises(TrainingError, match="smaller --lr"):
        Trainer(SETTINGS, data.train, 0).train(
            module, SETTINGS.make_optimizer(module), Job(Train(epochs=3, lr=1e20), 0, 1.0)
        )
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_progress_tells_every_step(data: DataBundle) -> None:
    module = student().module
    told: list[Progress] = []
    job = Job(Train(epochs=1.3, lr=0.05, label="recover"), 0, 1.0, progress=told.append)
    Trainer(SETTINGS, data.train, 0).train(module, SETTINGS.make_optimizer(module), job)
    total = round(1.3 * data.train.steps)
    assert [p.step for p in told] == list(range(1, total + 1))
    assert {(p.label, p.total) for p in told} == {("recover", total)}
    assert 0.045 < max(p.lr for p in told) <= 0.05


class Halved:
    """Gates of one half on the classifier, the way gates are put on."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight, self.saved = weight, weight.detach().clone()

    def before_forward(self) -> None:
        with torch.no_grad():
            self.saved.copy_(self.weight)
            self.weight.mul_(0.5)

    def after_backward(self) -> None:
        assert self.weight.grad is not None
        with torch.no_grad():
            self.weight.copy_(self.saved)
            self.weight.grad.mul_(0.5)


def test_a_hook_is_on_during_the_step_and_off_after_it(data: DataBundle) -> None:
    gated, plain = student().module, student().module
    frozen = replace(SETTINGS, lr=0.0)
    losses: list[list[float]] = [[], []]
    for module, into, hook in ((gated, losses[0], True), (plain, losses[1], False)):
        weight = module.head.weight
        if not hook:
            with torch.no_grad():
                weight.mul_(0.5)
        job = Job(
            Train(epochs=0.2),
            0,
            1.0,
            make_hook=(lambda w=weight: Halved(w)) if hook else None,
            progress=lambda p, into=into: into.append(p.loss),
        )
        Trainer(frozen, data.train, 0).train(module, frozen.make_optimizer(module), job)
    assert losses[0] == losses[1]
    assert torch.equal(gated.head.weight * 0.5, plain.head.weight)


def test_a_nan_under_a_hook_leaves_the_ungated_weights(data: DataBundle) -> None:
    module = student().module
    before = module.head.weight.detach().clone()
    with pytest.raises(TrainingError):
        Trainer(SETTINGS, Poisoned(data, 0), 0).train(
            module,
            SETTINGS.make_optimizer(module),
            Job(Train(epochs=1), 0, 1.0, make_hook=lambda: Halved(module.head.weight)),
        )
    assert torch.equal(module.head.weight, before)


def test_a_good_teacher_helps_and_is_not_changed_itself(data: DataBundle) -> None:
    master = student(seed=1).module
    trainer = Trainer(SETTINGS, data.train, 0)
    trainer.train(master, SETTINGS.make_optimizer(master), Job(Train(epochs=6), 0, 1.0))
    before = weights(master.train())
    directive = Train(epochs=0.5, distil=Distillation(teachers=("dense",), weight=1.0))
    pupil = student().module
    job = Job(directive, 0, 10.0, teachers=[Teacher(master, "dense", 7.0)])
    trained = trainer.train(pupil, SETTINGS.make_optimizer(pupil), job)
    assert trained.macs == (3 * 10 + 7) * trained.steps * 64
    assert equal(before, weights(master))
    assert master.training
    assert evaluate(pupil, data.holdout).accuracy > 0.3  # the labels counted nothing


def test_the_average_follows_the_weights_with_warm_decay() -> None:
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(average.weight)
    nn.init.ones_(model.weight)
    mean = WeightAverage(average, model, decay=0.5)
    expected = 0.0
    for t in range(20):
        mean.update()
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + 1 - decay
    assert average.weight.item() == pytest.approx(expected)


def test_norms_and_biases_do_not_decay() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    groups = SETTINGS.make_optimizer(module).param_groups
    assert [p.shape for p in groups[0]["params"]] == [module[0].weight.shape]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]


def test_a_model_without_parameters_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="no parameter"):
        SETTINGS.make_optimizer(nn.Flatten())


@pytest.mark.parametrize(("by_user", "by_method"), [(1e-3, None), (None, 1e-3), (1e-3, 1.0), (1.0, 1e-3)])
def test_gradients_are_clipped_to_the_smaller_norm_asked_for(
    by_user: float | None, by_method: float | None, data: DataBundle
) -> None:
    settings = TrainingSettings(lr=1.0, momentum=0.0, weight_decay=0.0, clip=by_user)
    module = student().module
    before = [p.detach().clone() for p in module.parameters()]
    job = Job(Train(epochs=1e-9, schedule="constant", warmup=0.0, clip=by_method), 0, 1.0)
    Trainer(settings, data.train, 0).train(module, settings.make_optimizer(module), job)
    moved = [p.detach() - q for p, q in zip(module.parameters(), before, strict=True)]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_bfloat16_trains_about_as_well(data: DataBundle) -> None:
    settings = replace(SETTINGS, amp="bf16")
    module = student().module
    Trainer(settings, data.train, 0).train(module, settings.make_optimizer(module), Job(Train(epochs=6), 0, 1.0))
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert evaluate(module, data.test).accuracy > 0.9


def test_the_fast_layout_lasts_for_the_block() -> None:
    convolution = nn.Conv2d(4, 4, 3)
    with channels_last(convolution, True):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert convolution.weight.is_contiguous()


def one_group() -> tuple[nn.Module, ChannelGraph]:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    units = np.arange(3)
    group = ChannelGroup(
        "0.weight",
        3,
        (
            Slice("0.weight", 0, "writes", units),
            Slice("0.bias", 0, "scales", units),
            Slice("1.weight", 1, "reads", units),
        ),
    )
    return module, ChannelGraph([group], [], {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (2, 3)})


def test_each_unit_decays_at_its_own_rate_where_it_is_written_and_read() -> None:
    module, graph = one_group()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    rates = np.array([0.0, 1.0, 2.0])
    UnitDecay(module, graph, {"0.weight": rates})(lr=0.1)
    left = torch.tensor(1 - 0.1 * rates, dtype=torch.float32)
    torch.testing.assert_close(module[0].weight, before["0.weight"] * left[:, None])
    torch.testing.assert_close(module[1].weight, before["1.weight"] * left)
    assert torch.equal(module[0].bias, before["0.bias"])


def test_rates_that_fit_no_group_are_refused() -> None:
    module, graph = one_group()
    for rates in ({"2.weight": np.ones(3)}, {"0.weight": np.ones(2)}, {"0.weight": np.array([0, -1.0, 0])}):
        with pytest.raises(PlanError):
            UnitDecay(module, graph, rates)

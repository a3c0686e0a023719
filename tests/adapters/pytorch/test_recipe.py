"""timm's training recipe: what it changes, and that nothing else is changed by it."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from prunus.adapters.pytorch import prune
from prunus.adapters.pytorch.array_images import ArrayImages, ArrayTrainBatches
from prunus.adapters.pytorch.augmentation import Augmentation
from prunus.adapters.pytorch.batches import share_positions
from prunus.adapters.pytorch.datasets import LoadOptions, load_data, open_data
from prunus.adapters.pytorch.defaults import filled
from prunus.adapters.pytorch.distillation import classification_loss, distillation_loss, teacher_weights
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.mixing import Mixing
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.random_state import seeded
from prunus.adapters.pytorch.schedule import EpochsDone, Schedule, learning_rate
from prunus.adapters.pytorch.training import Job, Trainer
from prunus.core.directives import Distillation, Train
from prunus.core.errors import ConfigError
from prunus.core.settings import make_settings

GREY = InputSpec((1, 8, 8), (0.0,), (1.0,))
MIXINGS = [Mixing(0.2, 0.0, 0.0, 5), Mixing(0.0, 1.0, 0.1, 5), Mixing(0.8, 1.0, 0.1, 5)]


def batch(size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 6, 6, generator=generator), torch.randint(0, 5, (size,), generator=generator)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_batches_are_mixed_as_timm_mixes_them(mixing: Mixing) -> None:
    images, labels = mixing.apply(batch(), seed=11)
    with seeded(11):
        theirs = Mixup(mixing.mixup, mixing.cutmix, label_smoothing=mixing.smoothing, num_classes=5)(*batch())
    assert torch.equal(images, theirs[0]) and torch.equal(labels, theirs[1])
    assert torch.allclose(labels.sum(1), torch.ones(8))
    again = mixing.apply(batch(), seed=12)
    assert not torch.equal(images, again[0])


def test_nothing_is_mixed_unless_it_is_asked_for() -> None:
    given = batch()
    assert Mixing(classes=5).apply(given, 0) is given


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_a_batch_are_mixed_like_the_whole(mixing: Mixing, processes: int) -> None:
    whole = mixing.apply(batch(16), seed=3)
    for rank in range(processes):
        at = torch.from_numpy(share_positions(16, rank, processes))
        images, labels = batch(16)
        part = mixing.apply((images[at], labels[at]), seed=3)
        assert torch.equal(part[0], whole[0][at]) and torch.equal(part[1], whole[1][at])


@pytest.mark.parametrize(("size", "processes"), [(16, 1), (16, 2), (16, 4), (12, 4), (6, 3), (9, 3)])
def test_shares_of_a_batch_are_equal_and_disjoint(size: int, processes: int) -> None:
    shares = [share_positions(size, rank, processes).tolist() for rank in range(processes)]
    assert {len(share) for share in shares} == {size // processes}
    assert sorted(at for share in shares for at in share) == list(range(size))


def test_a_batch_that_does_not_fall_into_pairs_is_refused_by_name() -> None:
    Mixing(smoothing=0.1).check(7, 1)
    for processes, size in ((1, 7), (2, 6)):
        with pytest.raises(ConfigError, match=rf"multiple of {2 * processes} .* got {size}"):
            Mixing(mixup=0.2).check(size, processes)


def test_smoothed_and_mixed_labels_cost_what_they_cost_in_timm() -> None:
    images, labels = batch()
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    smooth = Mixing(smoothing=0.1, classes=5).apply((images, labels), 0)[1]
    assert torch.allclose(classification_loss(logits, smooth), LabelSmoothingCrossEntropy(0.1)(logits, labels))
    mixed = MIXINGS[2].apply((images, labels), 0)[1]
    assert torch.allclose(classification_loss(logits, mixed), SoftTargetCrossEntropy()(logits, mixed))


def test_teachers_are_weighed_by_soft_labels_as_by_hard_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, student = torch.randn(3, 8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    _, labels = batch()
    hard, soft = (
        teacher_weights(logits, labels, True),
        teacher_weights(logits, functional.one_hot(labels).float(), True),
    )
    assert torch.allclose(hard, soft, atol=1e-6)
    wanted = Distillation(teachers=("a", "b", "c"), per_sample=True)
    assert torch.isfinite(distillation_loss(student, logits, MIXINGS[2].apply(batch(), 0)[1], wanted))


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "step"])
def test_the_rate_moves_as_timms_scheduler_moves_it(name: str) -> None:
    directive, total, epoch = Train(5.0, warmup=0.1), 100, 20
    rates = Schedule(name, decay_epochs=2, decay_rate=0.5).rates(directive, 0.4, total, epoch)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    scheduler, _ = create_scheduler_v2(
        optimizer, name, num_epochs=90, decay_epochs=40, decay_rate=0.5, warmup_epochs=10, warmup_lr=1e-5,
        warmup_prefix=True, step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    assert scheduler is not None
    for step in range(total):
        scheduler.step_update(step)
        assert rates(step) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert rates(10) == pytest.approx(0.4)
    assert rates(99) < 0.4


def test_a_scheduler_of_timm_goes_on_over_pieces_of_a_cycle_and_leaves_constant_rates_alone() -> None:
    whole = Schedule("cosine").rates(Train(4.0), 0.1, 80, 20)
    second = Schedule("cosine").rates(Train(2.0, start=0.5, stop=1.0), 0.1, 40, 20)
    assert [second(step) for step in range(40)] == pytest.approx([whole(step) for step in range(40, 80)])
    constant = Train(1.0, schedule="constant")
    assert Schedule("step").rates(constant, 0.1, 20, 20)(19) == 0.1
    plain = Train(1.0)
    assert Schedule().rates(plain, 0.1, 20, 20)(7) == learning_rate(plain, 0.1, 7, 20)


FOLLOWING = ("momentum", "lamb", "nadamw", "lion", "lars", "adan", "madgrad", "rmsproptf", "muon")


@pytest.mark.parametrize("name", FOLLOWING)
def test_optimizers_of_timm_whose_state_follows_removals_are_taken(name: str) -> None:
    before = torch.get_rng_state()
    TrainingSettings(optimizer=name).check_optimizer()
    assert torch.equal(torch.get_rng_state(), before)


# no gradient of a gradient; state whose form depends on the sizes at each step
@pytest.mark.parametrize("name", ["adahessian", "adafactor", "adafactorbv"])
def test_optimizers_whose_state_cannot_follow_removals_are_refused_at_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--opt {name} cannot be used here: .* take sgd, "):
        TrainingSettings(optimizer=name).check_optimizer()


def test_an_unknown_optimizer_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no optimizer 'lambb'; did you mean .*lamb"):
        TrainingSettings(optimizer="lambb").check_optimizer()


def test_a_policy_that_timm_does_not_know_is_refused() -> None:
    for policy in ("rand-x9", "nothing"):
        with pytest.raises(ConfigError, match="no augmentation policy of timm"):
            Augmentation(policy).transform(GREY)


@pytest.mark.parametrize("spec", [GREY, InputSpec((3, 8, 8), (0.5,) * 3, (0.25,) * 3)])
def test_policies_and_erasing_come_after_shifts_and_depend_on_the_seed_alone(spec: InputSpec) -> None:
    rng = np.random.default_rng(0)
    images = ArrayImages(
        torch.from_numpy(rng.integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)), torch.arange(64) % 5
    )
    plain = ArrayTrainBatches(images, spec, 16, False, 1)
    none = ArrayTrainBatches(images, spec, 16, False, 1, Augmentation())
    erased = ArrayTrainBatches(images, spec, 16, False, 1, Augmentation(reprob=1.0))
    policy = ArrayTrainBatches(images, spec, 16, False, 1, Augmentation("rand-m9-n2-inc1", 0.25))
    first = [next(iter(batches.epoch(4))) for batches in (plain, none, erased, policy)]
    assert all(torch.equal(labels, first[0][1]) for _, labels in first)
    assert torch.equal(first[0][0], first[1][0])
    same = (first[2][0] - first[0][0]).abs() < 1e-6  # what is not erased is as it was
    assert 0.3 < float(same.float().mean()) < 1
    assert all(image.shape == spec.size for image in first[3][0])
    assert torch.equal(next(iter(policy.epoch(4)))[0], first[3][0])
    share = next(iter(policy.share(1, 2).epoch(4)))
    assert torch.equal(share[0], first[3][0][torch.from_numpy(share_positions(16, 1, 2))])


def test_a_training_with_the_whole_recipe_continues_from_an_epoch_as_if_never_stopped() -> None:
    source = open_data("digits")
    assert source is not None
    data = load_data(source, GREY, LoadOptions(64, train_limit=320, augmentation=Augmentation("rand-m5-n1", 0.2)))
    settings = TrainingSettings(
        lr=1e-2,
        optimizer="lamb",
        channels_last=False,
        mixing=Mixing(0.2, 1.0, 0.1, 10),
        schedule=Schedule("cosine"),
    )
    torch.manual_seed(0)
    start = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    saved: list[tuple[nn.Module, dict[str, object]]] = []
    model, directive = copy.deepcopy(start), Train(3.0)
    optimizer = settings.make_optimizer(model)

    def keep(done: EpochsDone) -> None:
        if done.count == 1:
            saved.append((copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())))

    job = Job(directive, 0, 1e3, on_epoch_end=keep)
    trained = Trainer(settings, data.train, 0).train(model, optimizer, job)
    assert trained.accuracy is not None and np.isfinite(trained.loss)
    resumed, state = saved[0]
    again = settings.make_optimizer(resumed)
    again.load_state_dict(state)
    Trainer(settings, data.train, 0).train(resumed, again, Job(directive, 0, 1e3, done=EpochsDone(1)))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_a_data_set_of_the_users_own_decides_is_refused_as_a_setting() -> None:
    data = TensorDataset(torch.randn(32, 3, 16, 16), torch.arange(32) % 4)
    model = timm.create_model("test_resnet", num_classes=4)
    with pytest.raises(ConfigError, match=r"aa is for data that has a name, got 'rand-m9'; .* create_transform"):
        prune(model, torch.randn(2, 3, 16, 16), train_data=data, aa="rand-m9")
    for key, value in {"reprob": 0.5, "steps_per_epoch": 3, "train_limit": 20, "num_classes": 4}.items():
        with pytest.raises(ConfigError, match=f"{key} is for data that has a name, got {value}"):
            prune(model, torch.randn(2, 3, 16, 16), train_data=data, **{key: value})


def test_mixed_labels_suit_a_model_with_more_answers_than_the_data_has_classes(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(48, 3, 16, 16), torch.arange(48) % 4)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6)
    )
    pruned = prune(
        model, torch.randn(2, 3, 16, 16), train_data=data, plugin="one-shot", target="macs=80%", epochs=1,
        batch_size=8, lr=0.01, mixup=0.2, cutmix=1.0, smoothing=0.1, opt="nadamw", output=tmp_path / "run",
    )  # fmt: skip
    assert pruned.model(torch.randn(1, 3, 16, 16)).shape == (1, 6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.15, 0.05)),  # fashion-mnist's own, and a third of it
        ({"lr": 0.02}, (0.02, 0.02)),  # the user's word holds for everything
        ({"recovery_base_lr": 0.01}, (0.15, 0.01)),
        ({"opt": "adamw"}, (1e-3, 1e-3 / 3)),
    ],
)
def test_a_pruned_model_is_trained_more_gently_than_one_from_scratch(
    given: dict[str, Any], expected: tuple[float, float]
) -> None:
    settings = filled(make_settings({"data": "fashion-mnist", **given}))
    assert (settings.lr, settings.recovery_base_lr) == pytest.approx(expected)
    assert settings.recovery_lr is None  # found for every recovery from what was lost
    assert filled(settings) == settings  # so that a run begun again from its run.toml is the same


@pytest.mark.parametrize("data", ["none", "digits", "fashion-mnist", "images:photos", "torch/cifar10", "folder"])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_resumed_run_reads_back_the_very_defaults_that_it_began_with(data: str, opt: str) -> None:
    settings = filled(make_settings({"data": data, "opt": opt}))
    again = make_settings(tomllib.loads(settings.to_toml()))
    assert repr(again) == repr(settings)  # == alone takes 20 epochs for 20.0, and a digest of directives does not

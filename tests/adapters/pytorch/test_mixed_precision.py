"""Mixed precision: what is computed in short numbers, and what stays in float32."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.datasets import LoadOptions, load_data, open_data
from prunus.adapters.pytorch.inputs import ImageFacts
from prunus.adapters.pytorch.mixed_precision import Amp, autocast, depthwise_in_float32
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.training import Job, Trainer
from prunus.core.directives import Train

DEPTHWISE: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(6, 6, 5, groups=6), (2, 6, 9)),
    "2d": (nn.Conv2d(6, 6, 3, 2, 1, groups=6), (2, 6, 9, 9)),
    "two outputs each": (nn.Conv2d(6, 12, 3, groups=6), (2, 6, 9, 9)),
    "one image, no batch": (nn.Conv2d(6, 6, 3, groups=6), (6, 9, 9)),
    "3d": (nn.Conv3d(6, 6, 3, groups=6), (2, 6, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 12, 3, 2, groups=6), (2, 6, 5, 5)),
}
OTHERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense": (nn.Conv2d(6, 6, 3), (2, 6, 9, 9)),
    "one channel read": (nn.Conv2d(1, 6, 3), (2, 1, 9, 9)),
    "grouped": (nn.Conv2d(6, 6, 3, groups=3), (2, 6, 9, 9)),
    "transposed, one channel written": (nn.ConvTranspose2d(6, 1, 3), (2, 6, 5, 5)),
    "linear": (nn.Linear(6, 6), (2, 6)),
}
SHORT: dict[Amp, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def answer(module: nn.Module, images: torch.Tensor, amp: Amp) -> torch.Tensor:
    with depthwise_in_float32(module), autocast("cpu", amp):
        output: torch.Tensor = module(images)
    return output


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", DEPTHWISE)
def test_depthwise_convolutions_stay_in_float32(kind: str, amp: Amp) -> None:
    module, shape = DEPTHWISE[kind]
    images = torch.randn(shape)
    output = answer(module, images, amp)
    assert output.dtype == torch.float32
    assert torch.equal(output, module(images))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_everything_else_is_computed_in_short_numbers(kind: str, amp: Amp) -> None:
    module, shape = OTHERS[kind]
    assert answer(module, torch.randn(shape), amp).dtype == SHORT[amp]


def test_what_comes_in_short_numbers_is_met_by_weights_in_float32() -> None:
    dense, depthwise = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
    images = torch.randn(2, 3, 9, 9)
    output = answer(nn.Sequential(dense, depthwise), images, "bf16")
    assert torch.equal(output, depthwise(answer(dense, images, "bf16").float()))


class Called(nn.Module):
    """Calls its convolution as few models do."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(6, 6, 3, groups=6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.convolution(input=images)
        return output


def test_a_convolution_may_be_called_by_keyword() -> None:
    module, images = Called(), torch.randn(2, 6, 9, 9)
    assert torch.equal(answer(module, images, "bf16"), module(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_length_are_met_in_theirs(dtype: torch.dtype) -> None:
    module = nn.Conv2d(6, 6, 3, groups=6).to(dtype)
    assert answer(module, torch.randn(2, 6, 9, 9), "bf16").dtype == dtype


def test_a_model_is_afterwards_what_it_was() -> None:
    module, own = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 3, groups=6)
    forward = own.forward = partial(own.forward)  # type: ignore[method-assign]
    with pytest.raises(KeyError), depthwise_in_float32(nn.Sequential(module, own, module)):
        raise KeyError
    assert "forward" not in vars(module)
    assert vars(own)["forward"] is forward


def digits(model: str, side: int) -> tuple[nn.Module, DataBundle]:
    built = build(model, classes=10, in_chans=1, image=ImageFacts((side, side), 0.3, 0.37), seed=0)
    source = open_data("digits")
    assert source is not None
    return built.module, load_data(source, built.input, LoadOptions(batch_size=256))


def train(module: nn.Module, data: DataBundle, amp: Amp) -> None:
    """One step."""
    settings, job = TrainingSettings(amp=amp), Job(Train(epochs=1e-9), 0, 1.0)
    Trainer(settings, data.train, 0).train(module, settings.make_optimizer(module), job)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_parts_that_are_computed_again_in_the_backward_pass_train_to_the_same_weights(amp: Amp) -> None:
    """Activation checkpointing refuses where the second pass computes in numbers of another length."""
    weights = []
    for again in (False, True):
        module, data = digits("timm/mobilenetv3_small_050", 32)
        module.set_grad_checkpointing(again)  # type: ignore[operator]
        train(module, data, amp)
        weights.append(list(module.parameters()))  # statistics of norms are counted twice
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


class Watched(nn.Conv2d):
    """Notes in what numbers it answers."""

    seen: list[torch.dtype]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        self.seen.append(output.dtype)
        return output


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_trainings_in_short_numbers_keep_depthwise_convolutions_out_of_them(amp: Amp) -> None:
    _, data = digits("prunus/resnet8", 8)
    depthwise, dense = Watched(6, 6, 3, groups=6), Watched(6, 6, 3)
    depthwise.seen, dense.seen = [], []
    train(nn.Sequential(nn.Conv2d(1, 6, 3), depthwise, dense, nn.Flatten(), nn.Linear(24, 10)), data, amp)
    assert set(depthwise.seen) == {torch.float32}
    assert set(dense.seen) == {SHORT[amp]}

"""torch.compile for trainings: the same steps, and stepping aside."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prunus.adapters.pytorch.catalog import build
from prunus.adapters.pytorch.compilation import Compiled
from prunus.adapters.pytorch.datasets import LoadOptions, load_data, open_data
from prunus.adapters.pytorch.inputs import ImageFacts
from prunus.adapters.pytorch.optimizers import TrainingSettings
from prunus.adapters.pytorch.training import Job, Trainer
from prunus.core.directives import Train


def small() -> nn.Module:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(6, 6, 3, groups=6)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), depthwise, nn.Flatten(), nn.Linear(96, 10))


def nobody(text: str) -> None:
    raise AssertionError(text)


def gradients(network: Callable[[torch.Tensor], Any], module: nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    network(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)).square().sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_a_compiled_module_has_the_gradients_of_the_module() -> None:
    module = small()
    expected = gradients(module, module)
    found = gradients(Compiled(module, nobody, "aot_eager"), module)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_where_the_compiler_fails_the_module_itself_answers_and_one_line_says_so() -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    module = small()
    said: list[str] = []
    compiled = Compiled(module, said.append, no_compiler)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(compiled(images), module(images))
    assert torch.equal(compiled(images), module(images))
    assert len(said) == 1
    assert "steps aside" in said[0]
    assert "no C++ compiler" in said[0]


class Choosy(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[0] == 2:
            raise ValueError("never two")
        return images


def test_the_models_own_error_is_not_taken_for_the_compilers() -> None:
    with pytest.raises(ValueError, match="never two"):
        Compiled(Choosy(), nobody, "aot_eager")(torch.randn(2, 1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="on processors torch.compile needs a C++ compiler")
def test_a_compiled_training_ends_about_where_the_training_does() -> None:
    """Kernels that are fused round in another order; depthwise convolutions stay in float32 in both."""
    source = open_data("digits")
    assert source is not None
    image = ImageFacts((8, 8), 0.3, 0.37)
    reader = build("prunus/resnet8", classes=10, in_chans=1, image=image, seed=0).input
    data = load_data(source, reader, LoadOptions(batch_size=256))
    losses = []
    for wanted in (False, True):
        module, settings = small(), TrainingSettings(lr=0.05, amp="bf16", compile=wanted)
        job = Job(Train(epochs=2), 0, 1.0, notice=nobody)
        losses.append(Trainer(settings, data.train, 0).train(module, settings.make_optimizer(module), job).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)

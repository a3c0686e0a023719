"""What worked before a removal works after it: other sizes and batches, copies, state dicts, train mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from prunus.adapters.pytorch.certification import random_keep
from prunus.adapters.pytorch.comparison import distance
from prunus.adapters.pytorch.structural_copy import structural_copy
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import masked_call, trace_model
from prunus.adapters.pytorch.verification import Prepared, prepare
from prunus.core.graph import Keep

Removed = tuple[nn.Module, nn.Module, Prepared, Keep]
"""The whole model, the pruned one, and how it came about."""

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "depthwise": lambda: torchvision.models.mobilenet_v3_small(),
    "windows": lambda: torchvision.models.swin_transformer.SwinTransformer(
        [2, 2], 24, [2, 1], [2, 4], [4, 4], stochastic_depth_prob=0.5, num_classes=7
    ),
    "attention": lambda: timm.create_model("test_vit", dynamic_img_size=True, drop_path_rate=0.5),
    "stochastic depth": lambda: timm.create_model("test_convnext", drop_path_rate=0.5),
    "shuffle": lambda: torchvision.models.shufflenet_v2_x0_5(),
}


def _images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _removed(model: nn.Module, size: int) -> Removed:
    torch.manual_seed(0)
    prepared = prepare(model.eval(), _images(size, 1), certified=False)
    graph = prepared.graph
    keep = random_keep(graph, 2)
    after = graph.units | {name: len(units) for name, units in keep.items()}
    pruned = structural_copy(model)
    remove(pruned, graph, keep, prepared.bindings.edits(graph.units, after))
    return model, pruned, prepared, keep


@pytest.fixture(scope="module", params=FAMILIES)
def removed(request: pytest.FixtureRequest) -> Removed:
    return _removed(FAMILIES[request.param](), 64)


def _whole(prepared: Prepared, keep: Keep) -> dict[str, Any]:
    return {name: keep.get(name, range(units)) for name, units in prepared.graph.units.items()}


@pytest.mark.parametrize(("size", "batch"), [(64, 1), (64, 5), (96, 2), (128, 3)])
def test_other_resolutions_and_batches_than_the_traced_ones_are_right(
    removed: Removed, size: int, batch: int
) -> None:
    model, pruned, prepared, keep = removed
    images = _images(size, batch)
    with torch.no_grad():
        got, expected = pruned(images), masked_call(model, prepared.graph, _whole(prepared, keep), (images,))
    error, scale = distance(got, expected)
    assert error <= 1e-4 * scale


def test_a_deep_copy_and_a_state_dict_carry_the_pruned_model(removed: Removed) -> None:
    _, pruned, _, _ = removed
    copied, images = copy.deepcopy(pruned), _images(64)
    state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    with torch.no_grad():
        expected = pruned(images)
        assert torch.equal(copied(images), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(pruned(images), expected), "the copy has tensors of its own"
        copied.load_state_dict(state, strict=True)
        assert torch.equal(copied(images), expected)


def test_train_mode_gives_every_parameter_the_gradient_that_it_had(removed: Removed) -> None:
    model, pruned, _, _ = removed
    assert _learning(model, 64) == _learning(pruned, 64) != set()


def _learning(model: nn.Module, size: int) -> set[str]:
    """Names of the parameters that a step in train mode reaches, with finite gradients."""
    torch.manual_seed(0)
    model = copy.deepcopy(model).train()
    answers = model(_images(size))
    several = answers if isinstance(answers, tuple) else (answers,)
    sum(answer.square().mean() for answer in several).backward()  # type: ignore[union-attr]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
    return set(found)


@pytest.mark.parametrize(
    ("name", "size", "heads"), [("googlenet", 96, 3), pytest.param("inception_v3", 299, 2, marks=pytest.mark.slow)]
)
def test_auxiliary_heads_train_on_after_a_removal(name: str, size: int, heads: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=True)
    model, pruned, prepared, _ = _removed(model, size)
    assert not prepared.trace.notices
    answers = pruned.train()(_images(size))
    assert len(answers) == heads and all(answer.shape == (2, 1000) for answer in answers)
    assert _learning(pruned, size) == _learning(model, size)
    with torch.no_grad():
        assert pruned.eval()(_images(size, 1)).shape == (1, 1000)


def test_heads_that_only_training_runs_are_named_where_training_cannot_be_looked_at() -> None:
    class NeedsMore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            features = self.body(x).mean((2, 3))
            if self.training and x.shape[-1] < 32:
                raise ValueError("images of 32 pixels and more are needed for training")
            return (self.head(features), self.aux(features)) if self.training else self.head(features)

    small, large = trace_model(NeedsMore(), _images(16)), trace_model(NeedsMore(), _images(32))
    (notice,) = small.notices
    assert notice.startswith("aux: not used in eval mode") and "images of 32 pixels" in notice
    assert not large.notices
    assert "aux.weight" in large.graph.tensors and "aux.weight" not in small.graph.tensors

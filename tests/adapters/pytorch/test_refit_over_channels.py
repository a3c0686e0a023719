"""A layer that runs over channels, as token mixing does, is refitted at the channels that are left."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch import refit as refit_module
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.refit import refit
from prunus.adapters.pytorch.shrinking_model import Origin, ShrinkingModel
from prunus.core.plan import ModelSource


class TokenMixer(nn.Module):
    """A linear layer over the tokens of every channel: its rows are channels, and channels can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.into, self.out = nn.Linear(16, 10), nn.Linear(10, 16)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2)
        return self.head((x + self.out(torch.relu(self.into(x)))).mean(2))


@pytest.mark.parametrize("rows", [refit_module.ROWS, 400])
def test_a_layer_that_runs_over_channels_is_fitted_at_the_channels_that_are_left(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit_module, "ROWS", rows)  # few: positions are sampled
    torch.manual_seed(0)
    images = torch.randn(192, 3, 8, 8, dtype=torch.float64)
    model = TokenMixer().double().eval()
    spec = InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    with torch.no_grad():
        model.head.weight[:, [0, 1, 5]] = 0  # nobody misses these channels
        for gone, twin in ((2, 7), (3, 8)):  # and a twin can take over from these hidden units
            model.into.weight[gone], model.into.bias[gone] = model.into.weight[twin], model.into.bias[twin]
    origin = Origin(ModelSource(name="x"), spec, lambda source: TokenMixer(), {})
    shrinking = ShrinkingModel(model.float(), origin, "cpu")
    model.double()
    for keep in (
        {"stem.weight": [1, 2, 3, 4, 5, 6, 7]},
        {"stem.weight": [1, 2, 3, 5, 6], "into.weight": [*range(2), *range(4, 10)]},
    ):
        dense, plan = copy.deepcopy(shrinking.module), shrinking.plan
        wanted = dense(images)
        kept_units = {name: np.asarray(units) for name, units in keep.items()}
        shrinking.remove(kept_units, (), verified=False, seed=0)
        before = float((shrinking.module(images) - wanted).detach().abs().max())
        graph, kept = shrinking.since(plan, shrinking.plan)
        places = shrinking.places(plan, shrinking.plan)
        assert set(places) == {"into.weight", "out.weight"}
        refit(
            shrinking.module,
            dense,
            graph,
            graph.kept_indices(kept),
            [images],
            "sequential",
            places=places,
            share=1e-12,
        )
        after = float((shrinking.module(images) - wanted).detach().abs().max())
        assert after < 1e-8 * max(before, 1.0)
    assert before > 1e-3

"""Rows times the flattened weight are the layer's outputs, for every kind of padding and grouping."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from prunus.adapters.pytorch.patches import outputs, reader, rows, sample, weight_rows

LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), (9, 8)),
    "strided, dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 0), dilation=(1, 2)), (9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (9, 8)),
    "depthwise": (nn.Conv2d(4, 4, 5, padding=2, groups=4), (9, 8)),
    "string padding": (nn.Conv2d(4, 6, 4, padding="same"), (9, 8)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (9, 8)),
    "tensorflow padding": (Conv2dSame(4, 6, 3, stride=2), (9, 8)),
    "one dimension": (nn.Conv1d(4, 6, 3, padding=1, bias=False), (7,)),
    "three dimensions": (nn.Conv3d(4, 6, 2, padding=1), (3, 4, 5)),
}


def check(layer: nn.Module, x: Tensor, limit: int) -> None:
    layer.double()
    output = layer(x)
    where = sample(layer, output, limit, seed=0)
    seen = torch.cat(list(rows(layer, x, where)))
    product = torch.einsum("rgv,gov->rgo", seen, weight_rows(layer, layer.weight)).flatten(1)
    if layer.bias is not None:
        product = product + layer.bias
    expected = torch.cat(list(outputs(layer, output, where)))
    assert len(expected) == len(where)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("limit", [10, 200, 100_000])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_are_a_convolutions_outputs(name: str, limit: int) -> None:
    layer, size = LAYERS[name]
    check(layer, torch.randn(40, 4, *size, dtype=torch.float64), limit)


@pytest.mark.parametrize("shape", [(50, 4), (50, 7, 4), (50, 3, 2, 4)])
def test_rows_times_weight_are_a_linear_layers_outputs(shape: tuple[int, ...]) -> None:
    for limit in (20, 60, 10_000):
        check(nn.Linear(4, 6), torch.randn(shape, dtype=torch.float64), limit)


def test_a_sample_is_within_its_limit_and_repeats_with_its_seed() -> None:
    layer = nn.Conv2d(1, 1, 1)
    output = torch.zeros(40, 1, 8, 8)
    first, again, other = (sample(layer, output, 400, seed) for seed in (3, 3, 4))
    assert len(first) == 400
    assert all(torch.equal(a, b) for a, b in zip(first.positions, again.positions, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.positions, other.positions, strict=True))


def test_layers_that_do_more_than_multiply_are_not_readers() -> None:
    assert reader(nn.Conv2d(3, 4, 1)) is not None
    assert reader(StdConv2d(3, 4, 1)) is None
    assert reader(nn.ConvTranspose2d(3, 4, 1)) is None
    assert reader(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) is None

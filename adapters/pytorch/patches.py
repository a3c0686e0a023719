"""What a convolution or linear layer multiplies its weight with: rows of inputs, and the outputs they give.

A row is everything that one output position sees of one convolution group: `(channels / groups) * taps`
values, padding included, in the order of the flattened weight. So `rows @ weight.flatten(1).T + bias` is
the layer, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn

IMAGES_AT_ONCE = 32
"""Images whose rows are gathered together; they share the sampled positions."""
_PLAIN = (nn.Linear, TimmLinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
Reader = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def reader(module: nn.Module) -> Reader | None:
    """`module` if it is a plain convolution or linear layer with a weight of its own, else None.

    A subclass that computes something else with its weight (standardised, conditional) is not one.
    """
    plain = type(module).forward in {kind.forward for kind in _PLAIN}
    return module if plain and "weight" in module._parameters else None  # type: ignore[return-value]


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, `layer(x)` or `layer(input=x)`; for hooks, registered `with_kwargs`."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def runs_over(layer: Reader, input: Tensor) -> tuple[int, ...]:
    """The lengths of an input's axes besides the channels: images, then positions."""
    return tuple(input.shape[:-1] if isinstance(layer, nn.Linear) else (input.shape[0], *input.shape[2:]))


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Which output positions of which images are looked at."""

    images: Tensor
    """Indices into the first axis."""
    positions: tuple[Tensor, ...]
    """For each run of `IMAGES_AT_ONCE` of them, indices into the flattened output positions."""

    def __len__(self) -> int:
        runs = self.images.split(IMAGES_AT_ONCE)
        return sum(len(run) * len(where) for run, where in zip(runs, self.positions, strict=True))

    def runs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(IMAGES_AT_ONCE), self.positions, strict=True)

    def image_of_rows(self) -> Iterator[Tensor]:
        """For each run, the image of every row."""
        for images, positions in self.runs():
            yield images.repeat_interleave(len(positions))


def sample(layer: Reader, output: Tensor, limit: int, seed: int) -> Sample:
    """At most `limit` rows of `layer`, spread evenly over images and at random over positions."""
    images, places = output.shape[0], _places(layer, output)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.arange(images)
    if images > limit:
        chosen = torch.randperm(images, generator=generator)[:limit].sort().values
    per_image = min(places, max(limit // images, 1))
    positions = []
    for _ in chosen.split(IMAGES_AT_ONCE):
        order = torch.arange(places)
        if per_image < places:
            order = torch.randperm(places, generator=generator)[:per_image].sort().values
        positions.append(order)
    return Sample(chosen, tuple(positions))


def outputs(layer: Reader, output: Tensor, sample: Sample) -> Iterator[Tensor]:
    """The layer's outputs at the sampled positions, one (rows, channels) tensor for each run of images."""
    flat = _positions_first(layer, output)
    for images, positions in sample.runs():
        picked = flat[images.to(flat.device)][:, positions.to(flat.device)]
        yield picked.reshape(-1, picked.shape[-1])


def rows(layer: Reader, input: Tensor, sample: Sample) -> Iterator[Tensor]:
    """What the weight is multiplied with there: (rows, convolution groups, values) for each run."""
    if isinstance(layer, nn.Linear):
        for part in outputs(layer, input, sample):
            yield part.unsqueeze(1)
        return
    for images, positions in sample.runs():
        padded = _padded(layer, input[images.to(input.device)])
        taps = _taps(layer, padded.shape[2:], positions).to(input.device)
        seen = padded.flatten(2)[:, :, taps]  # (images, channels, positions, taps)
        grouped = seen.unflatten(1, (layer.groups, -1)).permute(0, 3, 1, 2, 4)
        yield grouped.flatten(3).flatten(0, 1)


def weight_rows(layer: Reader, weight: Tensor) -> Tensor:
    """(groups, outputs per group, values): the weight as it multiplies `rows`."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return weight.detach().reshape(groups, weight.shape[0] // groups, -1)


def _places(layer: Reader, output: Tensor) -> int:
    return prod(output.shape[1:-1]) if isinstance(layer, nn.Linear) else prod(output.shape[2:])


def _positions_first(layer: Reader, values: Tensor) -> Tensor:
    """(images, positions, channels) whatever the layer."""
    values = values.detach()
    if isinstance(layer, nn.Linear):
        return values.reshape(values.shape[0], -1, values.shape[-1])
    return values.flatten(2).transpose(1, 2)


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    x = x.detach()
    if isinstance(layer, Conv2dSame):
        height, width = x.shape[-2:]
        return F.pad(x, pad_same_arg([height, width], layer.kernel_size, layer.stride, layer.dilation))
    both = list(layer._reversed_padding_repeated_twice)
    if not any(both):
        return x
    return F.pad(x, both, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _taps(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, size: torch.Size, positions: Tensor) -> Tensor:
    """(positions, taps): flat indices into a padded map of `size`."""
    flat = torch.zeros(1, 1, dtype=torch.int64)
    for d, length in enumerate(size):
        kernel, stride, dilation = layer.kernel_size[d], layer.stride[d], layer.dilation[d]
        count = (length - dilation * (kernel - 1) - 1) // stride + 1
        along = torch.arange(count).unsqueeze(1) * stride + torch.arange(kernel) * dilation
        # (places so far x count, taps so far x kernel)
        joined = flat[:, None, :, None] * length + along[None, :, None, :]
        flat = joined.reshape(flat.shape[0] * count, flat.shape[1] * kernel)
    return flat[positions]

"""Small images held in memory: augmented a batch at a time, no worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import to_pil_image

from prunus.adapters.pytorch.augmentation import Augmentation, Transform, pil_mode
from prunus.adapters.pytorch.batches import Batch, share_of, share_positions, take_part
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.random_state import seeded
from prunus.core.cost import IntArray
from prunus.core.errors import LoadError


@dataclass(frozen=True, slots=True, eq=False)
class ArrayImages:
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def select(self, indices: IntArray) -> ArrayImages:
        index = torch.from_numpy(indices)
        return ArrayImages(self.images[index], self.labels[index])

    def fitted(self, spec: InputSpec) -> ArrayImages:
        """Brought to the height and width of `spec`: a little padding where that suffices, else resized."""
        height, width = self.images.shape[2:]
        down, right = spec.size[1] - height, spec.size[2] - width
        if (down, right) == (0, 0):
            return self
        if 0 <= down <= height // 4 and 0 <= right <= width // 4:
            border = (right // 2, right - right // 2, down // 2, down - down // 2)
            return ArrayImages(functional.pad(self.images, border), self.labels)
        pieces = [
            functional.interpolate(piece.float(), size=spec.size[1:], mode="bilinear", antialias=True)
            .round_()
            .clamp_(0, 255)
            .byte()
            for piece in self.images.split(4096)
        ]
        return ArrayImages(torch.cat(pieces), self.labels)


def normalised(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 (B, C, H, W) as the model wants it; grey is repeated, colour is averaged, to `spec`'s channels."""
    x = images.float().div_(255)
    channels = spec.size[0]
    if x.shape[1] != channels:
        x = x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x.mean(1, keepdim=True)
        if x.shape[1] != channels:
            raise LoadError(f"images of {images.shape[1]} channels do not suit a model that takes {channels}")
    mean = torch.tensor(spec.mean).view(1, -1, 1, 1)
    std = torch.tensor(spec.std).view(1, -1, 1, 1)
    return (x - mean) / std


class ArrayBatches:
    """Unaugmented batches."""

    def __init__(self, data: ArrayImages, order: IntArray, spec: InputSpec, batch_size: int) -> None:
        self._data, self._order, self._spec, self._batch_size = data, order, spec, batch_size

    @property
    def samples(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.from_numpy(self._order).split(self._batch_size) if len(self._order) else ():
            yield normalised(self._data.images[index], self._spec), self._data.labels[index]

    def part(self, images: int | None = None, fold: tuple[int, int] = (0, 1)) -> ArrayBatches:
        order = take_part(self._order, images, fold)
        return ArrayBatches(self._data, order, self._spec, self._batch_size)

    def share(self, rank: int, count: int) -> ArrayBatches:
        order = share_of(self._order, self._batch_size, rank, count)
        return ArrayBatches(self._data, order, self._spec, self._batch_size)


class ArrayTrainBatches:
    """Every image shifted by up to an eighth of its side, and mirrored by a coin where that makes sense.

    What else `augmentation` says is done to each image on its own, after that.
    """

    def __init__(
        self,
        data: ArrayImages,
        spec: InputSpec,
        batch_size: int,
        flip: bool,
        shift: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        self._data, self._spec, self._batch_size, self._flip = data, spec, batch_size, flip
        self._shift = shift
        self._padded = functional.pad(data.images, (shift,) * 4)
        self._share = share_positions(batch_size, 0, 1)
        self._more = augmentation.in_place(spec) if augmentation else None

    @property
    def samples(self) -> int:
        return len(self._data.labels)

    @property
    def steps(self) -> int:
        return self.samples // self._batch_size

    def epoch(self, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        order = rng.permutation(self.samples)
        for step in range(self.steps):
            index = torch.from_numpy(order[step * self._batch_size : (step + 1) * self._batch_size])
            images = self._augmented(index, rng)[self._share]
            labels = self._data.labels[index[self._share]]
            if self._more is None:
                yield normalised(images, self._spec), labels
            else:
                seeds = rng.integers(0, 2**31, self._batch_size)[self._share]
                yield _transformed(images, self._more, pil_mode(self._spec), seeds), labels

    def share(self, rank: int, count: int) -> ArrayTrainBatches:
        shared = copy.copy(self)
        shared._share = share_positions(self._batch_size, rank, count)
        return shared

    def _augmented(self, index: Tensor, rng: np.random.Generator) -> Tensor:
        height, width = self._data.images.shape[2:]
        offsets = torch.from_numpy(rng.integers(0, 2 * self._shift + 1, (2, len(index), 1)))
        rows = offsets[0] + torch.arange(height)
        columns = offsets[1] + torch.arange(width)
        if self._flip:
            mirrored = torch.from_numpy(rng.random((len(index), 1)) < 0.5)
            columns = torch.where(mirrored, columns.flip(1), columns)
        # advanced indices on both sides of the channel slice put the channels last
        picked = self._padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2)


def _transformed(images: Tensor, transform: Transform, mode: str, seeds: IntArray) -> Tensor:
    """uint8 (B, C, H, W), each transformed with random numbers of its own."""
    done = []
    for image, seed in zip(images, seeds, strict=True):
        with seeded(int(seed)):
            done.append(transform(to_pil_image(image).convert(mode)))
    return torch.stack(done)

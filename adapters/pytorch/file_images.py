"""Images in files, or behind timm's readers: decoded by worker processes, transformed by timm's transforms."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunus.adapters.pytorch.batches import Batch, take_part
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.core.cost import IntArray
from prunus.core.errors import LoadError

_LOG = logging.getLogger("prunus.data")
_TRIES = 20

_Ticket = tuple[int, int]
"""(index of the image, seed of its augmentation)"""


Tickets = Dataset[tuple[Tensor, int]]
"""A data set that is indexed by tickets."""


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    batch_size: int
    workers: int


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every source of random numbers starts from `seed` in the block, and goes on afterwards as if nothing was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class FileImages(Dataset[tuple[Tensor, int]]):
    """Answers tickets: the augmentation of an image depends on its ticket alone, not on the worker."""

    def __init__(self, images: Any, spec: InputSpec, training: bool) -> None:
        """`images[i]` gives (PIL image, label)."""
        self._images = images
        self._mode = "L" if spec.size[0] == 1 else "RGB"
        self._transform = create_transform(
            spec.size,
            is_training=training,
            mean=spec.mean,
            std=spec.std,
            interpolation=spec.interpolation,
            crop_pct=spec.crop,
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, ticket: _Ticket) -> tuple[Tensor, int]:
        index, seed = ticket
        image, label = self._readable(index)
        with seeded(seed):
            return self._transform(image), label

    def _readable(self, index: int) -> tuple[Any, int]:
        """The image, or the next that can be read, with a notice: one broken file ends no training."""
        for attempt in range(_TRIES):
            position = (index + attempt) % len(self)
            try:
                image, label = self._images[position]
                return image.convert(self._mode), int(label)
            except (OSError, ValueError, SyntaxError) as error:
                _LOG.warning("image %s cannot be read (%s); the next one is taken", self._name(position), error)
        raise LoadError(f"{_TRIES} images in a row cannot be read, from {self._name(index)} on")

    def _name(self, index: int) -> str:
        samples = getattr(getattr(self._images, "reader", None), "samples", None)
        return str(samples[index][0]) if samples else f"number {index}"


class FileBatches:
    """Unaugmented batches, in a fixed order."""

    def __init__(self, data: Tickets, order: IntArray, settings: LoaderSettings) -> None:
        self._data, self._order, self._settings = data, order, settings

    @property
    def samples(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        tickets = [(int(i), 0) for i in self._order]
        size = self._settings.batch_size
        yield from _load(self._data, [tickets[i : i + size] for i in range(0, len(tickets), size)], self._settings)

    def part(self, images: int | None = None, fold: tuple[int, int] = (0, 1)) -> FileBatches:
        return FileBatches(self._data, take_part(self._order, images, fold), self._settings)


class FileTrainBatches:
    """Batches augmented as timm does for training: random resized crop, mirror, colour jitter."""

    def __init__(self, data: Tickets, indices: IntArray, settings: LoaderSettings) -> None:
        self._data, self._indices, self._settings = data, indices, settings

    @property
    def samples(self) -> int:
        return len(self._indices)

    @property
    def steps(self) -> int:
        return self.samples // self._settings.batch_size

    def epoch(self, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        order = rng.permutation(self._indices)
        seeds = rng.integers(0, 2**31, len(order))
        tickets = [(int(i), int(s)) for i, s in zip(order, seeds, strict=True)]
        size = self._settings.batch_size
        yield from _load(
            self._data, [tickets[i * size : (i + 1) * size] for i in range(self.steps)], self._settings
        )


def _load(data: Tickets, batches: Sequence[Sequence[_Ticket]], settings: LoaderSettings) -> Iterator[Batch]:
    # the loader's own generator: building one must not draw from the global random numbers
    loader = DataLoader(
        data,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=min(settings.workers, len(batches)),
        generator=torch.Generator().manual_seed(0),
    )
    for images, labels in loader:
        yield images, labels.long()

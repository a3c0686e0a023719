"""Images in files, or behind timm's readers: decoded by worker processes, transformed by timm's transforms."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunus.adapters.pytorch.augmentation import Augmentation, pil_mode, plain_transform
from prunus.adapters.pytorch.batches import Batch, share_of, share_positions, take_part
from prunus.adapters.pytorch.broken_images import BrokenImages
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.random_state import seeded
from prunus.core.cost import IntArray
from prunus.core.errors import LoadError

_TRIES = 20
_RAISED = f"{LoadError.__module__}.{LoadError.__qualname__}: "

_Ticket = tuple[int, int]
"""(index of the image, seed of its augmentation)"""


Sample = tuple[Tensor, int, str]
"""Image, label, and the images that could not be read in its place, as lines "NAME (REASON)"."""
Tickets = Dataset[Sample]
"""A data set that is indexed by tickets."""


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    batch_size: int
    workers: int


class FileImages(Dataset[Sample]):
    """Answers tickets: the augmentation of an image depends on its ticket alone, not on the worker."""

    def __init__(self, images: Any, spec: InputSpec, training: Augmentation | None) -> None:
        """`images[i]` gives (PIL image, label). `training`: what is done in training; None: to evaluate."""
        self._images = images
        self._mode = pil_mode(spec)
        self._transform = plain_transform(spec) if training is None else training.transform(spec)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, ticket: _Ticket) -> Sample:
        index, seed = ticket
        image, label, problems = self._readable(index)
        with seeded(seed):
            return self._transform(image), label, problems

    def _readable(self, index: int) -> tuple[Any, int, str]:
        """The image, or the next that can be read: one broken file ends no training."""
        problems: list[str] = []
        for attempt in range(min(_TRIES, len(self))):
            position = (index + attempt) % len(self)
            try:
                return *self._read(position), "\n".join(problems)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                problems.append(f"{self._name(position)} ({_without_object(reason)})")
        raise LoadError(f"{len(problems)} images in a row cannot be read, the first is {problems[0]}")

    def _read(self, position: int) -> tuple[Any, int]:
        reader = getattr(self._images, "reader", None)
        if reader is None:
            image, label = self._images[position]
            return _in_eight_bits(image).convert(self._mode), int(label)
        content, label = reader[position]  # the data set around it would pass over broken files by itself
        with Image.open(content) as image:
            return _in_eight_bits(image).convert(self._mode), int(label)

    def _name(self, index: int) -> str:
        samples = getattr(getattr(self._images, "reader", None), "samples", None)
        return str(samples[index][0]) if samples else f"number {index}"


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled to 8, which Pillow would cut off at 255 instead; any other as it is."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    if image.mode != "I" or levels.max(initial=0) > 255:
        levels = np.rint(levels / 257)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _without_object(reason: str) -> str:
    """Pillow names the file object, which says nothing to people."""
    return reason.partition(" <_io")[0]


class FileBatches:
    """Unaugmented batches, in a fixed order, without the images that cannot be read."""

    def __init__(
        self, data: Tickets, order: IntArray, settings: LoaderSettings, broken: BrokenImages | None = None
    ) -> None:
        self._data, self._order, self._settings = data, order, settings
        self._broken = broken or BrokenImages()

    @property
    def samples(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        tickets = [(int(i), 0) for i in self._order]
        size = self._settings.batch_size
        batches = [tickets[i : i + size] for i in range(0, len(tickets), size)]
        read = 0
        for images, labels, problems in _load(self._data, batches, self._settings, self._broken):
            whole = torch.tensor([not problem for problem in problems])
            read += int(whole.sum())
            if bool(whole.all()):
                yield images, labels
            elif bool(whole.any()):
                yield images[whole], labels[whole]
        if tickets and not read:
            raise LoadError(f"none of the {len(tickets)} images can be read: {'; '.join(self._broken.notes)}")

    def part(self, images: int | None = None, fold: tuple[int, int] = (0, 1)) -> FileBatches:
        return FileBatches(self._data, take_part(self._order, images, fold), self._settings, self._broken)

    def share(self, rank: int, count: int) -> FileBatches:
        order = share_of(self._order, self._settings.batch_size, rank, count)
        return FileBatches(self._data, order, self._settings, self._broken)


class FileTrainBatches:
    """Batches augmented as timm does for training: random resized crop, mirror, colour jitter."""

    def __init__(
        self, data: Tickets, indices: IntArray, settings: LoaderSettings, broken: BrokenImages | None = None
    ) -> None:
        self._data, self._indices, self._settings = data, indices, settings
        self._broken = broken or BrokenImages()
        self._share = share_positions(settings.batch_size, 0, 1)

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
        batches = [[tickets[i * size + at] for at in self._share] for i in range(self.steps)]
        for images, labels, _ in _load(self._data, batches, self._settings, self._broken):
            yield images, labels

    def share(self, rank: int, count: int) -> FileTrainBatches:
        shared = copy.copy(self)
        shared._share = share_positions(self._settings.batch_size, rank, count)
        return shared


def _load(
    data: Tickets, batches: Sequence[Sequence[_Ticket]], settings: LoaderSettings, broken: BrokenImages
) -> Iterator[tuple[Tensor, Tensor, Sequence[str]]]:
    # the loader's own generator: building one must not draw from the global random numbers
    loader = DataLoader(
        data,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=min(settings.workers, len(batches)),
        generator=torch.Generator().manual_seed(0),
    )
    try:
        for images, labels, problems in loader:
            for problem in problems:
                broken.meet(problem)
            yield images, labels.long(), problems
    except LoadError as error:
        raise from_worker(error) from None


def from_worker(error: LoadError) -> LoadError:
    """`error` alone: from a worker it comes with that process's traceback around it."""
    return LoadError(str(error).strip().splitlines()[-1].removeprefix(_RAISED))

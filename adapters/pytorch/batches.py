"""Batches of images and labels: what training, measuring and evaluating iterate over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from prunus.adapters.pytorch.broken_images import BrokenImages
from prunus.core.cost import IntArray
from prunus.core.errors import ConfigError, LoadError

Batch = tuple[Tensor, Tensor]
"""Images (batch, channels, height, width), float32, normalised; labels (batch,), int64."""


class Batches(Protocol):
    """A fixed sequence of images, without augmentation, the same on every pass."""

    @property
    def samples(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def part(self, images: int | None = None, fold: tuple[int, int] = (0, 1)) -> Batches:
        """The k-th of n disjoint parts (`fold` = (k, n)) of the first `images` images."""
        ...

    def share(self, rank: int, count: int) -> Batches:
        """Every `count`-th of these batches, from the `rank`-th on: what one of several processes takes."""
        ...


class TrainBatches(Protocol):
    """Augmented images in random order; an incomplete last batch is left out."""

    @property
    def samples(self) -> int: ...

    @property
    def steps(self) -> int:
        """Batches of one epoch, at least 1."""
        ...

    def epoch(self, seed: int) -> Iterator[Batch]:
        """One epoch, whose order and augmentation depend on `seed` alone."""
        ...

    def share(self, rank: int, count: int) -> TrainBatches:
        """The `rank`-th of `count` equal shares of each of these batches; as many batches.

        Raises ConfigError if the batches cannot be divided into equal shares.
        """
        ...


@dataclass(frozen=True, slots=True)
class DataBundle:
    """A data set, split and ready for one model."""

    train: TrainBatches
    holdout: Batches
    """A stratified part of train that nothing trains on."""
    calibration: Batches
    """Images of the training part, unaugmented, in a fixed random order."""
    test: Batches
    classes: int
    """0 where images have no labels."""
    class_names: tuple[str, ...]
    in_chans: int
    broken: BrokenImages = field(default_factory=BrokenImages)
    """What its readers could not read so far."""


def take_part(indices: IntArray, images: int | None, fold: tuple[int, int]) -> IntArray:
    part, parts = fold
    if not 0 <= part < parts:
        raise LoadError(f"fold {part} of {parts} does not exist")
    return indices[:images][part::parts]


def share_of(order: IntArray, batch_size: int, rank: int, count: int) -> IntArray:
    """The part of `order` that its batches `rank`, `rank + count`... hold."""
    return order[np.arange(len(order)) // batch_size % count == rank]


def share_positions(batch_size: int, rank: int, count: int) -> IntArray:
    """Which images of a training batch process `rank` of `count` takes.

    Images i and -1 - i, which mixup mixes, go to the same process where shares of whole pairs come out equal.
    Raises ConfigError if the shares cannot be equal.
    """
    if batch_size % count:
        raise ConfigError(
            f"--batch-size {batch_size} counts the images of all processes together and cannot be shared equally "
            f"by {count}; give a multiple of {count}",
            key="batch_size",
        )
    positions = np.arange(batch_size)
    if batch_size % (2 * count):
        return positions[rank::count]
    return positions[np.minimum(positions, positions[::-1]) % count == rank]


def stratified_split(labels: Sequence[int] | IntArray, share: float, seed: int) -> tuple[IntArray, IntArray]:
    """(rest, held): sorted indices; `held` has `share` of every class, rounded, at least 1 and not all.

    Raises LoadError naming a class with fewer than two images.
    """
    values = np.asarray(labels)
    rng = np.random.default_rng(seed)
    held: list[IntArray] = []
    for label in np.unique(values):
        members = np.flatnonzero(values == label)
        if len(members) < 2:
            raise LoadError(
                f"class {int(label)} has {len(members)} training image; every class needs at least 2, "
                "one of them to be held out"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.append(rng.permutation(members)[:count])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(values)), chosen), chosen


def stratified_subset(labels: Sequence[int] | IntArray, count: int, seed: int) -> IntArray:
    """Sorted indices of `count` images, each class with its share (largest remainders), at least 2 of each."""
    values = np.asarray(labels)
    if count >= len(values):
        return np.arange(len(values))
    classes, sizes = np.unique(values, return_counts=True)
    if count < 2 * len(classes):
        raise LoadError(f"{count} training images are too few for {len(classes)} classes; give 2 of each")
    exact = sizes * count / len(values)
    wanted = np.clip(np.floor(exact).astype(np.int64), np.minimum(2, sizes), sizes)
    for i in np.argsort(wanted - exact, kind="stable"):
        if wanted.sum() < count and wanted[i] < sizes[i]:
            wanted[i] += 1
    while wanted.sum() > count:  # two of a rare class are more than its share
        wanted[wanted.argmax()] -= 1
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(values == c))[:n] for c, n in zip(classes, wanted, strict=True)]
    return np.sort(np.concatenate(chosen))

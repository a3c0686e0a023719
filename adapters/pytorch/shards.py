"""Streams of images in tar files (WebDataset), read by timm's reader: `wds/NAME:DIR`.

DIR holds timm's `_info.json`, or the shards train*.tar and val*.tar (or validation*.tar, test*.tar). A tenth of
the training shards, from the end of the list, is held out. Each epoch has the shards and the images in an order
that follows from its seed alone: neither the number of processes nor that of workers changes it. For that, every
process reads the whole stream, in one worker; it augments its own share of each batch only.
"""

from __future__ import annotations

import copy
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from prunus.adapters.pytorch.augmentation import Transform, pil_mode
from prunus.adapters.pytorch.batches import Batch, share_of, share_positions, take_part
from prunus.adapters.pytorch.file_images import from_worker
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.random_state import seeded
from prunus.core.cost import IntArray
from prunus.core.errors import LoadError, MissingDependencyError

_BUFFER, _FIRST_FILL = 4096, 1024
"""Images, undecoded, among which the next is drawn; and how many there must be before the first is."""
_NOT_TOLD = "Dataset info file not found"
logging.getLogger("timm.data.readers.reader_wds").addFilter(
    lambda record: not str(record.msg).startswith(_NOT_TOLD)  # which is no fault, and would be said every epoch
)
_IMAGES = ("jpg", "jpeg", "png", "webp")
_SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}


@dataclass(frozen=True, slots=True)
class Shards:
    """Some shards of a folder, and what their images are turned into."""

    folder: Path
    files: tuple[str, ...]
    mode: str = "RGB"
    classes: int = 0

    def suiting(self, spec: InputSpec) -> Shards:
        """The same, decoded to the channels of `spec`."""
        return replace(self, mode=pil_mode(spec))

    def count(self) -> int:
        """Images in them, by the table of contents of each."""
        found = 0
        for name in self.files:
            try:
                with tarfile.open(self.folder / name) as archive:
                    parts = (member.rpartition("/")[2].partition(".") for member in archive.getnames())
                    found += sum(ending.lower() in _IMAGES for _, _, ending in parts)
            except (OSError, tarfile.TarError) as error:
                raise LoadError(f"{self.folder / name} cannot be read: {error}") from None
        return found

    def read(self, seed: int | None = None, images: int | None = None) -> Iterator[tuple[Image.Image, int]]:
        """Images and labels, in the order of the files; with a `seed` shuffled, and over again up to `images`.

        Raises LoadError for a label that is no class.
        """
        shuffled = seed is not None
        dataset: Any = create_dataset(
            "wds/shards",
            root=str(self.folder),
            split="::".join(self.files),
            is_training=shuffled,
            seed=seed or 0,
            num_samples=images or 1,
            input_key=";".join(_IMAGES),
            input_img_mode=self.mode,
            sample_shuffle_size=_BUFFER,
            sample_initial_size=_FIRST_FILL,
        )
        reader = dataset.reader
        # all of the stream, in an order that does not know of processes and workers
        reader.dist_rank, reader.dist_num_replicas, reader.worker_info = 0, 1, ()
        for image, label in dataset:
            if not 0 <= label < self.classes:
                raise LoadError(f"{self.folder}: labels must lie in 0..{self.classes - 1}, got {label}")
            yield image, label


class ShardBatches:
    """Unaugmented batches of the images at some places of a stream, which is the same on every pass."""

    def __init__(
        self,
        shards: Shards,
        order: IntArray,
        transform: Transform,
        batch_size: int,
        workers: int,
        shuffled: tuple[int, int] | None = None,
    ) -> None:
        """`order`: ascending places in the stream. `shuffled`: its seed and length, if it is shuffled."""
        self._shards, self._order, self._transform = shards, order, transform
        self._batch_size, self._workers, self._shuffled = batch_size, workers, shuffled

    @property
    def samples(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        return _served(self._read, self._workers)

    def _read(self) -> Iterator[Batch]:
        chosen, read = self._chosen(), 0
        while pairs := list(islice(chosen, self._batch_size)):
            read += len(pairs)
            yield _batch([(self._transform(image), label) for image, label in pairs])
        if len(self._order) and not read:
            raise LoadError(f"none of the images in {self._shards.folder} can be read")

    def _chosen(self) -> Iterator[tuple[Image.Image, int]]:
        stream = enumerate(self._shards.read(*(self._shuffled or ())))
        for wanted in self._order:
            pair = next((pair for place, pair in stream if place == wanted), None)
            if pair is None:  # images that cannot be read are left out: the stream is shorter than it says
                return
            yield pair

    def part(self, images: int | None = None, fold: tuple[int, int] = (0, 1)) -> ShardBatches:
        return self._of(take_part(self._order, images, fold))

    def share(self, rank: int, count: int) -> ShardBatches:
        return self._of(share_of(self._order, self._batch_size, rank, count))

    def _of(self, order: IntArray) -> ShardBatches:
        chosen = copy.copy(self)
        chosen._order = order
        return chosen


class ShardTrainBatches:
    """Augmented batches in an order that `epoch`'s seed decides."""

    def __init__(self, shards: Shards, steps: int, transform: Transform, batch_size: int, workers: int) -> None:
        self._shards, self._steps, self._transform = shards, steps, transform
        self._batch_size, self._workers = batch_size, workers
        self._share = share_positions(batch_size, 0, 1)

    @property
    def samples(self) -> int:
        return self._steps * self._batch_size

    @property
    def steps(self) -> int:
        return self._steps

    def epoch(self, seed: int) -> Iterator[Batch]:
        return _served(partial(self._read, seed), self._workers)

    def _read(self, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        stream = self._shards.read(seed, self.samples)
        for _ in range(self._steps):
            pairs = list(islice(stream, self._batch_size))
            if len(pairs) < self._batch_size:
                raise LoadError(f"the images in {self._shards.folder} cannot be read")
            seeds = rng.integers(0, 2**31, self._batch_size)
            done = []
            for at in self._share:
                with seeded(int(seeds[at])):
                    done.append((self._transform(pairs[at][0]), pairs[at][1]))
            yield _batch(done)

    def share(self, rank: int, count: int) -> ShardTrainBatches:
        shared = copy.copy(self)
        shared._share = share_positions(self._batch_size, rank, count)
        return shared


class ShardFolder:
    """What lies in a folder of shards."""

    def __init__(self, folder: Path, classes: int) -> None:
        """Raises MissingDependencyError; LoadError if the folder has no two training shards or none to test on."""
        if find_spec("webdataset") is None:
            raise MissingDependencyError("--data wds/...", "pip install 'prunus[webdataset]'")
        self._folder, self._classes = folder, classes
        train = self._found("train")
        if len(train) < 2:
            raise LoadError(f"{folder} has {len(train)} training shard; at least 2 are needed, one to be held out")
        self._train = train
        self.test = Shards(folder, self._found("validation"), classes=classes)

    def parts(self, holdout: float) -> tuple[Shards, Shards]:
        """(training shards, held-out shards): disjoint, at least one each."""
        held = min(max(round(holdout * len(self._train)), 1), len(self._train) - 1)
        return (
            Shards(self._folder, self._train[:-held], classes=self._classes),
            Shards(self._folder, self._train[-held:], classes=self._classes),
        )

    def announced(self, shards: Shards) -> int | None:
        """How many images the folder's `_info.json` says there are in them."""
        lengths = {name: length for split in self._told.values() for name, length in split.items()}
        if any(name not in lengths for name in shards.files):
            return None
        return sum(lengths[name] for name in shards.files)

    @cached_property
    def _told(self) -> dict[str, dict[str, int]]:
        """Split -> shard -> images in it, as the folder's `_info.json` says. Raises LoadError if it is none."""
        path = next((p for p in (self._folder / "_info.json", self._folder / "info.json") if p.is_file()), None)
        if path is None:
            return {}
        try:
            splits = json.loads(path.read_text("utf-8"))["splits"]
            return {
                word: {
                    str(name): int(length)
                    for name, length in zip(told["filenames"], told["shard_lengths"], strict=True)
                }
                for word, told in splits.items()
            }
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(
                f'{path} is not of timm\'s form {{"splits": {{"train": {{"filenames": [...], "shard_lengths": '
                f"[...]}}, ...}}}}: {type(error).__name__}: {error}"
            ) from None

    def _found(self, split: str) -> tuple[str, ...]:
        for word in _SPLITS[split]:
            told = self._told.get(word)
            files = tuple(told or sorted(path.name for path in self._folder.glob(f"{word}*.tar")))
            if files:
                missing = next((name for name in files if not (self._folder / name).is_file()), None)
                if missing is not None:
                    raise LoadError(f"{self._folder} has no shard {missing}, which its _info.json names")
                return files
        raise LoadError(f"{self._folder} holds no shards {' or '.join(f'{w}*.tar' for w in _SPLITS[split])}")


class _Stream(IterableDataset[Batch]):
    """`read`: a bound method or a partial of one, which a worker that is not forked can be sent."""

    def __init__(self, read: Callable[[], Iterator[Batch]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Batch]:
        return self._read()


def _served(read: Callable[[], Iterator[Batch]], workers: int) -> Iterator[Batch]:
    if not workers:
        yield from read()
        return
    generator = torch.Generator().manual_seed(0)  # a loader must not draw from the global random numbers
    try:
        yield from DataLoader(_Stream(read), batch_size=None, num_workers=1, generator=generator)
    except LoadError as error:
        raise from_worker(error) from None


def _batch(pairs: Sequence[tuple[Tensor, int]]) -> Batch:
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)

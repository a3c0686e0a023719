"""Data by the names that users type: `digits`, `fashion-mnist[:DIR]`, a folder, `none`, and what timm reads:
`torch/cifar10[:DIR]`, `wds/NAME:DIR`, `hfds/NAME`.

The test part and the held-out part are fixed by `SPLIT_SEED`, not by the run's seed: a dense model that was
trained by one run never meets, in another, images it was trained on.
"""

from __future__ import annotations

import gzip
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageDataset, create_dataset, get_img_extensions

from prunus.adapters.pytorch.array_images import ArrayBatches, ArrayImages, ArrayTrainBatches
from prunus.adapters.pytorch.augmentation import Augmentation, plain_transform
from prunus.adapters.pytorch.batches import DataBundle, stratified_split, stratified_subset
from prunus.adapters.pytorch.broken_images import BrokenImages
from prunus.adapters.pytorch.file_images import FileBatches, FileImages, FileTrainBatches, LoaderSettings
from prunus.adapters.pytorch.inputs import ImageFacts, InputSpec
from prunus.adapters.pytorch.shards import ShardBatches, ShardFolder, Shards, ShardTrainBatches
from prunus.core.cost import IntArray
from prunus.core.errors import ConfigError, LoadError, MissingDependencyError

SPLIT_SEED = 0
FASHION_FOLDERS = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path("data/fashion-mnist"),
    Path("data/FashionMNIST/raw"),
)
_FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_NOT_MIRRORED = ("mnist", "svhn", "omniglot", "digits")  # a mirrored character is another, or none
_LARGEST_IN_MEMORY = 64


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a data set is split and served."""

    batch_size: int = 128
    holdout: float = 0.1
    train_limit: int | None = None
    """At most so many images of train, hold-out included, each class with its share."""
    workers: int = 2
    """Processes that decode files; images held in memory need none."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    steps_per_epoch: int | None = None
    """Of a stream that does not say how long it is."""


class DataSource(ABC):
    """A data set that was found and looked at, before a model is built for it."""

    name: str
    class_names: tuple[str, ...]
    """Empty where images have no labels."""
    in_chans: int | None
    """None: as many as the model wants."""
    image: ImageFacts

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def load(self, spec: InputSpec, options: LoadOptions) -> DataBundle:
        """Split and served as the model wants it. Raises LoadError."""


def open_data(name: str, num_classes: int | None = None) -> DataSource | None:
    """Finds the data set of that name; None for `none`. Raises LoadError if there is none, or a broken one.

    `num_classes` is for a stream, of which nobody else knows; ConfigError if it is given or missing wrongly.
    """
    kind, _, folder = name.partition(":")
    if kind.startswith("wds/"):
        return ShardSource(name, Path(folder), num_classes)
    if num_classes is not None:
        raise ConfigError(f"--num-classes is for streams (wds/...); {name} says it itself", key="num_classes")
    if kind == "none":
        return None
    if kind == "digits":
        return _digits()
    if name.startswith("images:"):
        from prunus.adapters.pytorch.unlabelled import UnlabelledImages  # is a DataSource itself

        return UnlabelledImages(Path(folder))
    if kind == "fashion-mnist":
        return _fashion_mnist(Path(folder) if folder else None)
    if Path(name).is_dir():
        return _folder(Path(name))
    if "/" in kind and kind.split("/")[0] in ("torch", "hfds", "hfids", "tfds"):
        return _timm_dataset(kind, folder)
    raise LoadError(
        f"no data at {name!r}; give digits, fashion-mnist[:DIR], torch/NAME[:DIR], wds/NAME:DIR, hfds/NAME, "
        "a folder with train/ and val/, images:DIR without labels, or none"
    )


def load_data(source: DataSource, spec: InputSpec, options: LoadOptions | None = None) -> DataBundle:
    """The bundle of `source` for a model that wants `spec`. Raises LoadError, ConfigError."""
    options = options or LoadOptions()
    if options.steps_per_epoch is not None and not isinstance(source, ShardSource):
        raise ConfigError(
            f"--steps-per-epoch is for streams (wds/...); the images of {source.name} are counted",
            key="steps_per_epoch",
        )
    return source.load(spec, options)


class ArraySource(DataSource):
    """Small images in memory."""

    in_chans: int

    def __init__(self, name: str, train: ArrayImages, test: ArrayImages, class_names: Sequence[str]) -> None:
        self.name, self.train, self.test = name, train, test
        self.class_names = tuple(class_names)
        self.in_chans = int(train.images.shape[1])
        for part, images in (("train", train), ("test", test)):
            _refuse_bad_labels(images.labels.numpy(), self.classes, f"{name} ({part})")
        pixels = train.images[:10000].float() / 255
        height, width = train.images.shape[2:]
        self.image = ImageFacts((height, width), round(float(pixels.mean()), 4), round(float(pixels.std()), 4))

    def load(self, spec: InputSpec, options: LoadOptions) -> DataBundle:
        fitting, held, order = _split(self.train.labels.numpy(), self.name, options)
        train = self.train.select(fitting).fitted(spec)
        aside = self.train.select(held).fitted(spec)
        test = self.test.fitted(spec)
        flip = not any(word in self.name for word in _NOT_MIRRORED) or "fashion" in self.name
        shift = max(1, round(min(spec.size[1:]) / 14))
        size = options.batch_size
        return DataBundle(
            train=ArrayTrainBatches(train, spec, size, flip, shift, options.augmentation),
            holdout=ArrayBatches(aside, np.arange(len(held)), spec, size),
            calibration=ArrayBatches(train, order, spec, size),
            test=ArrayBatches(test, np.arange(len(test.labels)), spec, size),
            classes=self.classes,
            class_names=self.class_names,
            in_chans=self.in_chans,
        )


class FileSource(DataSource):
    """Images that are decoded when they are needed."""

    in_chans = 3
    image = ImageFacts()

    def __init__(self, name: str, train: Any, test: Any, class_names: Sequence[str]) -> None:
        self.name, self.train, self.test = name, train, test
        self.class_names = tuple(class_names)
        self._labels = _labels_of(train, name)
        _refuse_bad_labels(self._labels, self.classes, f"{name} (train)")

    def load(self, spec: InputSpec, options: LoadOptions) -> DataBundle:
        fitting, held, order = _split(self._labels, self.name, options)
        settings = LoaderSettings(options.batch_size, options.workers)
        plain = FileImages(self.train, spec, training=None)
        test = FileImages(self.test, spec, training=None)
        train = FileImages(self.train, spec, options.augmentation)
        broken = BrokenImages()
        return DataBundle(
            train=FileTrainBatches(train, fitting, settings, broken),
            holdout=FileBatches(plain, held, settings, broken),
            calibration=FileBatches(plain, fitting[order], settings, broken),
            test=FileBatches(test, np.arange(len(test)), settings, broken),
            classes=self.classes,
            class_names=self.class_names,
            in_chans=self.in_chans,
            broken=broken,
        )


class ShardSource(DataSource):
    """A stream of images in tar files."""

    in_chans = 3
    image = ImageFacts()

    def __init__(self, name: str, folder: Path, num_classes: int | None) -> None:
        if ":" not in name or not folder.is_dir():
            what = f"no folder {str(folder)!r}" if ":" in name else f"{name} names no folder"
            raise LoadError(f"{what}; give the folder of the shards: wds/NAME:DIR")
        if num_classes is None:
            raise ConfigError(
                f"how many classes {name} has cannot be looked up in a stream; pass --num-classes",
                key="num_classes",
            )
        self.name, self.class_names = name, tuple(str(i) for i in range(num_classes))
        self._folder = ShardFolder(folder, num_classes)

    def load(self, spec: InputSpec, options: LoadOptions) -> DataBundle:
        if options.train_limit is not None:
            raise ConfigError(
                f"{self.name} is a stream: --steps-per-epoch limits it, not --train-limit", key="train_limit"
            )
        train, held = (shards.suiting(spec) for shards in self._folder.parts(options.holdout))
        size, workers, plain = options.batch_size, options.workers, plain_transform(spec)
        told = self._folder.announced(train)
        steps = options.steps_per_epoch or (told or 0) // size
        if not steps:
            raise ConfigError(
                f"{self.name} does not say how many images it has; pass --steps-per-epoch"
                if told is None
                else f"{self.name} has {told} training images, fewer than one batch of {size}; "
                "pass a smaller --batch-size",
                key="steps_per_epoch" if told is None else "batch_size",
            )

        def in_order(shards: Shards) -> ShardBatches:
            count = self._folder.announced(shards) or shards.count()
            if not count:
                raise LoadError(f"{self.name}: no image in {', '.join(shards.files)}")
            return ShardBatches(shards, np.arange(count), plain, size, workers)

        calibration = np.arange(steps * size), plain, size, workers, (SPLIT_SEED, steps * size)
        return DataBundle(
            train=ShardTrainBatches(train, steps, options.augmentation.transform(spec), size, workers),
            holdout=in_order(held),
            calibration=ShardBatches(train, *calibration),
            test=in_order(self._folder.test.suiting(spec)),
            classes=self.classes,
            class_names=self.class_names,
            in_chans=self.in_chans,
        )


def _split(labels: IntArray, name: str, options: LoadOptions) -> tuple[IntArray, IntArray, IntArray]:
    """(training indices, held-out indices, order of the training indices for calibration)."""
    if not 0 < options.holdout < 1:
        raise LoadError(f"the held-out share must lie between 0 and 1, got {options.holdout}")
    chosen = np.arange(len(labels))
    if options.train_limit is not None:
        chosen = stratified_subset(labels, options.train_limit, SPLIT_SEED)
    rest, held = stratified_split(labels[chosen], options.holdout, SPLIT_SEED)
    if options.batch_size < 1 or len(rest) < options.batch_size:
        raise LoadError(
            f"{name}: the training part has {len(rest)} images, fewer than one batch of {options.batch_size}; "
            "pass a smaller --batch-size"
        )
    return chosen[rest], chosen[held], np.random.default_rng(SPLIT_SEED).permutation(len(rest))


def _refuse_bad_labels(labels: IntArray, classes: int, what: str) -> None:
    if not len(labels):
        raise LoadError(f"{what} holds no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise LoadError(f"{what}: labels must lie in 0..{classes - 1}, got {low}..{high}")
    if classes < 2:
        raise LoadError(f"{what} has {classes} class; at least 2 are needed")
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing):
        raise LoadError(f"{what} has no image of class {int(missing[0])} ({len(missing)} such classes)")


def _digits() -> DataSource:
    from sklearn.datasets import load_digits  # a second of import that only this data set needs

    found = load_digits()
    pixels = torch.from_numpy(np.round(found.images * (255 / 16)).astype(np.uint8))[:, None]
    data = ArrayImages(pixels, torch.from_numpy(found.target.astype(np.int64)))
    train, test = stratified_split(found.target, 0.2, SPLIT_SEED)
    return ArraySource("digits", data.select(train), data.select(test), [str(i) for i in range(10)])


def _fashion_mnist(folder: Path | None) -> DataSource:
    places = (folder,) if folder is not None else FASHION_FOLDERS
    place = next((p for p in places if any(p.glob("train-images-idx3-ubyte*"))), None)
    if place is None:
        raise LoadError(
            f"no Fashion-MNIST in {', '.join(map(str, places))}; install the package dataset-fashion-mnist "
            "(Debian, Ubuntu) or give the folder of the four idx files: fashion-mnist:DIR"
        )
    parts = [
        ArrayImages(
            torch.from_numpy(_idx(place, f"{part}-images-idx3-ubyte"))[:, None],
            torch.from_numpy(_idx(place, f"{part}-labels-idx1-ubyte").astype(np.int64)),
        )
        for part in ("train", "t10k")
    ]
    return ArraySource("fashion-mnist", parts[0], parts[1], _FASHION_CLASSES)


def _idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, compressed or not: magic 0 0 8 ndim, then big-endian sizes, then data."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise LoadError(f"{folder} has no {name} (nor {name}.gz)")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dimensions = content[3]
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, struct.error) as error:
        raise LoadError(f"{path} is damaged: {error}") from None


def _folder(root: Path) -> DataSource:
    train = root / "train"
    test = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise LoadError(
            f"{root} must hold the folders train/ and val/, each with one folder per class; "
            f"images without labels are given as images:{root}"
        )
    names = {part: _class_folders(part) for part in (train, test)}
    if names[train] != names[test]:
        odd = sorted(set(names[train]) ^ set(names[test]))
        raise LoadError(
            f"{train} has {len(names[train])} classes and {test} has {len(names[test])}: "
            f"{', '.join(odd[:5])} {'is' if len(odd) == 1 else 'are'} in one of them only"
        )
    mapping = {name: i for i, name in enumerate(names[train])}
    endings = sorted(get_img_extensions())
    datasets = []
    for part in (train, test):
        for name in names[part]:
            if not any(entry.suffix.lower() in endings for entry in (part / name).rglob("*")):
                raise LoadError(f"{part / name} holds no images; every class needs some ({', '.join(endings)})")
        try:
            datasets.append(ImageDataset(str(part), class_map=mapping))
        except (RuntimeError, AssertionError, OSError) as error:
            raise LoadError(f"{part} holds no readable images: {error}") from None
    return FileSource(str(root), datasets[0], datasets[1], names[train])


def _class_folders(part: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and entry.name[0] != "."))


def _timm_dataset(name: str, folder: str) -> DataSource:
    hugging_face = name.startswith("hfds/")
    if hugging_face and find_spec("datasets") is None:
        raise MissingDependencyError("--data hfds/...", "pip install 'prunus[hfds]'")
    local = name.removeprefix("hfds/")
    if hugging_face and local.startswith((".", "/", "~")) and not Path(local).is_dir():
        raise LoadError(f"no folder {local!r}; give hfds/FOLDER, or hfds/NAME of a data set on the hub")
    root = folder or (None if hugging_face else "data")
    train = _of_timm(name, root, ("train",))
    test = _of_timm(name, root, ("validation", "test") if hugging_face else ("validation",))
    parts = [train, test]
    if not hasattr(train, "__getitem__") or not hasattr(train, "__len__"):
        raise LoadError(
            f"{name} is a stream of which no part can be held out; use wds/NAME:DIR, or hfds/NAME, whose images "
            "are counted"
        )
    labels = _labels_of(train, name)
    mapping = getattr(getattr(train, "reader", None), "class_to_idx", None) or {}
    classes = getattr(train, "classes", None) or sorted(mapping, key=lambda known: mapping[known])
    classes = classes or [str(i) for i in range(int(labels.max()) + 1)]
    arrays = [_as_array(part, name) for part in parts]
    if arrays[0] is not None and arrays[1] is not None:
        return ArraySource(name, arrays[0], arrays[1], [str(c) for c in classes])
    return FileSource(name, train, test, [str(c) for c in classes])


def _of_timm(name: str, root: str | None, splits: Sequence[str]) -> Any:
    """The first of `splits` that there is."""
    reasons = []
    for split in splits:
        try:
            return create_dataset(name, root=root, split=split, download=False)
        except Exception as error:  # every reader fails in a way of its own
            reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0][:300])
    place = f" from {root}" if root is not None else ""
    raise LoadError(f"data set {name} ({' or '.join(splits)}) cannot be read{place}: {reasons[0]}")


def _as_array(dataset: Any, name: str) -> ArrayImages | None:
    """torchvision's small data sets keep their images in memory: (N, H, W), (N, H, W, C) or (N, C, H, W)."""
    data = getattr(dataset, "data", None)
    if not isinstance(data, np.ndarray | torch.Tensor) or data.ndim not in (3, 4):
        return None
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8:
        return None
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    if max(images.shape[2:]) > _LARGEST_IN_MEMORY:
        return None
    return ArrayImages(images, torch.from_numpy(_labels_of(dataset, name)))


def _labels_of(dataset: Any, name: str) -> IntArray:
    """The label of every image, without decoding images where the data set knows them."""
    reader = getattr(dataset, "reader", None)
    samples = getattr(reader, "samples", None) or getattr(dataset, "samples", None)
    if samples is not None and len(samples[0]) == 2:
        return np.array([label for _, label in samples], dtype=np.int64)
    if reader is not None and hasattr(reader, "iter_targets"):
        return np.fromiter(reader.iter_targets(), dtype=np.int64)
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return np.asarray(labels, dtype=np.int64)
    try:
        return np.array([dataset[i][1] for i in range(len(dataset))], dtype=np.int64)
    except (TypeError, ValueError, OSError) as error:
        raise LoadError(f"the labels of {name} cannot be read: {error}") from None

"""A user's own model and data set, objects without a name, in the shape that runs want."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunus.adapters.pytorch.batches import DataBundle, stratified_split
from prunus.adapters.pytorch.file_images import FileBatches, FileTrainBatches, LoaderSettings, Sample
from prunus.adapters.pytorch.inputs import InputSpec
from prunus.adapters.pytorch.random_state import seeded
from prunus.core.cost import IntArray
from prunus.core.errors import ConfigError, LoadError

GIVEN = "given"
"""What the setting `data` says of data sets that have no name."""
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class GivenInputs(InputSpec):
    """Inputs that the user gave as an example; nothing is known of their normalisation."""

    args: tuple[Any, ...] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> GivenInputs:
        """Its size is that of the first tensor's samples, as far as it has (channels, height, width)."""
        first = cls((1, 1, 1), mean=(), std=(), args=args).images
        channels, height, width = (*(tuple(first.shape[1:]) if first is not None else ()), 1, 1, 1)[:3]
        return cls((channels, height, width), mean=(), std=(), args=args)

    @property
    def images(self) -> Tensor | None:
        """The first tensor, which images of a data set stand for."""
        return next((x for x in self.args if isinstance(x, Tensor)), None)

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
        """The given inputs; with another seed, noise of their shape and spread. The batch is as given."""
        if seed == 0:
            return self.args
        generator = torch.Generator().manual_seed(seed)

        def noise(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            scale = value.std() if value.numel() > 1 else value.abs().max()
            return torch.randn(value.shape, generator=generator).to(value) * scale + value.mean()

        return tuple(noise(value) for value in self.args)


class SeededSamples(Dataset[Sample]):
    """A user's data set, whose own random augmentation depends on the ticket (index, seed) alone."""

    def __init__(self, data: Dataset[Any], like: Tensor | None) -> None:
        """`like`: a batch of what the model takes, where that is known."""
        self._data, self._like = data, like

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __getitem__(self, ticket: tuple[int, int]) -> Sample:
        """Raises LoadError, naming the sample, for what is no finite image tensor with a class number."""
        index, seed = ticket
        with seeded(seed):
            sample = self._data[index]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            raise LoadError(
                f"sample {index} of the data set is {_kind(sample)}, not a pair of image and label; "
                "wrap it in a data set that returns the two"
            )
        image, label = sample[:2]
        try:
            return self._image(image, index), int(label), ""
        except (TypeError, ValueError, RuntimeError):
            raise LoadError(
                f"sample {index} of the data set has the label {label!r:.80}, no class number"
            ) from None

    def _image(self, image: Any, index: int) -> Tensor:
        if not isinstance(image, Tensor):
            raise LoadError(
                f"sample {index} of the data set is a {type(image).__name__}, not an image tensor; "
                "add a transform such as torchvision's ToTensor"
            )
        if image.is_floating_point() and not bool(torch.isfinite(image).all()):
            raise LoadError(f"sample {index} of the data set holds NaN or infinity; repair it or leave it out")
        like = self._like
        if like is None:
            return image
        if image.dim() != like.dim() - 1 or (image.dim() == 3 and len(image) != like.shape[1]):
            raise LoadError(
                f"sample {index} of the data set has shape {tuple(image.shape)}, those of example_inputs have "
                f"{tuple(like.shape[1:])}"
            )
        if image.is_floating_point() != like.is_floating_point():
            raise LoadError(
                f"sample {index} of the data set is {image.dtype}, example_inputs are {like.dtype}; "
                "add a transform such as torchvision's ToTensor"
            )
        return image.to(like.dtype)


def _kind(sample: Any) -> str:
    return f"a {type(sample).__name__}" + (f" of {len(sample)}" if isinstance(sample, tuple | list) else "")


def bundle_of(
    train: Any,
    test: Any,
    *,
    like: Tensor | None = None,
    holdout: float = 0.1,
    batch_size: int | None = None,
    workers: int | None = None,
) -> DataBundle:
    """The bundle of two data sets of (image tensor, label), or of the loaders that serve them.

    A loader's data set, batch size and number of workers are used; order and hold-out are the run's own.
    Images come as the data set gives them: its augmentation, if it has any, applies in evaluation, too,
    so give data sets without it where accuracy must be exact. `test` may be None: then the held-out part
    stands for it. `like`: a batch of what the model takes. Raises LoadError if images are not of its kind,
    labels are missing or a class has one image only.
    """
    size = batch_size or getattr(train, "batch_size", None) or 64
    settings = LoaderSettings(size, workers if workers is not None else getattr(train, "num_workers", 0))
    samples = SeededSamples(_dataset(train), like)
    labels = _labels(_dataset(train), samples)
    rest, held = stratified_split(labels, holdout, _SPLIT_SEED)
    if len(rest) < size:
        raise LoadError(f"the training part has {len(rest)} images, fewer than one batch of {size}")
    order = np.random.default_rng(_SPLIT_SEED).permutation(rest)
    held_out = FileBatches(samples, held, settings)
    tests = held_out
    if test is not None:
        tested = SeededSamples(_dataset(test, "test_data"), like)
        tests = FileBatches(tested, np.arange(len(tested)), settings)
    classes = int(labels.max()) + 1
    return DataBundle(
        train=FileTrainBatches(samples, rest, settings),
        holdout=held_out,
        calibration=FileBatches(samples, order, settings),
        test=tests,
        classes=classes,
        class_names=tuple(str(i) for i in range(classes)),
        in_chans=int(samples[0, 0][0].shape[0]),
    )


def holdout_of(
    data: Any, classes: int, *, like: Tensor | None, batch_size: int, workers: int | None = None
) -> FileBatches:
    """A held-out part of the user's own. Raises LoadError unless it has images of each class, and no others.

    A method that judges by it would give up a class that it never sees, and nobody would be told.
    """
    samples = SeededSamples(_dataset(data, "holdout_data"), like)
    labels = _labels(_dataset(data, "holdout_data"), samples, "holdout_data")
    if labels.max() >= classes:
        raise LoadError(f"holdout_data has a class {labels.max()}, train_data has the classes 0..{classes - 1}")
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing):
        raise LoadError(
            f"holdout_data has no image of class {missing[0]} ({len(missing)} such classes): what pruning does to "
            "it would not be seen. Add some, or leave holdout_data out, then a share of every class is held out"
        )
    settings = LoaderSettings(batch_size, workers if workers is not None else getattr(data, "num_workers", 0))
    return FileBatches(samples, np.arange(len(samples)), settings)


def _dataset(data: Any, what: str = "train_data") -> Any:
    found = data.dataset if isinstance(data, DataLoader) else data
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise ConfigError(
            f"{what} must be a data set with __getitem__ and __len__, or its DataLoader, got {type(data).__name__}"
        )
    return found


def _labels(data: Any, samples: SeededSamples, what: str = "train_data") -> IntArray:
    if not len(samples):
        raise LoadError(f"{what} is empty")
    known = getattr(data, "targets", None) if getattr(data, "target_transform", None) is None else None
    first = samples[0, 0][1]  # whatever is wrong with all samples is said before anything else
    values = known if known is not None else [first, *(samples[i, 0][1] for i in range(1, len(samples)))]
    labels = np.asarray(values, dtype=np.int64)
    if labels.ndim != 1 or len(labels) != len(samples) or labels.min(initial=0) < 0:
        raise LoadError(f"{what} needs one label of at least 0 for every image")
    return labels

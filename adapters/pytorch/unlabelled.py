"""Photographs without labels: enough to calibrate by, nothing to train or judge by."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from timm.data import get_img_extensions

from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.broken_images import BrokenImages
from prunus.adapters.pytorch.datasets import SPLIT_SEED, DataSource, LoadOptions
from prunus.adapters.pytorch.file_images import FileBatches, FileImages, FileTrainBatches, LoaderSettings
from prunus.adapters.pytorch.inputs import ImageFacts, InputSpec
from prunus.core.errors import LoadError

_NO_LABEL = -1


class UnlabelledImages(DataSource):
    """All images below a folder, whatever its sub-folders are called."""

    image = ImageFacts()

    def __init__(self, root: Path) -> None:
        """Raises LoadError if there is no such folder, or no image in it."""
        self.name, self.class_names, self.in_chans = f"images:{root}", (), None
        if not root.name or not root.is_dir():
            raise LoadError(f"no folder {str(root)!r}; give the folder of the images: images:DIR")
        endings = tuple(sorted(get_img_extensions()))
        found = (Path(place) / name for place, _, names in os.walk(root) for name in names)
        self._paths = sorted(path for path in found if path.suffix.lower() in endings and path.name[0] != ".")
        if not self._paths:
            raise LoadError(f"{root} holds no images ({', '.join(endings)})")
        self._root = root

    def load(self, spec: InputSpec, options: LoadOptions) -> DataBundle:
        """All parts are the same images, in one random order: without labels only calibration is asked for."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self._paths))[: options.train_limit]
        settings, broken = LoaderSettings(options.batch_size, options.workers), BrokenImages()
        images = FileImages(_Files(self._root, self._paths), spec, training=None)
        plain = FileBatches(images, order, settings, broken)
        return DataBundle(
            train=FileTrainBatches(images, order, settings, broken),
            holdout=plain,
            calibration=plain,
            test=plain,
            classes=0,
            class_names=(),
            in_chans=spec.size[0],
            broken=broken,
        )


class _Files:
    """The files as timm's readers give them: (something that Pillow opens, label)."""

    def __init__(self, root: Path, paths: list[Path]) -> None:
        self.samples = [(str(path.relative_to(root)), _NO_LABEL) for path in paths]
        self._root = root

    @property
    def reader(self) -> _Files:
        return self

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        name, label = self.samples[index]
        return self._root / name, label

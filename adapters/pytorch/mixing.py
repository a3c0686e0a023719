"""Mixed images and soft labels of training batches, by timm's code: mixup, cutmix, label smoothing."""

from __future__ import annotations

from dataclasses import dataclass

from timm.data.mixup import Mixup, mixup_target

from prunus.adapters.pytorch.batches import Batch
from prunus.adapters.pytorch.random_state import seeded
from prunus.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Mixing:
    """What is done to every training batch, and to nothing that is measured or judged by."""

    mixup: float = 0.0
    """alpha of the Beta distribution that images are blended with (Zhang et al. 2018); 0: they are not."""
    cutmix: float = 0.0
    """The same for pasting a part of another image (Yun et al. 2019). With both, each batch has one, by a coin."""
    smoothing: float = 0.0
    """Share of each label that is spread over all classes (Szegedy et al. 2016)."""
    classes: int = 0
    """Length of the model's answer."""

    def check(self, batch_size: int, processes: int) -> None:
        """Raises ConfigError if a share of a batch does not fall into pairs."""
        if (self.mixup or self.cutmix) and batch_size % (2 * processes):
            raise ConfigError(
                f"--mixup and --cutmix mix images in pairs: --batch-size must be a multiple of {2 * processes} "
                f"for {processes} process{'es' if processes > 1 else ''}, got {batch_size}",
                key="batch_size",
            )

    def apply(self, batch: Batch, seed: int) -> Batch:
        """(images, labels (batch, classes)), or `batch` itself where nothing is wanted. Images may be overwritten.

        Image i is mixed with image -1 - i of the batch, all in the same proportion, which `seed` decides: shares
        of a batch that hold whole pairs are mixed like the whole.
        """
        images, labels = batch
        if self.mixup or self.cutmix:
            mix = Mixup(self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=self.classes)
            with seeded(seed):
                return mix(images, labels)
        if self.smoothing:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        return batch

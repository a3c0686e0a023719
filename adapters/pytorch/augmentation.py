"""Augmentation of training images beyond crops and mirrors, by timm's code: --aa and --reprob."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from prunus.adapters.pytorch.inputs import InputSpec
from prunus.core.errors import ConfigError

Transform = Callable[[Image.Image], Tensor]
"""A PIL image, to (channels, height, width), normalised. Random numbers come from the global generators."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to training images, and to no others."""

    aa: str | None = None
    """A policy in timm's notation: rand-m9-n2-mstd0.5, augmix-m5-w4-d2, original, ..."""
    reprob: float = 0.0
    """Probability that a part of an image is replaced by noise (random erasing)."""

    def __bool__(self) -> bool:
        return self.aa is not None or self.reprob > 0

    def transform(self, spec: InputSpec, **more: Any) -> Transform:
        """timm's for training, with `more` of its arguments. Raises ConfigError if it knows no such policy."""
        try:
            return create_transform(
                spec.size,
                is_training=True,
                mean=spec.mean,
                std=spec.std,
                interpolation=spec.interpolation,
                auto_augment=self.aa,
                re_prob=self.reprob,
                re_mode="pixel",  # as timm's train.py does by default
                **more,
            )
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                f"--aa {self.aa!r} is no augmentation policy of timm ({error}); it knows rand-m9-n2-mstd0.5 "
                "(RandAugment), augmix-m5-w4-d2, original, v0, 3a, ...",
                key="aa",
            ) from None

    def in_place(self, spec: InputSpec) -> Transform:
        """For images that are cropped and mirrored already, and have the size of `spec`."""
        side = spec.size[2] / spec.size[1]
        return self.transform(spec, scale=(1.0, 1.0), ratio=(side, side), hflip=0.0, color_jitter=None)


def plain_transform(spec: InputSpec) -> Transform:
    """timm's transform for evaluation."""
    return create_transform(
        spec.size,
        is_training=False,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop,
    )


def pil_mode(spec: InputSpec) -> str:
    """What images are converted to before they are transformed."""
    return "L" if spec.size[0] == 1 else "RGB"

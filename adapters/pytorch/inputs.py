"""What a model expects at its input, as plain data that a run can store and read back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

InputKind = Literal["image", "images", "pair", "video"]
"""`image`: a batch of images; `images`: a list of images (detection); `pair`: two batches (optical flow);
`video`: a batch of clips."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of a data set's images before a model is built for them."""

    size: tuple[int, int] | None = None
    """Height and width if all images share them and they are small, else None: then the model decides."""
    mean: float | None = None
    """Mean of all pixels on the scale 0..1, of a small data set held in memory."""
    std: float | None = None


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape and normalisation: images on the scale 0..1 enter as (image - mean) / std."""

    size: tuple[int, int, int]
    """(channels, height, width) of one image."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop: float = 0.875
    """Share of the resized image that the evaluation's centre crop keeps."""
    kind: InputKind = "image"
    frames: int = 16
    """Frames of a clip; of use to `video` alone."""

    def with_channels(self, channels: int) -> InputSpec:
        """The same input for another number of channels: means and deviations are averaged, then repeated."""
        if channels == self.size[0]:
            return self
        return replace(
            self,
            size=(channels, *self.size[1:]),
            mean=_spread(self.mean, channels),
            std=_spread(self.std, channels),
        )

    def example(self, batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
        """Random arguments for the model's forward: `batch` normalised images of noise, the same each time."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if self.kind == "images":
            return ([torch.rand(*self.size, generator=generator) for _ in range(batch)],)
        if self.kind == "pair":
            return noise(batch, *self.size).clamp(-1, 1), noise(batch, *self.size).clamp(-1, 1)
        if self.kind == "video":
            return (noise(batch, self.size[0], self.frames, *self.size[1:]),)
        return (noise(batch, *self.size),)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> InputSpec:
        """What `to_json` gave, after a trip through JSON (where tuples become lists)."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**plain)


def _spread(values: Iterable[float], channels: int) -> tuple[float, ...]:
    given = tuple(values)
    return (sum(given) / len(given),) * channels

"""Small networks for small images, by name: `prunus/resnet20`, `prunus/resnet14_s2`, `prunus/vgg11_bn_small`.

The ResNets are those of He et al. 2016 (section 4.2) for CIFAR: a 3x3 stem, three stages of widths 16-32-64,
depth 6n + 2; the shortcut of a stage's first block is a 1x1 convolution with batch norm. `_s2` gives the
stem a stride of 2, the cheapest way to save time on small images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and what goes round them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3)
        self.shortcut = (
            nn.Identity() if inputs == outputs and stride == 1 else ConvNorm(inputs, outputs, 1, stride)
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(x)))
        return self.act(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network for small images: (batch, in_chans, H, W) -> (batch, num_classes)."""

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        stem_stride: int = 1,
        widths: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(ConvNorm(in_chans, widths[0], 3, stem_stride), nn.ReLU(inplace=True))
        stages, inputs = [], widths[0]
        for number, width in enumerate(widths):
            first = ResidualBlock(inputs, width, stride=1 if number == 0 else 2)
            stages.append(nn.Sequential(first, *(ResidualBlock(width, width, 1) for _ in range(blocks - 1))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


class SmallVgg(nn.Module):
    """VGG-11 with batch norm at half the widths (Simonyan and Zisserman 2015, configuration A), four poolings.

    The last map, pooled to 2x2, is flattened into a hidden linear layer, as in the original.
    """

    LAYOUT = (32, "pool", 64, "pool", 128, 128, "pool", 256, 256, "pool", 256, 256)

    def __init__(self, num_classes: int = 10, in_chans: int = 3, hidden: int = 256) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        inputs = in_chans
        for step in self.LAYOUT:
            if isinstance(step, int):
                layers += [ConvNorm(inputs, step, 3), nn.ReLU(inplace=True)]
                inputs = step
            else:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))  # a map of 1x1 stays 1x1
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 4, hidden), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(hidden, num_classes)
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnets() -> dict[str, Callable[..., nn.Module]]:
    made: dict[str, Callable[..., nn.Module]] = {}
    for depth in (8, 14, 20, 32, 56):
        made[f"resnet{depth}"] = partial(SmallResNet, (depth - 2) // 6)
        made[f"resnet{depth}_s2"] = partial(SmallResNet, (depth - 2) // 6, stem_stride=2)
    return made


ZOO: dict[str, Callable[..., nn.Module]] = {**_resnets(), "vgg11_bn_small": SmallVgg}
"""name -> factory taking `num_classes`, `in_chans` and the keywords of its class."""

"""One small network for every way in which channels of maps depend on each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def unit(i: int, o: int, k: int = 3, **kw) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Module):
    """A stem, something in the middle, and a classifier."""

    def __init__(self, width: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.stem = unit(3, width)
        self.head = nn.Linear(width if out is None else out, 5)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


class Residual(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b = unit(12, 7), unit(7, 12)

    def middle(self, x):
        return x + self.b(self.a(x))


class Flatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = unit(3, 6), nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(F.max_pool2d(self.conv(x), 2).flatten(1))))


class LinearToMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.out = nn.Linear(10, 6 * 16), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(F.relu(self.conv(self.fc(x).view(1, 6, 4, 4))))


class Grouped(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b = unit(12, 16, groups=4), unit(16, 12)

    def middle(self, x):
        return x + self.b(self.a(x))


class Depthwise(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b = unit(12, 12, groups=12), unit(12, 12, 1)

    def middle(self, x):
        return self.b(self.a(x))


class DepthMultiplier(Net):
    def __init__(self):
        super().__init__(out=24)
        self.a = unit(12, 24, groups=12)

    def middle(self, x):
        return self.a(x)


class TransposedGrouped(Net):
    def __init__(self):
        super().__init__(out=8)
        self.a = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)

    def middle(self, x):
        return F.relu(self.a(x))


class SqueezeExcite(Net):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)

    def middle(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Concatenation(Net):
    def __init__(self):
        super().__init__(out=12 + 5 + 7)
        self.a, self.b = unit(12, 5), unit(17, 7)

    def middle(self, x):
        y = torch.cat([x, self.a(x)], 1)
        return torch.cat([y, self.b(y)], 1)


class Shuffle(Net):
    def __init__(self):
        super().__init__()
        self.a = unit(12, 12)

    def middle(self, x):
        b, c, h, w = x.shape
        return self.a(x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w))


class SplitSizes(Net):
    def __init__(self):
        super().__init__(out=10)
        self.a, self.b = unit(4, 4), unit(8, 6)

    def middle(self, x):
        a, b = torch.split(x, [4, 8], 1)
        return torch.cat([self.a(a), self.b(b)], 1)


class Chunk(Net):
    def __init__(self):
        super().__init__(out=6)
        self.a = unit(12, 12)

    def middle(self, x):
        a, b = self.a(x).chunk(2, 1)
        return a * torch.sigmoid(b)


class SliceFirst(Net):
    def __init__(self):
        super().__init__()
        self.a = unit(5, 5)

    def middle(self, x):
        return torch.cat([self.a(x[:, :5]), x[:, 5:]], 1)


class PixelShuffle(Net):
    def __init__(self):
        super().__init__(out=6)
        self.a, self.b = nn.Conv2d(12, 20, 1), nn.Conv2d(5, 6, 1)

    def middle(self, x):
        return self.b(F.relu(F.pixel_shuffle(self.a(x), 2)))


class SpaceToDepth(Net):
    def __init__(self):
        super().__init__()
        self.a = unit(48, 12)

    def middle(self, x):
        return self.a(F.pixel_unshuffle(x, 2))


class ZeroPaddedShortcut(Net):
    def __init__(self):
        super().__init__(out=20)
        self.a = unit(12, 20)

    def middle(self, x):
        return self.a(x) + F.pad(x, (0, 0, 0, 0, 4, 4))


class SpatialGate(Net):
    def __init__(self):
        super().__init__()
        self.a, self.gate = unit(12, 12), nn.Conv2d(12, 1, 1)

    def middle(self, x):
        return self.a(x) * torch.sigmoid(self.gate(x))


class ChannelMean(Net):
    """CBAM's spatial attention: statistics over channels."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def middle(self, x):
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.gate(pooled))


class EfficientChannelAttention(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.conv = unit(12, 9), unit(9, 12), nn.Conv1d(1, 1, 3, padding=1)

    def middle(self, x):
        y = self.b(self.a(x))
        return y * torch.sigmoid(self.conv(y.mean((2, 3)).unsqueeze(1))).transpose(1, 2).unsqueeze(-1)


class GroupNormed(Net):
    def __init__(self):
        super().__init__()
        self.norm, self.a = nn.GroupNorm(3, 12), unit(12, 12)

    def middle(self, x):
        return self.a(self.norm(x))


class Standardised(Net):
    def __init__(self, conv: type[nn.Module]):
        super().__init__()
        self.a, self.b = conv(12, 9, 3, padding=1), conv(9, 12, 3, padding=1)

    def middle(self, x):
        return self.b(F.relu(self.a(x)))


class LayerScale(Net):
    def __init__(self):
        super().__init__()
        self.a, self.gamma = unit(12, 12), nn.Parameter(torch.rand(12, 1, 1))

    def middle(self, x):
        return x + self.gamma * self.a(x)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(12, 9, 3), FrozenBatchNorm2d(9), nn.Conv2d(9, 12, 3)

    def middle(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


class UsedTwice(Net):
    def __init__(self):
        super().__init__()
        self.a = unit(12, 12)

    def middle(self, x):
        return self.a(F.relu(self.a(x)))


class InputResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = unit(3, 8), nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.head(x + self.b(self.a(x)))


class UnusedBranch(Net):
    def __init__(self):
        super().__init__()
        self.never = nn.Conv2d(12, 12, 3)


class PReLU(Net):
    def __init__(self):
        super().__init__()
        self.act, self.norm = nn.PReLU(12), nn.InstanceNorm2d(12, affine=True, track_running_stats=True)

    def middle(self, x):
        return self.norm(self.act(x))


class WeightNormed(Net):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 9, 3))
        self.b = nn.Conv2d(9, 12, 3)

    def middle(self, x):
        return self.b(F.relu(self.a(x)))


class Maximum(Net):
    def __init__(self):
        super().__init__()
        self.a, self.b = unit(12, 12), unit(12, 12)

    def middle(self, x):
        return torch.max(self.a(x), self.b(x)).clamp(max=2.0)


CONVOLUTIONAL = {
    "weight norm": WeightNormed,
    "the larger of two maps": Maximum,
    "a residual stream": Residual,
    "a flattened map": Flatten,
    "grouped convolution": Grouped,
    "depthwise convolution": Depthwise,
    "a depth multiplier": DepthMultiplier,
    "grouped transposed convolution": TransposedGrouped,
    "squeeze and excite": SqueezeExcite,
    "nested concatenation": Concatenation,
    "channel shuffle": Shuffle,
    "split with sizes": SplitSizes,
    "chunk": Chunk,
    "a slice of channels": SliceFirst,
    "pixel shuffle": PixelShuffle,
    "space to depth": SpaceToDepth,
    "a zero-padded shortcut": ZeroPaddedShortcut,
    "a broadcast spatial gate": SpatialGate,
    "statistics over channels": ChannelMean,
    "group norm": GroupNormed,
    "layer scale": LayerScale,
    "frozen batch norm": Frozen,
    "a module used twice": UsedTwice,
    "a residual onto the input": InputResidual,
    "an unused branch": UnusedBranch,
    "prelu and instance norm": PReLU,
    "efficient channel attention": EfficientChannelAttention,
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_masked_equals_pruned_through(name, certify):
    certify(CONVOLUTIONAL[name](), IMAGE)


@pytest.mark.parametrize("conv", [StdConv2d, ScaledStdConv2d])
def test_masked_equals_pruned_through_weight_standardisation(conv, certify):
    graph = certify(Standardised(conv), IMAGE).graph
    assert not graph.groups["a.weight"].exact


def test_masked_equals_pruned_from_a_linear_layer_to_a_map(certify):
    certify(LinearToMap(), torch.randn(1, 10))


def test_a_convolution_over_channels_locks_them(certify):
    graph = certify(EfficientChannelAttention(), IMAGE).graph
    assert "b.0.weight" not in graph.prunable
    assert "a.0.weight" in graph.prunable


def test_a_stream_that_joins_the_input_is_locked(certify):
    assert list(certify(InputResidual(), IMAGE).graph.prunable) == ["a.0.weight"]


def test_unused_parameters_carry_no_slices(certify):
    assert "never.weight" not in certify(UnusedBranch(), IMAGE).graph.tensors


def test_frozen_parameters_are_traced_like_others(certify):
    model = Residual().requires_grad_(False)
    assert certify(model, IMAGE).graph.fingerprint == certify(Residual(), IMAGE).graph.fingerprint

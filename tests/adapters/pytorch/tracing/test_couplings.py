"""One small network for every way in which channels depend on each other."""

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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mlp, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(F.gelu(self.mlp(self.embed(x))))


class Attention(nn.Module):
    """Fused qkv, heads and head dimensions on one axis; `fused` leaves the scale to the operator."""

    def __init__(self, fused: bool, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.fused = fused
        self.embed, self.norm = nn.Linear(6, 24), norm(24)
        self.qkv, self.proj, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).reshape(b, n, 24)))


class GroupedQueries(nn.Module):
    """Six query heads on `keys` key heads."""

    def __init__(self, keys: int, repeated: bool = False):
        super().__init__()
        self.keys, self.repeated = keys, repeated
        self.embed, self.q = nn.Linear(5, 16), nn.Linear(16, 6 * 4)
        self.k, self.v = nn.Linear(16, keys * 4), nn.Linear(16, keys * 3)
        self.proj = nn.Linear(6 * 3, 5)

    def forward(self, x):
        b, n, _ = x.shape
        x = self.embed(x)
        q, k, v = (y.reshape(b, n, h, -1).transpose(1, 2) for y, h in self.projected(x))
        if self.repeated:
            k, v = (y.repeat_interleave(6 // self.keys, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=not self.repeated)
        return self.proj(y.transpose(1, 2).flatten(2))

    def projected(self, x):
        return (self.q(x), 6), (self.k(x), self.keys), (self.v(x), self.keys)


class NormedMlp(nn.Module):
    def __init__(self, norm: type[nn.Module]):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), norm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


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


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]):
        super().__init__()
        self.a = nn.Linear(4, 7)
        self.cell = cell(7, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.cell(self.a(x))[0])


class Bilinear(nn.Module):
    """An outer product of two streams."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(torch.einsum("bi,bj->bij", self.a(x), self.b(x)).flatten(1))


class RawWeights(nn.Module):
    """Parameters without a module, multiplied by einsum and matmul."""

    def __init__(self):
        super().__init__()
        self.u, self.v, self.w = (nn.Parameter(torch.randn(*s)) for s in ((5, 8), (8, 7), (7, 3)))

    def forward(self, x):
        return torch.einsum("bi,ij->bj", x, self.u).relu() @ self.v @ self.w


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


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_over_channels_make_groups_inexact(norm, certify):
    graph = certify(NormedMlp(norm), torch.randn(2, 6)).graph
    assert not graph.groups["a.weight"].exact


@pytest.mark.parametrize("fused", [True, False])
def test_masked_equals_pruned_through_attention(fused, certify):
    graph = certify(Attention(fused), torch.randn(1, 5, 6)).graph
    units = sorted(g.units for name, g in graph.prunable.items() if name.startswith("qkv"))
    assert units == ([4] if fused else [4, 6])


def test_the_default_scale_of_attention_locks_query_dimensions_and_says_so(certify):
    graph = certify(Attention(True), torch.randn(1, 5, 6)).graph
    reasons = [g.locked for g in graph.groups.values() if g.locked and g.name.startswith("qkv")]
    assert any("scale from the head size" in reason for reason in reasons)


def test_dimensions_that_queries_and_keys_are_compared_over_are_not_gateable_and_heads_are(certify):
    graph = certify(Attention(False), torch.randn(1, 5, 6)).graph
    gateable = {g.units: g.gateable for name, g in graph.prunable.items() if name.startswith("qkv")}
    assert gateable == {4: True, 6: False}


def test_masked_equals_pruned_with_tied_weights(certify):
    graph = certify(Tied(), torch.arange(7).reshape(1, 7)).graph
    assert "out.weight" not in graph.tensors


def test_masked_equals_pruned_from_a_linear_layer_to_a_map(certify):
    certify(LinearToMap(), torch.randn(1, 10))


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_masked_equals_pruned_through_stacked_bidirectional_recurrence(cell, certify):
    graph = certify(Recurrent(cell), torch.randn(1, 5, 4)).graph
    assert sorted(g.units for g in graph.prunable.values()) == [6, 7]


@pytest.mark.parametrize("repeated", [False, True])
def test_masked_equals_pruned_where_query_heads_share_key_heads(repeated, certify):
    graph = certify(GroupedQueries(2, repeated), torch.randn(1, 5, 5)).graph
    units = sorted(g.units for name, g in graph.prunable.items() if not name.startswith("embed"))
    assert units == [2, 3, 4]  # key heads with their query heads, value dimensions, query and key dimensions


def test_query_heads_on_one_key_head_go_one_by_one(certify):
    graph = certify(GroupedQueries(1), torch.randn(1, 5, 5)).graph
    units = sorted(g.units for name, g in graph.prunable.items() if not name.startswith("embed"))
    assert units == [3, 4, 6]


def test_masked_equals_pruned_through_an_outer_product(certify):
    graph = certify(Bilinear(), torch.randn(1, 5)).graph
    assert {g.units for g in graph.prunable.values()} == {4, 6}


def test_masked_equals_pruned_with_raw_parameters(certify):
    graph = certify(RawWeights(), torch.randn(1, 5)).graph
    assert {name: g.units for name, g in graph.prunable.items()} == {"u": 8, "v": 7}
    assert {(s.tensor, s.axis): s.role for s in graph.groups["u"].slices} == {
        ("u", 1): "writes",
        ("v", 0): "reads",
    }


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

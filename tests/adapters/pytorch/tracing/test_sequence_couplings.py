"""One small network for every way in which units depend on each other where there are no maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn


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


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]):
        super().__init__()
        self.a = nn.Linear(4, 7)
        self.cell = cell(7, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.cell(self.a(x))[0])


class Stepwise(nn.Module):
    """A recurrence whose loop is the model's own: the first step makes its states, later ones get them."""

    def __init__(self, cell: type[nn.RNNCellBase], **options):
        super().__init__()
        self.a, self.cell, self.head = nn.Linear(4, 7), cell(7, 6, **options), nn.Linear(6, 3)

    def forward(self, x):
        state = None
        for row in self.a(x).unbind(1):
            state = self.cell(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


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


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_masked_equals_pruned_through_stacked_bidirectional_recurrence(cell, certify):
    graph = certify(Recurrent(cell), torch.randn(1, 5, 4)).graph
    assert sorted(g.units for g in graph.prunable.values()) == [6, 7]


@pytest.mark.parametrize("options", [{}, {"bias": False}])
@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_masked_equals_pruned_through_steps_of_recurrence_and_each_step_costs_its_weights(
    cell, gates, options, certify
):
    graph = certify(Stepwise(cell, **options), torch.randn(1, 5, 4)).graph
    assert sorted(g.units for g in graph.prunable.values()) == [6, 7]
    assert graph.cost().macs == 5 * 4 * 7 + 5 * gates * 6 * (7 + 6) + 6 * 3


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

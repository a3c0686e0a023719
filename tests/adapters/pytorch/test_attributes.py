"""Python attributes follow the tensors: small networks, one for each way that code holds a size."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.adapters.pytorch.attribute_uses import record_uses
from prunus.adapters.pytorch.attributes import Bindings, apply_edits, bind_attributes
from prunus.adapters.pytorch.certification import random_keep
from prunus.adapters.pytorch.size_algebra import Attribute
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import trace_model
from prunus.adapters.pytorch.verification import prepare, state_of, verify
from prunus.core.errors import PlanError
from prunus.core.plan import AttributeEdit


class Heads(nn.Module):
    """Attention whose numbers collide: 4 heads of width 4."""

    def __init__(self, dim: int = 16, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, dim // num_heads, dim
        self.scale = 0.5
        self.stem = nn.Linear(6, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.head(self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, self.attn_dim)))


class SharedKeys(nn.Module):
    """Six query heads on two key heads, their numbers and ratio held as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.ratio = 6, 2, 3
        self.stem, self.q = nn.Linear(6, 16), nn.Linear(16, 24)
        self.k, self.v, self.proj = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        k, v = (
            y.view(batch, tokens, self.num_kv_heads, -1).transpose(1, 2).repeat_interleave(self.ratio, dim=1)
            for y in (self.k(x), self.v(x))
        )
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Split(nn.Module):
    """Split sizes in a tuple, a slice bound, a size from arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (4, 6, 2)
        self.half = 5
        self.wide = nn.Conv2d(3, 12, 1)
        self.a, self.b, self.c = nn.Conv2d(4, 10, 1), nn.Conv2d(6, 10, 1), nn.Conv2d(2, 10, 1)
        self.head = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.wide(x), self.sizes, dim=1)
        x = self.a(a.relu()) + self.b(b.relu()) + self.c(c.relu())
        x = torch.cat([x[:, self.half :], x[:, : self.half].relu()], dim=1)
        return self.head(x.relu())


class Doubled(nn.Module):
    """A size that code derives: 2 * self.width."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 5
        self.up = nn.Conv2d(3, 10, 1)
        self.down = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.up(x), [self.width, 2 * self.width - self.width], dim=1)
        return self.down(a.relu() * b.sigmoid())


class Parts(nn.Module):
    """A size from two attributes and one from a size read at run time, as in selective kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.parts = 12, 2
        self.up = nn.Conv2d(3, 12, 1)
        self.a, self.b = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.up(x).relu(), self.channels // self.parts, 1)
        x = self.a(a) * self.b(b)
        width = x.shape[1]
        x = x.view(x.shape[0], self.parts, width // self.parts, *x.shape[2:]).softmax(dim=1)
        return self.head(x[:, 0])


class Shared(nn.Module):
    """One number for two axes that nothing else ties."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = 6
        self.a, self.b = nn.Linear(4, 12), nn.Linear(4, 12)
        self.out_a, self.out_b = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).reshape(x.shape[0], -1, self.dim).softmax(dim=1).flatten(1)
        b = self.b(x).reshape(x.shape[0], -1, self.dim).softmax(dim=1).flatten(1)
        return self.out_a(a) + self.out_b(b)


class HardCoded(nn.Module):
    """A number in the source that no attribute governs."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 12, 1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.free(x).relu()).relu()
        return self.head(x.unflatten(1, (2, 6)).sum(dim=1))


def _images() -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def _tokens() -> Tensor:
    return torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))


def _vectors() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "heads": (Heads, _tokens),
    "shared keys": (SharedKeys, _tokens),
    "split": (Split, _images),
    "doubled": (Doubled, _images),
    "parts": (Parts, _images),
    "shared": (Shared, _vectors),
    "hard-coded": (HardCoded, _images),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_original_class_computes_the_masked_function(case: str, seed: int) -> None:
    torch.manual_seed(seed)
    build, inputs = CASES[case]
    model = build()
    prepared = prepare(model, inputs())
    assert prepared.graph.prunable
    keep = random_keep(prepared.graph, seed + 10)
    counts = prepared.graph.units | {name: len(units) for name, units in keep.items()}
    pruned = copy.deepcopy(model)
    remove(pruned, prepared.graph, keep, prepared.bindings.edits(prepared.graph.units, counts))
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert verify(pruned, prepared, state_of(model), keep, inputs()).kind == "exact"


def _bindings(model: nn.Module, x: Tensor) -> Bindings:
    return bind_attributes(model, trace_model(model, x), (x[:1],))


def test_equal_numbers_are_told_apart_by_where_they_come_from() -> None:
    values = _bindings(Heads(), _tokens()).values
    heads, width = values["", "num_heads"], values["", "head_dim"]
    assert heads != width
    assert values["", "attn_dim"] == heads * width  # type: ignore[operator]


def test_key_heads_go_with_the_query_heads_that_they_serve() -> None:
    values = _bindings(SharedKeys(), _tokens()).values
    keys = values["", "num_kv_heads"]
    assert values["", "num_heads"] == keys + keys + keys  # type: ignore[operator]
    assert ("", "ratio") not in values
    assert sorted(g.units for g in prepare(SharedKeys(), _tokens()).graph.prunable.values()) == [2, 4, 4, 16]


def test_a_number_that_serves_two_axes_ties_their_counts() -> None:
    model = Shared()
    assert _bindings(model, _vectors()).conflicts
    graph = prepare(model, _vectors()).graph
    (tag,) = graph.equal_counts.values()
    assert len(tag) == 2


def test_what_the_forward_hard_codes_is_locked_with_a_reason_and_nothing_else_is() -> None:
    graph = prepare(HardCoded(), _images()).graph
    assert "free.weight" in graph.prunable
    locked = [group.locked for group in graph.groups.values() if group.locked and "forward" in group.locked]
    assert locked


def test_watching_leaves_no_trace_on_the_model() -> None:
    model = Heads()
    before = {name: type(value) for name, value in vars(model).items()}
    record_uses(model, (_tokens(),), {})
    assert {name: type(value) for name, value in vars(model).items()} == before
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_uses_remember_arithmetic() -> None:
    class Arithmetic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 3

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x, (0, 1)).reshape(4 * self.width // 2, -1)

    (use,) = record_uses(Arithmetic(), (torch.zeros(4, 5),), {})
    assert use.values == (6, -1)
    assert Attribute("", "width") in {use.expressions[0].left.right}  # type: ignore[union-attr]


def test_edits_restore_lists_as_lists() -> None:
    model = nn.Identity()
    model.splits = [[1, 2], 3]
    apply_edits(model, [AttributeEdit(module="", attribute="splits", old=((1, 2), 3), new=((1, 1), 3))])
    assert model.splits == [[1, 1], 3]


def test_edits_of_another_model_are_refused_before_anything_changes() -> None:
    model = nn.Identity()
    model.a, model.b = 1, 2
    good = AttributeEdit(module="", attribute="a", old=1, new=5)
    for bad in (
        AttributeEdit(module="", attribute="b", old=9, new=5),
        AttributeEdit(module="x", attribute="b", old=2, new=5),
    ):
        with pytest.raises(PlanError):
            apply_edits(model, [good, bad])
    assert model.a == 1


def test_a_new_classifier_fits_the_pruned_features() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    x = torch.randn(1, 3, 64, 64)
    prepared = prepare(model, x, certified=False)
    keep = random_keep(prepared.graph, 0)
    counts = prepared.graph.units | {name: len(units) for name, units in keep.items()}
    remove(model, prepared.graph, keep, prepared.bindings.edits(prepared.graph.units, counts))
    model.reset_classifier(5)
    assert model.num_features == model.get_classifier().in_features
    assert model(x).shape == (1, 5)


def test_code_that_insists_on_plain_integers_costs_locks_not_a_crash() -> None:
    class Strict(Heads):
        def forward(self, x: Tensor) -> Tensor:
            assert type(self.num_heads) is int
            return super().forward(x)

    graph = prepare(Strict(), _tokens()).graph
    assert any(group.locked and "forward" in group.locked for group in graph.groups.values())

"""Removal and growth on networks small enough that their channel graph is written by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prunus.adapters.pytorch.sizes import slots_after
from prunus.adapters.pytorch.surgery import grow, reindex, remove, why_not_growable
from prunus.adapters.pytorch.verification import prepare
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.plan import AttributeEdit


class Stack(nn.Module):
    """conv -> norm -> depthwise -> flatten -> linear: every role, and an index that is not a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5 * 4, 7)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.point(torch.relu(self.depthwise(x))))
        return self.head(x.flatten(1))


def _slice(tensor: str, axis: int, role: str, units: int, run: int = 1) -> Slice:
    return Slice(tensor, axis, role, np.repeat(np.arange(units), run))  # type: ignore[arg-type]


def _stack_graph(model: Stack) -> ChannelGraph:
    inner = ChannelGroup(
        "conv.weight",
        6,
        (
            _slice("conv.weight", 0, "writes", 6),
            *(
                _slice(f"norm.{name}", 0, "scales", 6)
                for name in ("weight", "bias", "running_mean", "running_var")
            ),
            _slice("conv.bias", 0, "scales", 6),
            _slice("depthwise.weight", 0, "scales", 6),
            _slice("depthwise.bias", 0, "scales", 6),
            _slice("point.weight", 1, "reads", 6),
        ),
    )
    outer = ChannelGroup(
        "point.weight",
        5,
        (
            _slice("point.weight", 0, "writes", 5),
            _slice("point.bias", 0, "scales", 5),
            _slice("head.weight", 1, "reads", 5, run=4),
        ),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if tensor.dim()}
    return ChannelGraph([inner, outer], [], shapes)


def _masked(model: Stack, graph: ChannelGraph, keep: dict[str, list[int]]) -> Stack:
    masked = copy.deepcopy(model)
    tensors = masked.state_dict()
    for name, units in keep.items():
        for piece in graph.groups[name].with_role("reads"):
            dead = ~np.isin(piece.unit_of, units)
            tensors[piece.tensor].index_fill_(piece.axis, torch.from_numpy(np.flatnonzero(dead)), 0)
    return masked


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keep", [{"conv.weight": [0, 2, 5], "point.weight": [1]}, {"point.weight": [0, 3]}, {}])
def test_gated_where_read_equals_removed(model: Stack, images: Tensor, keep: dict[str, list[int]]) -> None:
    graph = _stack_graph(model)
    expected = _masked(model, graph, keep)(images)
    remove(model, graph, keep)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_layers_know_their_new_sizes(model: Stack) -> None:
    remove(model, _stack_graph(model), {"conv.weight": [0, 2, 5], "point.weight": [1, 4]})
    assert (model.conv.in_channels, model.conv.out_channels) == (3, 3)
    assert model.norm.num_features == 3
    assert (model.depthwise.in_channels, model.depthwise.out_channels, model.depthwise.groups) == (3, 3, 3)
    assert (model.point.in_channels, model.point.out_channels) == (3, 2)
    assert (model.head.in_features, model.head.out_features) == (8, 7)


def test_a_removed_model_survives_deepcopy_and_a_state_dict_round_trip(model: Stack, images: Tensor) -> None:
    fresh = copy.deepcopy(model)
    graph, keep = _stack_graph(model), {"conv.weight": [0, 2, 5], "point.weight": [1, 4]}
    remove(model, graph, keep)
    remove(fresh, graph, keep)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy.deepcopy(model)(images), fresh(images))


def test_removal_in_two_steps_equals_removal_in_one(model: Stack, images: Tensor) -> None:
    other, graph = copy.deepcopy(model), _stack_graph(model)
    remove(model, graph, {"conv.weight": [0, 3, 5], "point.weight": [1, 4]})
    first = {"conv.weight": [0, 2, 3, 5]}
    remove(other, graph, first)
    remove(other, graph.restrict(first), {"conv.weight": [0, 2, 3], "point.weight": [1, 4]})
    assert torch.equal(model(images), other(images))


def test_parameters_keep_their_nature(model: Stack) -> None:
    model.conv.weight.requires_grad_(False)
    model.point.weight.is_special = True
    model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    remove(model, _stack_graph(model), {"conv.weight": [0, 2, 5]})
    assert isinstance(model.conv.weight, nn.Parameter)
    assert not model.conv.weight.requires_grad and model.point.weight.requires_grad
    assert model.conv.weight.dtype == torch.bfloat16
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.point.weight.is_special
    assert "running_mean" in model.norm.state_dict()


def test_tied_parameters_stay_one_object() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 6, bias=False), "b": nn.Linear(4, 6, bias=False)})
    net["b"].weight = net["a"].weight
    reindex(net, {("b.weight", 0): np.array([0, 3])})
    assert net["a"].weight is net["b"].weight
    assert net["a"].out_features == net["b"].out_features == 2


def test_ties_that_disagree_are_refused() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 6, bias=False), "b": nn.Linear(4, 6, bias=False)})
    net["b"].weight = net["a"].weight
    with pytest.raises(PlanError, match="tied"):
        reindex(net, {("a.weight", 0): np.array([0, 3]), ("b.weight", 0): np.array([0, 2])})


def test_a_plan_of_another_model_is_refused_and_changes_nothing(model: Stack) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for wrong in (("nowhere.weight", 0), ("conv.weight", 7), ("point.weight", 0)):
        with pytest.raises(PlanError):
            reindex(model, {("conv.weight", 0): np.array([0]), wrong: np.array([5, 99])})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_edits_that_do_not_fit_are_refused(model: Stack) -> None:
    graph = _stack_graph(model)
    for edit in (
        AttributeEdit(module="nowhere", attribute="dim", old=1, new=2),
        AttributeEdit(module="conv", attribute="out_channels", old=99, new=2),
    ):
        with pytest.raises(PlanError):
            remove(model, graph, {}, [edit])


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_lose_whole_slots(transposed: bool) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 12, 3, groups=4)
    rows = np.array([0, 1, 4, 5]) if transposed else np.array([0, 1, 2, 6, 7, 8])
    columns = np.array([0, 2])
    indices = {("weight", 0): rows, ("bias", 0): np.array([0, 1, 2, 6, 7, 8])}
    if transposed:
        indices = {("weight", 0): rows, ("weight", 1): columns, ("bias", 0): np.array([0, 2, 6, 8])}
    full = copy.deepcopy(layer)
    reindex(layer, indices)
    assert layer.groups == 2
    x = torch.randn(1, 8, 5, 5)
    outputs = indices["bias", 0]
    torch.testing.assert_close(layer(x[:, [0, 1, 4, 5]]), full(x)[:, outputs])


def test_slots_are_counted_through_removal_and_growth() -> None:
    assert slots_after(np.array([0, 2, 3, 5]), 3) == 2
    assert slots_after(np.array([0, 1, 2, 3, 2, 3]), 2) == 3  # the last slot copied
    assert slots_after(np.array([0, 1, 0, 2, 3, 2]), 2) == 2  # a channel of every slot copied
    with pytest.raises(PlanError):
        slots_after(np.array([0, 1, 2]), 2)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(3, 6), nn.PReLU(6), nn.InstanceNorm1d(6, affine=True)],
)
def test_norms_and_scales_follow(norm: nn.Module) -> None:
    indices = {(name, 0): np.array([0, 1, 4, 5]) for name, _ in norm.named_parameters()}
    reindex(norm, indices)
    shape = (2, 3, 4) if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) else (2, 4, 3)
    assert norm(torch.randn(shape)).shape == shape
    assert "6" not in repr(norm)


def test_an_lstm_keeps_running_on_fewer_units() -> None:
    lstm = nn.LSTM(4, 3, batch_first=True, bidirectional=True)
    gates = np.array([0, 2, 3, 5, 6, 8, 9, 11])
    indices = {}
    for name, _ in lstm.named_parameters():
        indices[name, 0] = gates
        if "hh" in name and "weight" in name:
            indices[name, 1] = np.array([0, 2])
    reindex(lstm, indices)
    output, _ = lstm(torch.randn(2, 5, 4))
    assert output.shape == (2, 5, 4)
    assert lstm.hidden_size == 2


def test_layers_whose_weight_is_computed_know_their_new_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 16, 3)),
        parametrizations.weight_norm(nn.Conv2d(16, 16, 3, groups=16)),
        parametrizations.weight_norm(nn.ConvTranspose2d(16, 12, 3)),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    model(torch.randn(1, 3, 8, 8))
    parametrizations.spectral_norm(model[4])
    prepared = prepare(model.train(), torch.randn(1, 3, 8, 8))
    vectors = {name: value.clone() for name, value in model.named_buffers()}
    first, second = prepared.graph.prunable
    keep = {first: np.arange(5), second: np.arange(7)}
    remove(model, prepared.graph, keep, prepared.bindings.edits(prepared.graph.units, {first: 5, second: 7}))
    sizes = [(layer.in_channels, layer.out_channels, layer.groups) for layer in model[:3]]
    assert sizes == [(3, 5, 1), (5, 5, 5), (5, 7, 1)]
    assert (model[4].in_features, model[4].out_features) == (7 * 36, 10)
    assert model[4].training and torch.equal(
        vectors["4.parametrizations.weight.0._u"], dict(model.named_buffers())["4.parametrizations.weight.0._u"]
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_whose_weight_is_computed_by_hooks_know_their_new_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(3, 16, 3)),
        nn.utils.weight_norm(nn.Conv2d(16, 16, 3, groups=16)),
        nn.utils.weight_norm(nn.ConvTranspose2d(16, 12, 3), dim=1),
        nn.Flatten(),
        nn.Linear(12 * 36, 10),
    )
    nn.utils.spectral_norm(model[4])
    prepared = prepare(model.eval(), torch.randn(1, 3, 8, 8))
    first, second = prepared.graph.prunable
    keep = {first: np.arange(5), second: np.arange(7)}
    remove(model, prepared.graph, keep, prepared.bindings.edits(prepared.graph.units, {first: 5, second: 7}))
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    sizes = [(layer.in_channels, layer.out_channels, layer.groups) for layer in model[:3]]
    assert sizes == [(3, 5, 1), (5, 5, 5), (5, 7, 1)]
    assert (model[4].in_features, model[4].out_features) == (7 * 36, 10)


@pytest.mark.parametrize(
    "widths",
    [
        {"conv.weight": 9},
        {"point.weight": 17},
        {"conv.weight": 6, "point.weight": 10},
        {"conv.weight": 13, "point.weight": 6},
    ],
)
def test_growth_keeps_the_function(model: Stack, images: Tensor, widths: dict[str, int]) -> None:
    expected, graph = model(images), _stack_graph(model)
    wider, growth, _ = grow(model, graph, widths, seed=3)
    assert wider.units == {**graph.units, **widths}
    assert all(len(growth.copies[g]) == w - graph.units[g] for g, w in widths.items() if w > graph.units[g])
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_growth_tells_copies_apart_where_they_are_read(model: Stack) -> None:
    _, growth, _ = grow(model, _stack_graph(model), {"conv.weight": 12})
    copied = growth.copies["conv.weight"]
    reading = model.point.weight
    difference = (reading[:, 6:] - reading[:, copied]).abs().mean() / reading.abs().mean()
    assert 1e-3 < float(difference.detach()) < 1e-1


def test_growth_repeats_exactly_with_its_seed(model: Stack) -> None:
    twin, graph = copy.deepcopy(model), _stack_graph(model)
    grow(model, graph, {"conv.weight": 9}, seed=5)
    grow(twin, graph, {"conv.weight": 9}, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_growth_that_would_change_the_function_is_refused() -> None:
    slices = (_slice("weight", 0, "writes", 4),)
    normed = ChannelGraph([ChannelGroup("weight", 4, slices, exact=False)], [], {"weight": (4, 3)})
    with pytest.raises(PlanError, match="multiples of 4"):
        grow(nn.Linear(3, 4, bias=False), normed, {"weight": 6})
    unread = ChannelGraph([ChannelGroup("weight", 4, slices, gateable=False)], [], {"weight": (4, 3)})
    with pytest.raises(PlanError, match="without a weight"):
        grow(nn.Linear(3, 4, bias=False), unread, {"weight": 8})


@pytest.mark.parametrize("name", ["test_resnet", "regnetx_002", "test_vit_relpos"])
def test_growth_keeps_the_function_of_real_models(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 160, 160)
    prepared = prepare(model, x, certified=False)
    graph = prepared.graph
    widths: dict[str, int] = {}
    for group, facts in graph.groups.items():
        for width in (facts.units + 1, 2 * facts.units):
            if facts.locked is None and group not in widths and why_not_growable(graph, group, width) is None:
                widths[group] = width
    assert widths
    with torch.no_grad():
        expected = model(x)
        wider, _, _ = grow(model, graph, widths, edits=prepared.bindings.edits(graph.units, graph.units | widths))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert wider.cost().params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("grows", [False, True])
def test_what_was_computed_of_older_tensors_is_forgotten(grows: bool, model: Stack) -> None:
    model.bias_cache = {"cpu": torch.zeros(6)}
    if grows:
        grow(model, _stack_graph(model), {"conv.weight": 12})
    else:
        remove(model, _stack_graph(model), {"conv.weight": np.arange(3)})
    assert model.bias_cache == {}

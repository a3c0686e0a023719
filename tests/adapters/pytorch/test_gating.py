"""Gates where units are read: equal to removal at 0, free of traces afterwards, with true derivatives."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import pytest
import timm
import torch
from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn

from prunus.adapters.pytorch.gating import Gating, fold
from prunus.adapters.pytorch.surgery import remove
from prunus.adapters.pytorch.tracing import trace_model
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, ChannelGroup, Role, Slice

Model = TypeVar("Model", bound=nn.Module)


def piece(tensor: str, axis: int, role: Role, units: int, run: int = 1) -> Slice:
    return Slice(tensor, axis, role, np.repeat(np.arange(units), run))


def scales(module: str, units: int, tensors: Iterable[str]) -> list[Slice]:
    return [piece(f"{module}.{name}", 0, "scales", units) for name in tensors]


BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def graph_of(model: nn.Module, groups: Iterable[ChannelGroup]) -> ChannelGraph:
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.dim()}
    return ChannelGraph(groups, [], shapes)


class Residual(nn.Module):
    """Batch norms, a residual stream with several readers, a depthwise stage and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x))))))
        x = torch.relu(self.point(self.depthwise(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))

    def graph(self) -> ChannelGraph:
        stream = [piece("stem.weight", 0, "writes", 8), piece("outer.weight", 0, "writes", 8)]
        stream += scales("stem_norm", 8, BATCH_NORM) + scales("outer_norm", 8, BATCH_NORM)
        stream += scales("depthwise", 8, ("weight", "bias"))
        stream += [piece("inner.weight", 1, "reads", 8), piece("point.weight", 1, "reads", 8)]
        inner = [piece("inner.weight", 0, "writes", 6), *scales("inner_norm", 6, BATCH_NORM)]
        inner += [piece("outer.weight", 1, "reads", 6)]
        point = [piece("point.weight", 0, "writes", 10), *scales("point", 10, ["bias"])]
        point += [piece("head.weight", 1, "reads", 10, run=4)]
        return graph_of(
            self,
            [
                ChannelGroup("stem.weight", 8, tuple(stream)),
                ChannelGroup("inner.weight", 6, tuple(inner)),
                ChannelGroup("point.weight", 10, tuple(point)),
            ],
        )


class Normed(nn.Module):
    """One gated width under a norm whose statistics run over it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.write = nn.Linear(4, 8) if kind in ("layer", "rms") else nn.Conv2d(4, 8, 1)
        self.norm = {
            "layer": lambda: nn.LayerNorm(8),
            "rms": lambda: nn.RMSNorm(8),
            "group": lambda: nn.GroupNorm(1, 8),
        }[kind]()
        self.read = nn.Linear(8, 3) if kind in ("layer", "rms") else nn.Conv2d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.tanh(self.norm(self.write(x))))

    def graph(self) -> ChannelGraph:
        slices = [piece("write.weight", 0, "writes", 8), *scales("write", 8, ["bias"])]
        slices += scales("norm", 8, [name for name, _ in self.norm.named_parameters()])
        slices += [piece("read.weight", 1, "reads", 8)]
        return graph_of(self, [ChannelGroup("write.weight", 8, tuple(slices), exact=False)])

    def inputs(self) -> Tensor:
        shape = (5, 4) if self.kind in ("layer", "rms") else (5, 4, 6, 6)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Standardised(nn.Module):
    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.write = nn.Conv2d(4, 8, 1)
        self.read = kind(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.relu(self.write(x)))

    def graph(self) -> ChannelGraph:
        slices = [piece("write.weight", 0, "writes", 8), *scales("write", 8, ["bias"])]
        slices += [piece("read.weight", 1, "reads", 8)]
        return graph_of(self, [ChannelGroup("write.weight", 8, tuple(slices), exact=False)])


def lively(model: Model) -> Model:
    """In double precision, with every parameter and statistic random."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.double().state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5
            tensor.copy_(values.abs() + 0.5 if "running_var" in name else values)
    return model.eval()


def images(count: int = 4, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(
        count, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def hard(graph: ChannelGraph, keep: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: np.isin(np.arange(graph.groups[name].units), units) * 1.0 for name, units in keep.items()}


def soft(graph: ChannelGraph) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.2, 0.9, units) for name, units in graph.units.items()}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("keep", [{"stem.weight": [1, 2, 6], "inner.weight": [0, 5]}, {"point.weight": [3]}])
def test_gated_to_zero_equals_removed_with_batch_norm(keep: dict[str, list[int]]) -> None:
    model = lively(Residual())
    graph = model.graph()
    with Gating(model, graph, hard(graph, keep)):
        expected = model(images())
    remove(model, graph, keep)
    torch.testing.assert_close(model(images()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_gated_to_zero_equals_removed_where_a_norm_runs_over_the_units(kind: str) -> None:
    model = lively(Normed(kind))
    graph, keep = model.graph(), {"write.weight": [0, 3, 4, 7]}
    plain = model(model.inputs())
    with Gating(model, graph, hard(graph, keep)) as gating:
        expected = model(model.inputs())
    assert gating.approximate == ()
    assert torch.equal(model(model.inputs()), plain)
    remove(model, graph, keep)
    torch.testing.assert_close(model(model.inputs()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_gated_to_zero_equals_removed_for_a_weight_standardised_reader(kind: type[nn.Conv2d]) -> None:
    model = lively(Standardised(kind))
    graph, keep = model.graph(), {"write.weight": [0, 3, 4, 7]}
    with Gating(model, graph, hard(graph, keep)):
        expected = model(images(channels=4))
    remove(model, graph, keep)
    torch.testing.assert_close(model(images(channels=4)), expected, rtol=1e-9, atol=1e-9)


def whole_model(name: str) -> tuple[nn.Module, Tensor]:
    """A timm model with random statistics and affine parameters, and images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    for key, tensor in model.state_dict().items():
        if "running_var" in key:
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def random_keep(graph: ChannelGraph) -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    keep = {}
    for name, group in graph.prunable.items():
        if group.gateable and group.equal_count is None:
            count = max(
                group.min_kept, int(group.units * rng.uniform(0.3, 0.9)) // group.multiple_of * group.multiple_of
            )
            keep[name] = np.sort(rng.permutation(group.units)[:count]).tolist()
    return keep


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_byobnet",
        "test_efficientnet_gn",
        "test_convnext2",
        "test_nfnet",
        "test_vit3",
        "convnextv2_atto",
    ],
)
def test_hard_gates_are_the_masked_model_on_whole_networks(name: str) -> None:
    model, x = whole_model(name)
    trace = trace_model(model, x)
    keep = random_keep(trace.graph)
    expected = trace.masked_output(model.state_dict(), keep, x)
    with torch.no_grad(), Gating(model, trace.graph, hard(trace.graph, keep)) as gating:
        found = model(x)
    assert keep and gating.approximate == ()
    assert not torch.allclose(model(x), expected, rtol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_statistics_that_no_gate_reaches_are_named() -> None:
    model, x = whole_model("test_efficientnet_evos")  # EvoNorm: a variance over slots, in plain arithmetic
    graph = trace_model(model, x).graph
    with torch.no_grad(), Gating(model, graph, hard(graph, random_keep(graph))) as gating:
        model(x)
    assert gating.approximate
    assert all(not graph.groups[name].exact for name in gating.approximate)


def test_all_gates_closed_gives_finite_outputs() -> None:
    for model in (lively(Normed("layer")), lively(Normed("group"))):
        with Gating(model, model.graph(), {"write.weight": np.zeros(8)}):
            assert model(model.inputs()).isfinite().all()


def test_a_step_leaves_the_weights_as_they_were_and_scales_their_gradients() -> None:
    model, x = lively(Residual()), images()
    graph, before = model.graph(), copy.deepcopy(model.state_dict())
    gates = soft(graph)
    folded = copy.deepcopy(model)
    fold(folded, graph, gates)
    loss_of(folded, x).backward()
    gating = Gating(model, graph, gates)
    gating.before_forward()
    loss_of(model, x).backward()
    gating.after_backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, axis, group in [("inner.weight", 1, "stem.weight"), ("outer.weight", 1, "inner.weight")]:
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        expected = folded.get_parameter(name).grad * torch.from_numpy(gates[group]).view(shape)
        torch.testing.assert_close(model.get_parameter(name).grad, expected)
    torch.testing.assert_close(model.stem.weight.grad, folded.stem.weight.grad)


def test_weights_are_restored_after_an_error_inside_the_block() -> None:
    model = lively(Normed("layer"))
    graph, before = model.graph(), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError), Gating(model, graph, {"write.weight": np.zeros(8)}):
        model(torch.zeros(2, 99, dtype=torch.float64))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("gated", [False, True], ids=["at-one", "at-soft-gates"])
@pytest.mark.parametrize(
    "model",
    [Residual(), Normed("layer"), Normed("rms"), Normed("group"), Standardised(ScaledStdConv2d)],
    ids=["batch-norm", "layer-norm", "rms-norm", "group-norm", "standardised"],
)
def test_gate_gradients_agree_with_finite_differences(model: nn.Module, gated: bool) -> None:
    lively(model).zero_grad()
    graph = model.graph()  # type: ignore[operator]
    channels = 3 if isinstance(model, Residual) else 4
    x = model.inputs() if isinstance(model, Normed) else images(channels=channels)
    gates = soft(graph) if gated else {name: np.ones(units) for name, units in graph.units.items()}

    def loss_at(values: dict[str, np.ndarray]) -> float:
        with torch.no_grad(), Gating(model, graph, values):
            return float(loss_of(model, x))

    gating = Gating(model, graph, gates, gradients=True)
    gating.before_forward()
    loss_of(model, x).backward()
    found = gating.gate_gradients()
    gating.after_backward()
    for name, units in graph.units.items():
        for unit in range(0, units, 3):
            step = np.zeros(units)
            step[unit] = 1e-5
            rise = loss_at({**gates, name: gates[name] + step}) - loss_at({**gates, name: gates[name] - step})
            assert found[name][unit] == pytest.approx(rise / 2e-5, rel=1e-4, abs=1e-9)


def test_heads_and_head_dimensions_on_one_axis_multiply() -> None:
    read = nn.Linear(6, 2).double()
    slices = {
        "heads": Slice("weight", 1, "reads", np.repeat(np.arange(2), 3)),
        "dims": Slice("weight", 1, "reads", np.tile(np.arange(3), 2)),
    }
    groups = [ChannelGroup("heads", 2, (slices["heads"],)), ChannelGroup("dims", 3, (slices["dims"],))]
    graph = graph_of(read, groups)
    gates = {"heads": np.array([0.5, 2.0]), "dims": np.array([1.0, 0.0, 3.0])}
    x = torch.randn(4, 6, dtype=torch.float64)
    outer = torch.tensor([0.5, 0.0, 1.5, 2.0, 0.0, 6.0], dtype=torch.float64)
    expected = read(x * outer)
    gating = Gating(read, graph, gates, gradients=True)
    with gating:
        torch.testing.assert_close(read(x), expected)
        read(x).sum().backward()
        found = gating.gate_gradients()
    unit = (read.weight.detach().sum(0) * x.sum(0)).view(2, 3)
    np.testing.assert_allclose(found["heads"], (unit * torch.tensor([1.0, 0, 3])).sum(1))
    np.testing.assert_allclose(found["dims"], (unit * torch.tensor([[0.5], [2.0]])).sum(0))


def test_a_tied_reader_is_gated_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    slices = tuple(piece(f"{name}.weight", 1, "reads", 3) for name in "ab")
    graph = graph_of(model, [ChannelGroup("g", 3, slices)])
    before = model["a"].weight.detach().clone()
    with Gating(model, graph, {"g": np.full(3, 0.5)}):
        torch.testing.assert_close(model["b"].weight, before * 0.5)


def test_groups_read_without_a_weight_stay_open_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    slices = (piece("0.weight", 0, "writes", 4), piece("0.bias", 0, "scales", 4), piece("1.weight", 1, "reads", 4))
    graph = graph_of(model, [ChannelGroup("0.weight", 4, slices, gateable=False)])
    x = torch.randn(5, 3)
    with Gating(model, graph, {"0.weight": np.zeros(4)}, gradients=True) as gating:
        assert gating.left_open == ("0.weight",)
        model(x).square().mean().backward()
        writers = gating.gate_gradients()["0.weight"]
    graph = graph_of(model, [ChannelGroup("0.weight", 4, slices)])
    with Gating(model, graph, gradients=True) as gating:
        np.testing.assert_allclose(gating.gate_gradients()["0.weight"], writers, rtol=1e-4, atol=1e-6)


def test_folded_gates_compute_the_gated_function() -> None:
    model = lively(Residual())
    graph = model.graph()
    with Gating(model, graph, soft(graph)):
        expected = model(images())
    assert fold(model, graph, soft(graph)) == ()
    torch.testing.assert_close(model(images()), expected)


def test_gates_that_cannot_be_folded_are_named_and_left() -> None:
    model = lively(Standardised(StdConv2d))
    before = model.read.weight.detach().clone()
    assert fold(model, model.graph(), {"write.weight": np.full(8, 0.5)}) == ("write.weight",)
    assert torch.equal(before, model.read.weight)


def test_wrong_gates_are_refused() -> None:
    model = Residual()
    for gates in ({"nothing": np.ones(3)}, {"stem.weight": np.ones(3)}, {"stem.weight": np.full(8, np.nan)}):
        with pytest.raises(PlanError):
            Gating(model, model.graph(), gates)

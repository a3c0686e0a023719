"""Signals against brute force on small networks."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.adapters.pytorch.signals import MeasuredSignals, measure
from prunus.core.errors import ConfigError, PlanError, TrainingError
from prunus.core.graph import ChannelGraph, ChannelGroup, Slice
from prunus.core.signals import Signal

EVERYTHING = frozenset(Signal)


class Small(nn.Module):
    """conv -> norm -> grouped conv -> flatten -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 6, 3, stride=2, groups=2)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.grouped(x)).flatten(1))


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    model = Small()
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    return model


@pytest.fixture
def graph(model: Small) -> ChannelGraph:
    within = np.arange(8) % 4  # the position inside its slot: both slots' channels go together
    inner = (
        Slice("conv.weight", 0, "writes", within),
        *(Slice(f"norm.{n}", 0, "scales", within) for n in ("weight", "bias", "running_mean", "running_var")),
        Slice("conv.bias", 0, "scales", within),
        Slice("grouped.weight", 1, "reads", np.arange(4)),
    )
    outer = (
        Slice("grouped.weight", 0, "writes", np.arange(6)),
        Slice("grouped.bias", 0, "scales", np.arange(6)),
        Slice("head.weight", 1, "reads", np.repeat(np.arange(6), 4)),
    )
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.dim()}
    return ChannelGraph(
        [ChannelGroup("conv.weight", 4, inner), ChannelGroup("grouped.weight", 6, outer)], [], shapes
    )


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in (7, 7, 4)
    ]


def collect(model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]) -> MeasuredSignals:
    return measure(model, graph, batches, EVERYTHING, F.cross_entropy)


def seen_by_grouped(model: Small, batches: list[tuple[Tensor, Tensor]]) -> np.ndarray:
    """(samples, 4): all positions, both convolution groups."""
    model.eval()
    with torch.no_grad():
        x = torch.relu(model.norm(model.conv(torch.cat([images for images, _ in batches]))))
    return x.view(-1, 4, 36).transpose(1, 2).reshape(-1, 4).double().numpy()


def test_activation_statistics_are_pooled_over_samples_positions_and_convolution_groups(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    seen = seen_by_grouped(model, batches)
    reader = collect(model, graph, batches)
    np.testing.assert_allclose(reader.read(Signal.ACTIVATION_MEAN, "grouped.weight"), seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(reader.read(Signal.ACTIVATION_VARIANCE, "grouped.weight"), seen.var(0), rtol=1e-5)
    covariance = reader.read(Signal.ACTIVATION_COVARIANCE, "grouped.weight")
    np.testing.assert_allclose(covariance, np.cov(seen.T, bias=True), rtol=1e-4, atol=1e-6)
    assert reader.read(Signal.ACTIVATION_MEAN, "head.weight").shape == (24,)


def test_gate_signals_are_the_moments_of_the_batches_derivatives(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    model.eval()
    per_batch = []
    for images, labels in batches:
        gate = torch.ones(6, requires_grad=True)
        x = torch.relu(model.norm(model.conv(images)))
        x = torch.relu(model.grouped(x)) * gate.view(1, 6, 1, 1)
        loss = F.cross_entropy(model.head(x.flatten(1)), labels)
        per_batch.append(torch.autograd.grad(loss, gate)[0].double().numpy())
    reader = collect(model, graph, batches)
    found = reader.read(Signal.GATE_GRADIENT, "grouped.weight")
    np.testing.assert_allclose(found, np.mean(per_batch, 0), rtol=1e-4, atol=1e-7)
    fisher = np.mean([g**2 * len(b[1]) for g, b in zip(per_batch, batches, strict=True)], 0)
    np.testing.assert_allclose(reader.read(Signal.GATE_FISHER, "grouped.weight"), fisher, rtol=1e-3)


def test_measuring_leaves_no_trace(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    model.train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    reader = collect(model, graph, batches)
    assert np.abs(reader.read(Signal.GATE_GRADIENT, "grouped.weight")).sum() > 0  # through a frozen reader
    reader.read(Signal.ACTIVATION_MEAN, "head.weight")
    assert model.training and not model.norm.training
    assert not model.head.weight.requires_grad and model.conv.weight.grad is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gates_are_on_while_measuring(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    gates = {"conv.weight": np.zeros(4)}
    reader = measure(model, graph, batches, EVERYTHING, F.cross_entropy, gates=gates)
    constant = torch.relu(model.grouped.bias.detach()).double().numpy()
    np.testing.assert_allclose(
        reader.read(Signal.ACTIVATION_MEAN, "head.weight"), np.repeat(constant, 4), atol=1e-7
    )


def test_a_small_budget_changes_the_passes_and_not_the_result(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    roomy = collect(model, graph, batches)
    tight = measure(model, graph, batches, EVERYTHING, F.cross_entropy, budget=1)
    for name in ("grouped.weight", "head.weight", "grouped.weight"):
        for signal in (Signal.ACTIVATION_MEAN, Signal.ACTIVATION_COVARIANCE):
            np.testing.assert_array_equal(roomy.read(signal, name), tight.read(signal, name))
        assert set(tight._collected) == {name}


def test_the_covariances_of_one_pass_are_gone_before_the_next_is_made(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    reader = measure(model, graph, batches, EVERYTHING, F.cross_entropy, budget=1)
    first = weakref.ref(reader.read(Signal.ACTIVATION_COVARIANCE, "grouped.weight"))
    assert first() is not None
    gone: list[bool] = []
    handle = model.register_forward_pre_hook(lambda *args: gone.append(first() is None))
    reader.read(Signal.ACTIVATION_COVARIANCE, "head.weight")
    handle.remove()
    assert gone and all(gone)


def test_arrays_are_read_only_double_precision_copies(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    reader = collect(model, graph, batches)
    for signal, name in [
        (Signal.WEIGHT, "norm.running_var"),
        (Signal.GATE_FISHER, "conv.weight"),
        (Signal.ACTIVATION_COVARIANCE, "grouped.weight"),
    ]:
        values = reader.read(signal, name)
        assert values.dtype == np.float64
        with pytest.raises(ValueError):
            values[0] = 1.0


def test_what_was_not_asked_for_or_does_not_exist_is_refused(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    reader = measure(model, graph, batches, frozenset({Signal.WEIGHT, Signal.ACTIVATION_MEAN}))
    assert reader.has(Signal.WEIGHT, "conv.weight")
    assert not reader.has(Signal.ACTIVATION_MEAN, "conv.weight")  # nothing prunable is read there
    assert not reader.has(Signal.ACTIVATION_VARIANCE, "head.weight")
    with pytest.raises(ConfigError):
        reader.read(Signal.GATE_FISHER, "conv.weight")
    with pytest.raises(PlanError):
        reader.read(Signal.WEIGHT, "nowhere.weight")
    with pytest.raises(ConfigError):
        measure(model, graph, batches, EVERYTHING)
    with pytest.raises(ConfigError, match="labels"):
        measure(model, graph, [batches[0][0]], EVERYTHING, F.cross_entropy)


def test_activations_that_are_not_finite_are_reported(
    model: Small, graph: ChannelGraph, batches: list[tuple[Tensor, Tensor]]
) -> None:
    batches[1][0][0, 0, 0, 0] = float("nan")
    reader = measure(model, graph, batches, frozenset({Signal.ACTIVATION_MEAN}))
    with pytest.raises(TrainingError, match=r"grouped\.weight|head\.weight"):
        reader.read(Signal.ACTIVATION_MEAN, "grouped.weight")

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunus.adapters.pytorch.tracing import Trace, trace_model
from prunus.core.graph import ChannelGraph, ChannelGroup


def randomise(model: nn.Module) -> None:
    """No affine is 1 or 0, no running statistic is standard: mistakes must show."""
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator) * 0.8 + 0.6

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.copy_(uniform(parameter) - (1.0 if "bias" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(uniform(buffer) - 1.0)
            elif name.endswith("running_var"):
                buffer.copy_(uniform(buffer))


def random_keep(graph: ChannelGraph, seed: int) -> dict[str, np.ndarray]:
    """Every group its own share, 25% to 95%."""
    rng = np.random.default_rng(seed)
    keep = {}
    for name, group in graph.prunable.items():
        count = max(1, round(group.units * rng.uniform(0.25, 0.95)))
        keep[name] = np.sort(rng.permutation(group.units)[:count])
    return keep


def difference(a: Any, b: Any) -> float:
    """The largest error relative to the largest value of `b`, over all outputs."""
    errors = [0.0]
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert x.shape == y.shape
        assert torch.isfinite(x).all() and torch.isfinite(y).all()
        errors.append(float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)))
    return max(errors)


def _gateable(group: ChannelGroup) -> bool:
    return group.exact and group.gateable


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gated(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, np.ndarray]) -> nn.Module:
    """The Python model itself, its weights zeroed where they read dead units, nothing else touched."""
    copied = copy.deepcopy(model)
    tensors = dict(copied.named_parameters()) | dict(copied.named_buffers())
    for name, units in keep.items():
        for piece in graph.groups[name].with_role("reads"):
            dead = np.flatnonzero((piece.unit_of >= 0) & ~np.isin(piece.unit_of, units))
            with torch.no_grad():
                tensors[piece.tensor].index_fill_(piece.axis, torch.from_numpy(dead), 0)
    return copied


@pytest.fixture
def certify() -> Callable[..., Trace]:
    """Traces a model and proves: nothing removed changes nothing; removing equals masking; masking is felt."""

    def check(model: nn.Module, *inputs: Tensor, prunable: bool = True) -> Trace:
        randomise(model)
        model.eval()
        trace = trace_model(model, inputs)
        state = state_of(model)
        with torch.no_grad():
            whole = model(*inputs)
        assert difference(trace.masked_output(state, {}, inputs), whole) < 1e-5
        assert bool(trace.graph.prunable) == prunable
        for seed in (0, 1):
            keep = random_keep(trace.graph, seed)
            masked = trace.masked_output(state, keep, inputs)
            assert difference(trace.pruned_output(state, keep, inputs), masked) < 1e-4
            assert not prunable or difference(masked, whole) > 1e-3
            exact = {name: units for name, units in keep.items() if _gateable(trace.graph.groups[name])}
            with torch.no_grad():
                reading = gated(model, trace.graph, exact)(*inputs)
            assert difference(reading, trace.masked_output(state, exact, inputs)) < 1e-4
        return trace

    return check


@pytest.fixture
def keep_at_random() -> Callable[[ChannelGraph, int], dict[str, np.ndarray]]:
    return random_keep

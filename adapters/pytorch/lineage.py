"""How a smaller model lies inside the larger one it descends from: which units are left, and where.

Plans hold kept units in the coordinates of the traced (original, or grown) model, so two plans of one run
say all there is to know about how the later model descends from the earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.comparison import state_of
from prunus.adapters.pytorch.tracing import Trace
from prunus.adapters.pytorch.tracing.program import Step
from prunus.core.cost import FloatArray, IntArray
from prunus.core.graph import Axis, ChannelGraph, Keep
from prunus.core.plan import PruningPlan

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer."""
    return {name: tuple(tensor.shape) for name, tensor in state_of(model).items()}


def kept_of(plan: PruningPlan) -> dict[str, IntArray]:
    """The plan's kept units as arrays."""
    return {name: np.asarray(units, dtype=np.int64) for name, units in plan.keep.items()}


def kept_since(earlier: PruningPlan, later: PruningPlan) -> dict[str, IntArray]:
    """What `later` keeps, in the units of the model of `earlier`."""
    return {
        name: np.searchsorted(np.asarray(earlier.keep[name], dtype=np.int64), units)
        for name, units in kept_of(later).items()
    }


def kept_places(trace: Trace, earlier: PruningPlan, later: PruningPlan) -> dict[str, tuple[IntArray | None, ...]]:
    """Linear layers whose positions are channels (token mixing works on transposed maps), by their weights.

    For every axis of the layer's output between images and features, what `later` keeps of its entries in the
    model of `earlier`; None for all. `trace` is that of the traced model, in whose units both plans are.
    """
    found = {}
    for step in trace.program.steps:
        weight = step.arguments.get("weight") if step.op == "aten.linear" else None
        if isinstance(weight, Step) and weight.op == "tensor":
            axes = [_kept_of_axis(trace, ids, earlier, later) for ids in trace.labels[step][1:-1]]
            if any(axis is not None for axis in axes):
                found[weight.name] = tuple(axes)
    return found


def _kept_of_axis(trace: Trace, ids: IntArray | None, earlier: PruningPlan, later: PruningPlan) -> IntArray | None:
    if ids is None:
        return None
    before, after = (trace.grouping.alive(ids, kept_of(plan)) for plan in (earlier, later))
    left = after[before]
    return None if left.all() else np.flatnonzero(left)


def of_kept(values: Mapping[str, FloatArray] | None, keep: Keep) -> dict[str, FloatArray] | None:
    """Per-unit values of the units that stay, in the order of the units: `keep` may name them in any."""
    if values is None:
        return None
    kept = {name: np.sort(np.asarray(units, dtype=np.int64)) for name, units in keep.items()}
    return {name: np.asarray(array)[kept[name]] if name in kept else array for name, array in values.items()}


def spread(
    values: Mapping[str, FloatArray], kept: Mapping[str, IntArray], graph: ChannelGraph
) -> dict[str, FloatArray]:
    """Per-unit `values` of a smaller model as per-unit values of the larger `graph`, 0 for units that are gone."""
    result = {}
    for name, array in values.items():
        full = np.zeros(graph.groups[name].units)
        full[kept[name]] = array
        result[name] = full
    return result


def scattered(model: nn.Module, shapes: Shapes, kept: Mapping[Axis, IntArray]) -> dict[str, Tensor]:
    """The state of `model`, which keeps the indices `kept` of every axis that shrank, in the full `shapes`.

    Places of what was removed hold ones: they will be masked, and a one is safe in every norm.
    """
    indices = _by_tensor(kept)
    return {
        name: _scatter(tensor.detach(), shapes[name], indices[name])
        if name in indices
        else tensor.detach().clone()
        for name, tensor in state_of(model).items()
    }


@torch.no_grad()
def map_back(small: nn.Module, model: nn.Module, graph: ChannelGraph, keep: Keep) -> None:
    """Copy the weights of `small`, extracted from `model` by `keep`, to their places in `model`."""
    indices = _by_tensor(graph.kept_indices(keep))
    trained = state_of(small)
    for name, tensor in state_of(model).items():
        if name in indices:
            tensor[_crossing(tuple(tensor.shape), indices[name], tensor.device)] = trained[name]
        else:
            tensor.copy_(trained[name])


def _by_tensor(indices: Mapping[Axis, IntArray]) -> dict[str, dict[int, IntArray]]:
    grouped: dict[str, dict[int, IntArray]] = {}
    for (tensor, axis), index in indices.items():
        grouped.setdefault(tensor, {})[axis] = index
    return grouped


def _scatter(tensor: Tensor, shape: tuple[int, ...], indices: Mapping[int, IntArray]) -> Tensor:
    full = torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
    full[_crossing(shape, indices, tensor.device)] = tensor
    return full


def _crossing(shape: tuple[int, ...], indices: Mapping[int, IntArray], device: torch.device) -> tuple[Tensor, ...]:
    """An index that selects `indices` on their axes and everything on the others."""
    places = []
    for axis, length in enumerate(shape):
        index = indices.get(axis)
        along = torch.arange(length) if index is None else torch.from_numpy(np.ascontiguousarray(index))
        places.append(along.to(device).view([-1 if a == axis else 1 for a in range(len(shape))]))
    return tuple(places)

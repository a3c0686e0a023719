"""Where a model's units are read, and how gates on them act on the reading weights.

A gate on a unit multiplies every weight that reads it: `W * g` over the `reads` axes. That is the same
function as multiplying the unit's activation, and costs a product of the size of the weight instead of
one of the size of the feature map. `gating` applies it during training, `signals` takes its derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunus.core.cost import FloatArray
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph, Slice


@dataclass(frozen=True, slots=True, eq=False)
class GatedAxis:
    """One axis of a tensor, with the units that its indices belong to."""

    axis: int
    pieces: tuple[tuple[str, Slice], ...]
    """(group, slice): several where heads and head dimensions share the axis."""

    def gate(self, gates: Mapping[str, FloatArray], without: int | None = None) -> FloatArray:
        """(axis length,): product of the gates of each index's units; `without` leaves one piece out."""
        values = np.ones(len(self.pieces[0][1].unit_of))
        for i, (group, piece) in enumerate(self.pieces):
            if group in gates and i != without:
                inside = piece.unit_of >= 0
                values[inside] *= gates[group][piece.unit_of[inside]]
        return values

    def touches(self, gates: Mapping[str, FloatArray]) -> bool:
        return any(group in gates for group, _ in self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class GatedTensor:
    """A parameter or buffer with all its gated axes; a tied tensor occurs once."""

    name: str
    tensor: Tensor
    axes: tuple[GatedAxis, ...]

    def gate(self, gates: Mapping[str, FloatArray]) -> Tensor:
        """The gates of all axes, broadcastable against the tensor, in its dtype and on its device."""
        product = torch.ones([1] * self.tensor.dim(), dtype=torch.float64)
        for axis in self.axes:
            product = product * self._along(axis.axis, axis.gate(gates))
        return product.to(self.tensor)

    def _along(self, axis: int, values: FloatArray) -> Tensor:
        shape = [1] * self.tensor.dim()
        shape[axis] = -1
        return torch.from_numpy(values).view(shape)

    def derivative(
        self, gradient: Tensor, weight: Tensor, gates: Mapping[str, FloatArray]
    ) -> Iterator[tuple[str, FloatArray]]:
        """(group, (units,)) of dLoss/dgate through this tensor: the sum of dW_eff * W over each unit.

        `gradient` is dLoss/d(W * g), `weight` the W without gates.
        """
        for axis in self.axes:
            product = gradient.detach() * weight.detach()
            for other in self.axes:
                if other is not axis and other.touches(gates):
                    product = product * self._along(other.axis, other.gate(gates)).to(product)
            rest = [d for d in range(product.dim()) if d != axis.axis]
            along = product.sum(rest, dtype=torch.float64) if rest else product.double()
            per_index = along.cpu().numpy()
            for i, (group, piece) in enumerate(axis.pieces):
                inside = piece.unit_of >= 0
                values = per_index * axis.gate(gates, without=i) if len(axis.pieces) > 1 else per_index
                per_unit = np.zeros(int(piece.unit_of.max(initial=-1)) + 1)
                np.add.at(per_unit, piece.unit_of[inside], values[inside])
                yield group, per_unit


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under all its names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def reading_tensors(model: nn.Module, graph: ChannelGraph) -> list[GatedTensor]:
    """The tensors that read units, in the order of the graph."""
    return _gather(model, graph, {name: group.with_role("reads") for name, group in graph.groups.items()})


def sensing_tensors(model: nn.Module, graph: ChannelGraph) -> list[GatedTensor]:
    """The tensors whose gradients give dLoss/dgate: readers, or writers where a consumer has no weight.

    Writers stand in for readers with the same derivative as long as the path between them is linear; a
    writer's own bias belongs to what it writes.
    """
    chosen = {}
    for name, group in graph.groups.items():
        if group.gateable:
            chosen[name] = group.with_role("reads")
        else:
            writes = group.with_role("writes")
            biases = {f"{s.tensor.rpartition('.')[0]}.bias" for s in writes}
            chosen[name] = (*writes, *(s for s in group.with_role("scales") if s.tensor in biases))
    return _gather(model, graph, chosen)


def scaled_tensors(model: nn.Module, graph: ChannelGraph, groups: frozenset[str]) -> list[GatedTensor]:
    """The per-channel tensors (norm weights, biases, statistics) of `groups`."""
    return _gather(model, graph, {name: graph.groups[name].with_role("scales") for name in sorted(groups)})


def checked_gates(
    graph: ChannelGraph, gates: Mapping[str, FloatArray] | None
) -> tuple[dict[str, FloatArray], dict[str, float]]:
    """The gates of groups as float64 arrays, and those of blocks; what is 1 throughout is left out.

    Raises PlanError on an unknown name or a wrong shape.
    """
    checked: dict[str, FloatArray] = {}
    of_blocks: dict[str, float] = {}
    for name, values in (gates or {}).items():
        if name not in graph.groups and name not in graph.blocks:
            raise PlanError(f"gates name an unknown channel group {name!r}", group=name)
        units = graph.groups[name].units if name in graph.groups else 1
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (units,) or not np.isfinite(array).all():
            raise PlanError(
                f"gates of {name!r} must be {units} finite numbers, got an array of shape {array.shape}",
                group=name,
            )
        if (array != 1).any() and name in graph.groups:
            checked[name] = array
        elif (array != 1).any():
            of_blocks[name] = float(array[0])
    return checked, of_blocks


def _gather(model: nn.Module, graph: ChannelGraph, chosen: Mapping[str, tuple[Slice, ...]]) -> list[GatedTensor]:
    tensors = named_tensors(model)
    order = {name: i for i, name in enumerate(graph.tensors)}
    found: dict[int, tuple[str, dict[int, list[tuple[str, Slice]]]]] = {}
    for group, slices in chosen.items():
        for piece in slices:
            if piece.tensor not in tensors:
                raise PlanError(f"the model has no parameter or buffer {piece.tensor!r}", group=group)
            tensor = tensors[piece.tensor]
            name, axes = found.setdefault(id(tensor), (piece.tensor, {}))
            if name == piece.tensor:  # a tied tensor counts under the first of its names
                axes.setdefault(piece.axis, []).append((group, piece))
    gathered = [
        GatedTensor(name, tensors[name], tuple(GatedAxis(a, tuple(p)) for a, p in sorted(axes.items())))
        for name, axes in found.values()
    ]
    return sorted(gathered, key=lambda gated: order.get(gated.name, len(order)))

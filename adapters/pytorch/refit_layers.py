"""The layers that a refit can change: each beside its dense original, with where a constant can go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.patches import Reader, layer_input, reader
from prunus.core.cost import FloatArray, IntArray
from prunus.core.graph import Axis, ChannelGraph

LIKELY = 0.9
"""The survival term takes no unit for more certain to go than this."""


@dataclass(slots=True, eq=False)
class Layer:
    """A layer of the pruned model beside its dense original."""

    name: str
    pruned: Reader
    dense: Reader
    kept_outputs: Tensor | None
    """Indices of the dense outputs that are left; None if all are."""
    kept_inputs: Tensor | None
    odds: Tensor | None
    """(inputs of a group,): p / (1 - p) of vanishing, or None."""
    norm: nn.Module | None = None
    """The batch norm that takes the layer's output as it is."""
    kept_places: Sequence[IntArray | None] = ()
    """Of a linear layer that runs over channels: what is left of each axis of its output between images and
    features; None if all is."""

    @property
    def shiftable(self) -> bool:
        """True if a constant can be added to the outputs."""
        return self.pruned.bias is not None or self.norm is not None

    @property
    def shrunk(self) -> bool:
        return self.pruned.weight.shape[1:] != self.dense.weight.shape[1:]

    @property
    def mixes(self) -> bool:
        """False for a depthwise layer: what is missing there is made up for by the next layer that mixes
        channels, as well (EfficientNet-Lite0 at 85% of the MACs) and in less than half the time."""
        return isinstance(self.pruned, nn.Linear) or self.pruned.groups == 1 or self.pruned.weight.shape[1] > 1

    @property
    def slots_of_dense(self) -> int:
        """Convolution groups of the dense layer."""
        return 1 if isinstance(self.dense, nn.Linear) else self.dense.groups

    @property
    def kept_slots(self) -> Tensor:
        """The dense layer's convolution groups that are left, in order."""
        per_slot = self.dense.weight.shape[0] // self.slots_of_dense
        return torch.unique(self._kept_outputs() // per_slot)

    def of_kept_outputs(self, values: Tensor) -> Tensor:
        """(rows, dense outputs) -> (rows, outputs that are left)."""
        return values if self.kept_outputs is None else values[:, self.kept_outputs.to(values.device)]

    def of_kept_places(self, output: Tensor) -> Tensor:
        """The dense layer's output at the positions that the pruned one has, too."""
        for axis, kept in enumerate(self.kept_places, start=1):
            if kept is not None:
                output = output.index_select(axis, torch.from_numpy(kept).to(output.device))
        return output

    def of_kept_rows(self, weight: Tensor) -> Tensor:
        """(dense groups, outputs of a group, values) -> the same of what is left."""
        return weight.flatten(0, 1)[self._kept_outputs()].unflatten(0, (len(self.kept_slots), -1))

    def largest_norm(self, growth: float) -> float:
        """`growth` times the norm that the weights had if every removed input were a copy of a kept one, evenly:
        sqrt(n / k) |W|. Infinity means no limit, of a layer whose weights are all 0, too."""
        if growth == math.inf:
            return growth
        dense = self.dense.weight.detach()
        rows = dense if self.kept_outputs is None else dense[self.kept_outputs.to(dense.device)]
        return growth * float(rows.double().norm()) * math.sqrt(dense[0].numel() / self.pruned.weight[0].numel())

    def odds_of(self, prior: Tensor) -> Tensor | None:
        """`odds` for rows of weights (groups, outputs, values), the taps of an input alike."""
        if self.odds is None:
            return None
        slots, _, width = prior.shape
        return self.odds.repeat_interleave(width // len(self.odds)).expand(slots, width)

    def shift(self, amount: Tensor) -> None:
        """Adds a constant to each output: to the bias, or to what the following norm subtracts."""
        if self.pruned.bias is not None:
            self.pruned.bias.data.add_(amount.to(self.pruned.bias))
        elif self.norm is not None:
            mean = self.norm.running_mean
            assert isinstance(mean, Tensor)
            mean.sub_(amount.to(mean))

    def _kept_outputs(self) -> Tensor:
        return torch.arange(self.dense.weight.shape[0]) if self.kept_outputs is None else self.kept_outputs


def find_layers(
    pruned: nn.Module,
    dense: nn.Module,
    graph: ChannelGraph,
    kept_indices: Mapping[Axis, IntArray],
    survival: Mapping[str, FloatArray],
    images: Tensor,
    places: Mapping[str, Sequence[IntArray | None]],
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be refitted, and those with removed inputs that cannot, with the reason."""
    skipped: dict[str, str] = {}
    originals = dict(dense.named_modules())
    calls, norms = calls_and_norms(pruned, (images,))
    users: dict[int, int] = {}
    for module in pruned.modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            users[id(module.weight)] = users.get(id(module.weight), 0) + 1
    layers = []
    for name, module in pruned.named_modules():
        layer, original = reader(module), reader(originals.get(name, nn.Identity()))
        if layer is None or original is None:
            weight, was = getattr(module, "weight", None), getattr(originals.get(name), "weight", None)
            if isinstance(weight, Tensor) and isinstance(was, Tensor) and weight.shape[1:] != was.shape[1:]:
                skipped[name] = f"{type(module).__name__} is more than a product with its weight"
            continue
        weight_name = f"{name}.weight" if name else "weight"
        kept_in = kept_indices.get((weight_name, 1))
        found = Layer(
            name,
            layer,
            original,
            _tensor(kept_indices.get((weight_name, 0))),
            _tensor(kept_in),
            _odds(graph, (weight_name, 1), kept_in, survival),
            norms.get(module),
            places.get(weight_name, ()),
        )
        if not found.mixes:
            continue
        if calls.get(module, 0) == 1 and users[id(layer.weight)] == 1:
            layers.append(found)
        elif found.shrunk:
            times = calls.get(module, 0)
            skipped[name] = "it is not called" if times == 0 else "its weight is used more than once"
    return layers, skipped


def calls_and_norms(
    model: nn.Module, args: tuple[Any, ...]
) -> tuple[dict[nn.Module, int], dict[nn.Module, nn.Module]]:
    """How often each layer runs, and the batch norm that takes a layer's output as it is."""
    calls: dict[nn.Module, int] = {}
    made: list[tuple[Tensor, nn.Module]] = []
    norms: dict[nn.Module, nn.Module] = {}

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if output.dim() == 2 or not isinstance(module, nn.Linear):  # channels on axis 1, as norms have them
            made.append((output, module))

    def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        calls[module] = calls.get(module, 0) + 1
        for output, layer in reversed(made):
            if output is layer_input(args, kwargs):
                norms[layer] = module
                return

    handles = []
    for module in model.modules():
        if reader(module) is not None:
            handles.append(module.register_forward_hook(after))
        elif isinstance(getattr(module, "running_mean", None), Tensor):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        model(*args)
    finally:
        for handle in handles:
            handle.remove()
    return calls, {layer: norm for layer, norm in norms.items() if calls[norm] == 1}


def _odds(
    graph: ChannelGraph, axis: Axis, kept: IntArray | None, survival: Mapping[str, FloatArray]
) -> Tensor | None:
    stays: FloatArray | None = None
    for group, piece in graph.slices_of.get(axis, ()):
        if group in survival:
            alive = np.ones(len(piece.unit_of)) if stays is None else stays
            inside = piece.unit_of >= 0
            alive[inside] *= 1 - np.asarray(survival[group], dtype=np.float64)[piece.unit_of[inside]]
            stays = alive
    if stays is None:
        return None
    goes = np.clip(1 - (stays if kept is None else stays[kept]), 0, LIKELY)
    return torch.from_numpy(goes / (1 - goes))


def _tensor(index: IntArray | None) -> Tensor | None:
    return None if index is None else torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64))

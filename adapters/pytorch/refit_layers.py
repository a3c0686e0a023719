"""The layers that a refit can change: each beside its dense original, with where a constant can go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from prunus.adapters.pytorch.patches import Reader, layer_input, reader
from prunus.core.cost import FloatArray, IntArray
from prunus.core.graph import Axis, ChannelGraph

LIKELY = 0.9
"""The survival term takes no unit for more certain to go than this."""
_BATCH_NORMS = (_BatchNorm, FrozenBatchNormAct2d, FrozenBatchNorm2d)
"""Others may keep a `running_mean` and do something else with it."""


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
    seen = watch_layers(pruned, (images,))
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
            seen.norms.get(module),
            places.get(weight_name, ()),
        )
        if not found.mixes:
            continue
        problem = seen.problem_of(layer)
        if problem is None:
            layers.append(found)
        elif found.shrunk:
            skipped[name] = problem
    return layers, skipped


@dataclass(slots=True)
class Seen:
    """What a forward pass showed of the plain layers (`reader`) of a model."""

    calls: dict[nn.Module, int] = field(default_factory=dict)
    """How often each layer, and each batch norm that follows one, ran."""
    norms: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """Layer -> the batch norm that takes its output as it is."""
    shared: dict[nn.Module, str] = field(default_factory=dict)
    """Layers whose weight or bias has a use besides their own calls -> which of the two."""
    looked_at: set[nn.Module] = field(default_factory=set)
    """Layers of whose weight or bias anything at all, be it the dtype, is read outside of their calls."""
    unbatched: set[nn.Module] = field(default_factory=set)
    """Layers with an output that has no axis for the batch: what they run on are parameters, not images."""

    def problem_of(self, layer: nn.Module) -> str | None:
        """Why the layer's weights cannot be judged by what it makes of images, or None."""
        times = self.calls.get(layer, 0)
        if times == 0:
            return "it is not called"
        if layer in self.shared:
            return f"its {self.shared[layer]} is used more than once"
        if times > 1:
            return "its weight is used more than once"
        return "its output has no batch axis" if layer in self.unbatched else None


def watch_layers(model: nn.Module, args: tuple[Any, ...]) -> Seen:
    """Runs `model` once on `args`. The user's hooks on a layer count as outside of its call."""
    seen, watch = Seen(), _TensorWatch(model)
    made: list[tuple[Tensor, int, nn.Module]] = []

    def begin(layer: nn.Module, args: Any) -> None:
        watch.running = layer

    def end(layer: nn.Module, args: Any, output: Tensor) -> None:
        watch.running = None
        seen.calls[layer] = seen.calls.get(layer, 0) + 1
        if output.dim() < watch.axes_of[layer]:
            seen.unbatched.add(layer)
        elif output.dim() == 2 or not isinstance(layer, nn.Linear):  # channels on axis 1, as norms have them
            made.append((output, _version(output), layer))

    def before(norm: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        seen.calls[norm] = seen.calls.get(norm, 0) + 1
        input = layer_input(args, kwargs)
        for output, version, layer in reversed(made):
            if output is input:
                if _version(input) == version and _has_a_mean_for(norm, output.shape[1]):
                    seen.norms[layer] = norm
                return

    handles = []
    for module in model.modules():
        if module in watch.axes_of:  # next to the call: after the user's hooks that may change what goes in,
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end, prepend=True))  # before those that change the output
        elif isinstance(module, _BATCH_NORMS):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with _EveryLook(watch.look), _EveryUse(watch.use):
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    seen.norms = {layer: norm for layer, norm in seen.norms.items() if seen.calls[norm] == 1}
    seen.shared, seen.looked_at = watch.shared, watch.looked_at
    return seen


class _TensorWatch:
    """Which weights and biases of layers are met outside of the calls of their layers."""

    def __init__(self, model: nn.Module) -> None:
        self.running: nn.Module | None = None
        self.shared: dict[nn.Module, str] = {}
        self.looked_at: set[nn.Module] = set()
        self.axes_of: dict[nn.Module, int] = {}
        """Every layer -> axes of an output with a batch axis."""
        self._home: dict[int, tuple[nn.Module, str]] = {}
        users: dict[int, int] = {}
        for module in model.modules():
            layer = reader(module)
            for name in ("weight", "bias"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor):
                    users[id(tensor)] = users.get(id(tensor), 0) + 1
                    if layer is not None:
                        self._home.setdefault(id(tensor), (layer, name))
            if layer is not None:
                self.axes_of[layer] = layer.weight.dim()  # as many: one of outputs, one for each of positions
        for module in self.axes_of:
            for name in ("bias", "weight"):
                if users.get(id(getattr(module, name)), 0) > 1:
                    self._share(module, name)

    def use(self, values: Iterable[Any]) -> None:
        """An operator computes with `values`."""
        for layer, name in self._met(values):
            self._share(layer, name)

    def look(self, values: Iterable[Any]) -> None:
        """Code computes with `values`, or asks for their shape, dtype, device."""
        self.looked_at.update(layer for layer, _ in self._met(values))

    def _share(self, layer: nn.Module, name: str) -> None:
        self.looked_at.add(layer)
        if self.shared.get(layer) != "weight":
            self.shared[layer] = name

    def _met(self, values: Iterable[Any]) -> Iterable[tuple[nn.Module, str]]:
        for value in values:
            if isinstance(value, Tensor):
                home = self._home.get(id(value))
                if home is not None and home[0] is not self.running:
                    yield home
            elif isinstance(value, list | tuple):
                yield from self._met(value)


class _EveryUse(TorchDispatchMode):
    """While active, `note` is told the arguments of every operator, those within scripted code, too."""

    def __init__(self, note: Callable[[Iterable[Any]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note([*args, *kwargs.values()])
        return func(*args, **kwargs)


class _EveryLook(TorchFunctionMode):
    """While active, `note` is told the arguments of every function of torch, of reads of attributes, too."""

    def __init__(self, note: Callable[[Iterable[Any]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note([*args, *kwargs.values()])
        return func(*args, **kwargs)


def _version(tensor: Tensor) -> int:
    """Grows with every change in place; in inference mode that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _has_a_mean_for(norm: nn.Module, channels: int) -> bool:
    mean = norm.running_mean
    return isinstance(mean, Tensor) and mean.shape == (channels,)


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

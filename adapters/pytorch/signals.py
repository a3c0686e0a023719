"""Measured signals: what estimators and policies may know about a PyTorch model.

Gate derivatives take one pass of backward over the batches. Activations are collected when they are
first read, for as many readers at a time as the memory budget holds; each such chunk is one forward
pass. The batches must therefore be iterable more than once, and the model must not change in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunus.adapters.pytorch.blocks import BlockChanges
from prunus.adapters.pytorch.comparison import evaluating
from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.gates import named_tensors
from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.patches import layer_input
from prunus.adapters.pytorch.processes import ALONE, Processes
from prunus.core.cost import FloatArray
from prunus.core.errors import ConfigError, PlanError, TrainingError
from prunus.core.graph import ChannelGraph
from prunus.core.signals import COVARIANCE_LIMIT, NEEDS_DATA, NEEDS_LABELS, Signal

Batch = Tensor | tuple[Tensor, Tensor] | list[Tensor]
"""Images, or (images, labels)."""
Loss = Callable[[Any, Tensor], Tensor]
ACTIVATIONS = NEEDS_DATA - NEEDS_LABELS - {Signal.BLOCK_CHANGE}
BUDGET = 1 << 30
"""Bytes of covariances held at a time; a single reader may exceed it."""


class MeasuredSignals:
    """Signals of one model at one moment; implements `core.signals.SignalReader`."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        batches: Iterable[Batch],
        signals: frozenset[Signal],
        gates: Mapping[str, FloatArray] | None = None,
        budget: int = BUDGET,
        processes: Processes = ALONE,
        more: nn.Module | None = None,
    ) -> None:
        self.signals = signals
        self.announce: Callable[[tuple[str, ...]], None] = lambda names: None
        """Called before the activations at these readers are collected: all processes must `collect` them."""
        self._processes = processes
        self._model, self._graph, self._batches, self._gates = model, graph, batches, gates
        self._stored: dict[tuple[Signal, str], FloatArray] = {}
        self._tensors = named_tensors(model) if more is None else named_tensors(more) | named_tensors(model)
        self._full = Signal.ACTIVATION_COVARIANCE in signals
        self._readers = _readers(model, graph, self._tensors) if signals & ACTIVATIONS else {}
        widths = {name: int(self._tensors[name].shape[1]) for name in self._readers}
        self._chunks = _chunks(widths, self._full, budget)
        self._collected: dict[str, FloatArrays] = {}

    def read(self, signal: Signal, name: str) -> FloatArray:
        """See `core.signals.SignalReader.read`."""
        if signal not in self.signals:
            raise ConfigError(f"the signal {signal.value!r} was not asked for; declare it in `needs`")
        found = self._find(signal, name)
        if found is None:
            raise PlanError(f"there is no {signal.value!r} of {name!r}", group=name)
        return found

    def has(self, signal: Signal, name: str) -> bool:
        """True if `read` would answer."""
        return signal in self.signals and self._find(signal, name) is not None

    def _find(self, signal: Signal, name: str) -> FloatArray | None:
        if signal in ACTIVATIONS:
            return self._activation(signal, name)
        if signal is Signal.WEIGHT and (signal, name) not in self._stored and name in self._tensors:
            return _frozen(self._tensors[name].detach().to("cpu", torch.float64).numpy())
        return self._stored.get((signal, name))

    def _activation(self, signal: Signal, name: str) -> FloatArray | None:
        if name not in self._readers:
            return None
        if name not in self._collected:
            chunk = next(chunk for chunk in self._chunks if name in chunk)
            self.announce(chunk)
            self.collect(chunk)
        return self._collected[name].get(signal)

    def collect(self, names: tuple[str, ...]) -> None:
        """One forward pass over the batches, which keeps what reaches the readers `names`."""
        self._collected = {}  # the readers before, which take as much memory again
        moments: dict[str, Moments] = {}
        handles = []
        for name in names:
            weight = self._tensors[name]
            width = weight.shape[1]
            moments[name] = Moments(width, full=self._full and width <= COVARIANCE_LIMIT)
            for module in self._readers[name]:
                handles.append(module.register_forward_pre_hook(_observer(moments[name], width), with_kwargs=True))
        try:
            with measuring(self._model), Gating(self._model, self._graph, self._gates), torch.no_grad():
                for batch in self._batches:
                    self._model(images_of(batch, self._model))
        finally:
            for handle in handles:
                handle.remove()
        for name in names:  # one by one: sums make room for what is made of them
            self._collected[name] = _activations(name, self._processes.merge(moments.pop(name)))

    def store_gate_signals(self, loss_fn: Loss) -> None:
        """One backward pass over the batches. Raises TrainingError if a derivative is not finite."""
        total = {name: np.zeros(group.units) for name, group in self._graph.groups.items()}
        squared = {name: np.zeros(group.units) for name, group in self._graph.groups.items()}
        gating = Gating(self._model, self._graph, self._gates, gradients=True)
        count = 0
        with measuring(self._model), _differentiable(gating.sensed), gating, torch.enable_grad():
            for batch in self._batches:
                images, labels = images_of(batch, self._model), labels_of(batch, self._model)
                loss = loss_fn(self._model(images), labels)
                gradients = torch.autograd.grad(loss, gating.sensed, allow_unused=True)
                for name, values in gating.gate_gradients(list(gradients)).items():
                    total[name] += values
                    squared[name] += values**2 * len(labels)
                count += 1
        count = int(self._processes.sum(torch.tensor([count]))[0])
        for sums in (total, squared):
            for name, values in sums.items():
                sums[name] = self._processes.sum(torch.from_numpy(values)).numpy()
        for signal, sums in ((Signal.GATE_GRADIENT, total), (Signal.GATE_FISHER, squared)):
            for name, values in sums.items():
                if not np.isfinite(values).all():
                    raise TrainingError(f"the {signal.value} of {name!r} is not finite: check data and weights")
                self._stored[signal, name] = _frozen(values / max(count, 1))

    def store_block_changes(self) -> None:
        """One forward pass over the batches."""
        residual = tuple(name for name, block in self._graph.blocks.items() if block.of is None)
        changes = BlockChanges(self._model, residual)
        gating = Gating(self._model, self._graph, self._gates)
        with measuring(self._model), gating, changes.watching(), torch.no_grad():
            for batch in self._batches:
                self._model(images_of(batch, self._model))
        for name, sums in changes.sums.items():
            energy, turn, images = self._processes.sum(sums).tolist()
            values = np.array([energy, turn]) / max(images, 1.0)
            if not np.isfinite(values).all():
                raise TrainingError(f"what passes through {name} is not finite: check data and weights")
            self._stored[Signal.BLOCK_CHANGE, name] = _frozen(values)


FloatArrays = dict[Signal, FloatArray]


def measure(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[Batch],
    signals: frozenset[Signal],
    loss_fn: Loss | None = None,
    gates: Mapping[str, FloatArray] | None = None,
    budget: int = BUDGET,
    processes: Processes = ALONE,
    more: nn.Module | None = None,
) -> MeasuredSignals:
    """Collects `signals` of `model` in evaluation mode, in the precision of its weights, outside autocast.

    `batches` is iterated once for the gate signals and once for each chunk of activation statistics whose
    covariances fit into `budget` bytes. `loss_fn(outputs, labels)` is the mean loss of a batch. `gates`
    are on while measuring. `batches` are this process's share of those of `processes`. Weights that `model` has
    not are those of `more`. Raises ConfigError if labels or a loss are needed and missing.
    """
    if signals & NEEDS_LABELS and loss_fn is None:
        raise ConfigError("gate gradients need a loss function and labelled batches")
    measured = MeasuredSignals(model, graph, batches, signals, gates, budget, processes, more)
    if signals & NEEDS_LABELS and loss_fn is not None:
        measured.store_gate_signals(loss_fn)
    if Signal.BLOCK_CHANGE in signals:
        measured.store_block_changes()
    return measured


def images_of(batch: Batch, model: nn.Module) -> Tensor:
    """The images of a batch, where the model is and in the precision of its weights."""
    images = batch if isinstance(batch, Tensor) else batch[0]
    parameter = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(parameter.device, parameter.dtype)


def labels_of(batch: Batch, model: nn.Module) -> Tensor:
    """The labels of a batch. Raises ConfigError if it has none."""
    if isinstance(batch, Tensor):
        raise ConfigError("this signal needs labels, but the batches hold images only")
    return batch[1].to(next(model.parameters()).device)


@contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and full precision for the block: statistics taken under autocast are worthless."""
    device = next((p.device.type for model in models for p in model.parameters()), "cpu")
    with evaluating(*models), torch.autocast(device, enabled=False):
        yield


@contextmanager
def _differentiable(tensors: list[Tensor]) -> Iterator[None]:
    frozen = [tensor for tensor in tensors if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _readers(
    model: nn.Module, graph: ChannelGraph, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Module, ...]]:
    """Reading weight -> the convolutions and linear layers that use it."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        readable = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
        if (readable or isinstance(module, nn.Linear)) and "weight" in module._parameters:
            users.setdefault(id(module.weight), []).append(module)
    found = {}
    for (name, axis), pieces in graph.slices_of.items():
        if axis == 1 and any(piece.role == "reads" for _, piece in pieces) and id(tensors[name]) in users:
            found[name] = tuple(users[id(tensors[name])])
    return found


def _chunks(widths: Mapping[str, int], full: bool, budget: int) -> tuple[tuple[str, ...], ...]:
    chunks: list[list[str]] = [[]]
    used = 0
    for name, width in widths.items():
        size = 8 * width**2 if full and width <= COVARIANCE_LIMIT else 8 * width
        if chunks[-1] and used + size > budget:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += size
    return tuple(tuple(chunk) for chunk in chunks)


def _observer(moments: Moments, width: int) -> Callable[..., None]:
    def observe(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        x = layer_input(args, kwargs).detach()
        if isinstance(module, _ConvNd):
            spatial = len(module.kernel_size)
            x = x.reshape(-1, width, *x.shape[x.dim() - spatial :]).flatten(2).transpose(1, 2)
        moments.add(x.reshape(-1, 1, width))

    return observe


def _activations(name: str, moments: Moments) -> FloatArrays:
    if moments.count == 0:
        return {}  # its module is not called by the forward pass
    covariance = moments.covariance[0]
    wide = covariance.dim() == 1
    found = {
        Signal.ACTIVATION_MEAN: _frozen(moments.mean[0].numpy()),
        Signal.ACTIVATION_VARIANCE: _frozen((covariance if wide else covariance.diagonal()).numpy()),
    }
    if not wide:
        # exactly symmetric, which a product of matrices is not, so that half of it tells the whole
        found[Signal.ACTIVATION_COVARIANCE] = _frozen(((covariance + covariance.T) / 2).numpy())
    if not all(np.isfinite(values).all() for values in found.values()):
        raise TrainingError(f"what reaches {name} is not finite: check data and weights")
    return found


def _frozen(values: FloatArray) -> FloatArray:
    values = np.array(values, dtype=np.float64)
    values.setflags(write=False)
    return values

"""Gates on a model: soft or hard, for a training step, an evaluation, or for good.

During a step the reading weights hold `W * g`; afterwards they hold `W` again, bit for bit, and their
gradients are those of `W`. Where a norm's statistics run over gated units they are taken over what the
gates leave (`gated_statistics`), so that a gate of 0 equals removal there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunus.adapters.pytorch.blocks import BlockGates
from prunus.adapters.pytorch.gated_statistics import STANDARDISED, GatedStatistics
from prunus.adapters.pytorch.gates import (
    GatedTensor,
    checked_gates,
    reading_tensors,
    scaled_tensors,
    sensing_tensors,
)
from prunus.core.cost import FloatArray
from prunus.core.directives import Gates
from prunus.core.errors import PlanError
from prunus.core.graph import ChannelGraph


class Gating:
    """Gates for the steps of a training loop, or for a `with` block of evaluations.

        gating.before_forward(); loss = ...; loss.backward(); gating.after_backward()

    Several forward and backward passes may lie between the two calls (gradient accumulation).
    Groups with `gateable=False` have a consumer without a weight: their gates are left at 1, and
    `left_open` names them.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        gates: Mapping[str, FloatArray] | None = None,
        *,
        gradients: bool = False,
    ) -> None:
        """`gates`: group -> (units,), block -> (1,); what is not named has gates 1. `gradients`: prepare
        `gate_gradients`, of groups. Raises PlanError for an unknown name or a wrong shape."""
        wanted, of_blocks = checked_gates(graph, gates)
        self._blocks = BlockGates(model, of_blocks)
        self.gates = {name: g for name, g in wanted.items() if graph.groups[name].gateable}
        self.left_open = tuple(sorted(set(wanted) - set(self.gates)))
        self._model, self._graph, self._gradients = model, graph, gradients
        readers = reading_tensors(model, graph)
        standardised = {
            id(module.weight): module for module in model.modules() if isinstance(module, STANDARDISED)
        }
        plain = [r for r in readers if id(r.tensor) not in standardised and _touched(r, self.gates)]
        self._weights = [reader.tensor for reader in plain]
        self._factors = [reader.gate(self.gates) for reader in plain]
        self._saved = [torch.empty_like(weight) for weight in self._weights]
        self._inexact = frozenset(
            name for name, g in graph.groups.items() if not g.exact and (gradients or name in self.gates)
        )
        self._norms = scaled_tensors(model, graph, self._inexact)
        self._convolutions = [
            (standardised[id(r.tensor)], r)
            for r in readers
            if id(r.tensor) in standardised and (gradients or _touched(r, self.gates))
        ]
        self._norm_gates = [self._leaf(t) for t in self._norms]
        self._convolution_gates = [self._leaf(t) for _, t in self._convolutions]
        self._sensors = [t for t in sensing_tensors(model, graph) if id(t.tensor) not in standardised]
        self._index = {id(weight): i for i, weight in enumerate(self._weights)}
        self._handles: list[RemovableHandle] = []
        self._statistics = GatedStatistics(
            {id(t.tensor): g for t, g in zip(self._norms, self._norm_gates, strict=True)},
            {m: g for (m, _), g in zip(self._convolutions, self._convolution_gates, strict=True)},
        )

    def _leaf(self, gated: GatedTensor) -> Tensor:
        gate = gated.gate(self.gates)
        return gate.expand(gated.tensor.shape).clone().requires_grad_(self._gradients)

    @property
    def watches(self) -> bool:
        """True if forward passes compute norms, standardised weights or blocks otherwise: more than weights."""
        return bool(self._norms or self._convolutions or self._blocks)

    @property
    def sensed(self) -> list[Tensor]:
        """The tensors whose gradients `gate_gradients` needs, in its order."""
        return [t.tensor for t in self._sensors] + self._norm_gates + self._convolution_gates

    @property
    def approximate(self) -> tuple[str, ...]:
        """After a forward pass: gated groups with statistics over them that no recognised norm took."""
        seen = {group for t in self._norms if id(t.tensor) in self._statistics.seen for group in _groups(t)}
        seen.update(group for _, t in self._convolutions for group in _groups(t))
        return tuple(sorted(name for name in self._inexact & set(self.gates) if name not in seen))

    @torch.no_grad()
    def before_forward(self) -> None:
        """Puts the gates on, in place."""
        if self._weights:
            torch._foreach_copy_(self._saved, self._weights)
            torch._foreach_mul_(self._weights, self._factors)
        if self._norms or self._convolutions:
            self._watch()
        self._handles += self._blocks.hooks()

    def gate_gradients(self, gradients: list[Tensor | None] | None = None) -> dict[str, FloatArray]:
        """group -> (units,): dLoss/dgate of the backward pass just made. Call it before `after_backward`.

        `gradients` are those of `sensed` if they were taken by `torch.autograd.grad`; else `.grad` is read.
        """
        if gradients is None:
            gradients = [tensor.grad for tensor in self.sensed]
        totals = {name: np.zeros(group.units) for name, group in self._graph.groups.items()}
        for sensor, gradient in zip(self._sensors, gradients, strict=False):
            if gradient is not None:
                position = self._index.get(id(sensor.tensor))
                weight = sensor.tensor if position is None else self._saved[position]
                _add(totals, sensor, gradient, weight, self.gates)
        leaves = [*self._norms, *(t for _, t in self._convolutions)]
        for leaf, gradient in zip(leaves, gradients[len(self._sensors) :], strict=True):
            if gradient is not None:
                _add(totals, leaf, gradient, torch.ones_like(gradient), self.gates)
        return totals

    @torch.no_grad()
    def after_backward(self) -> None:
        """Takes the gates off; weights are as before, weight gradients are those of the weights."""
        scaled = [
            (weight.grad, factor)
            for weight, factor in zip(self._weights, self._factors, strict=True)
            if weight.grad is not None
        ]
        if scaled:
            torch._foreach_mul_([g for g, _ in scaled], [f for _, f in scaled])
        for leaf in (*self._norm_gates, *self._convolution_gates):
            leaf.grad = None
        self._take_off()

    @torch.no_grad()
    def _take_off(self) -> None:
        if self._weights:
            torch._foreach_copy_(self._weights, self._saved)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Gating:
        self.before_forward()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_off()

    def _watch(self) -> None:
        """Gate-aware statistics for the duration of each forward pass of the model."""

        def enter(module: nn.Module, args: Any) -> None:
            self._statistics.__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._statistics.__exit__(None, None, None)

        self._handles += [
            self._model.register_forward_pre_hook(enter),
            self._model.register_forward_hook(leave, always_call=True),
            *self._statistics.hooks(self._model),
        ]


@torch.no_grad()
def fold(model: nn.Module, graph: ChannelGraph, gates: Mapping[str, FloatArray]) -> tuple[str, ...]:
    """Multiplies the gates into the reading weights, in place, for good.

    Returns the groups whose gates cannot be folded, because something reads the group without a weight
    or through a standardised one; these stay at 1. Raises PlanError for an unknown group or wrong shape.
    """
    wanted, of_blocks = checked_gates(graph, gates)
    if of_blocks:
        raise PlanError(f"the gate of block {next(iter(of_blocks))!r} cannot be folded: it scales no weight")
    standardised = {id(m.weight) for m in model.modules() if isinstance(m, STANDARDISED)}
    readers = reading_tensors(model, graph)
    closed = {name for name in wanted if not graph.groups[name].gateable}
    for reader in readers:
        if id(reader.tensor) in standardised:
            closed |= _groups(reader) & set(wanted)
    foldable = {name: g for name, g in wanted.items() if name not in closed}
    for reader in readers:
        if _touched(reader, foldable):
            reader.tensor.mul_(reader.gate(foldable))
    return tuple(sorted(closed))


def _groups(gated: GatedTensor) -> set[str]:
    return {group for axis in gated.axes for group, _ in axis.pieces}


def _touched(gated: GatedTensor, gates: Mapping[str, FloatArray]) -> bool:
    return any(axis.touches(gates) for axis in gated.axes)


def _add(
    totals: dict[str, FloatArray],
    gated: GatedTensor,
    gradient: Tensor,
    weight: Tensor,
    gates: Mapping[str, FloatArray],
) -> None:
    for group, values in gated.derivative(gradient, weight, gates):
        totals[group][: len(values)] += values


def when_gated(model: nn.Module, graph: ChannelGraph, gates: Gates | None) -> Callable[[], Gating] | None:
    """What makes the gating of a training; None where nothing is gated."""
    return None if gates is None else lambda: Gating(model, graph, gates)

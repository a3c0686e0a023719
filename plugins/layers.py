"""Whole layers as units of the search for channels: kernels that shrink to one tap, residual blocks that vanish.

A layer is a group of one unit that may go (`with_layers`): its costs are exact, and prices follow from them as for
channels. What speaks for it is the sum over the channels that it contributes to,

    Lambda_layer = sum_i log(1 + theta_i^2 / sigma^2),

theta_i the scale of its part of contribution i beside the mean contribution there, and its price is what it saves,
counted in channels of the groups that run through it. So one threshold mu decides about channels and layers
(methods, section 2.3). What a block adds nothing else carries, while most of a channel the other channels do: its
energy is therefore divided by the part of contributions that the others do not explain.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from prunus.core.allocation import CLOSE, global_keep
from prunus.core.budget import Budget
from prunus.core.cost import Extent, FloatArray, IntArray
from prunus.core.errors import UnreachableTargetError
from prunus.core.graph import ChannelGraph, ChannelGroup
from prunus.core.signals import Signal, SignalReader
from prunus.plugins.energies import Energies
from prunus.plugins.scale_mixture import scale

Layers = Literal["none", "kernels", "blocks", "all"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which layers may go: group name in the search -> kernel or block of the graph."""

    kernels: Mapping[str, str]
    blocks: Mapping[str, str]

    @classmethod
    def of(cls, graph: ChannelGraph, layers: Layers) -> Choice:
        """Of `graph`: residual blocks, and kernels whose inputs are units of groups that can shrink.

        Nothing is known of what other inputs carry (the image's channels). Branches are neither.
        """
        read = {
            t
            for (t, axis), pieces in graph.slices_of.items()
            if axis == 1
            for g, _ in pieces
            if g in graph.prunable
        }
        able = [name for name, kernel in graph.kernels.items() if kernel.tensor in read]
        kernels = {f"{name}.kernel": name for name in able} if layers in ("kernels", "all") else {}
        residual = [name for name, block in graph.blocks.items() if block.of is None]
        return cls(kernels, {name: name for name in residual} if layers in ("blocks", "all") else {})

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.kernels, *self.blocks)

    def gone(self, keep: Mapping[str, IntArray], graph: ChannelGraph) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(blocks, kernels) that `keep` does without; no kernel of a block that goes as a whole."""
        blocks = tuple(name for group, name in self.blocks.items() if not len(keep[group]))
        inside = frozenset[str]().union(*(graph.blocks[name].tensors for name in blocks))
        kernels = (name for group, name in self.kernels.items() if not len(keep[group]))
        return blocks, tuple(name for name in kernels if graph.kernels[name].tensor not in inside)


def with_layers(graph: ChannelGraph, choice: Choice) -> ChannelGraph:
    """`graph` with a group of one unit, which may go, for each layer of `choice`; every cost is exact.

    Only for choosing: such a group has no slices.
    """
    groups = [ChannelGroup(name, 1, (), min_units=0) for name in choice.names]
    present: dict[str, list[Extent]] = {}
    for group, name in choice.blocks.items():
        block = graph.blocks[name]
        for source in block.tensors | block.sources:
            present.setdefault(source, []).append(Extent(0, ((1, (group,)),)))
    taps: dict[str, tuple[int, Extent]] = {}
    for group, name in choice.kernels.items():
        kernel = graph.kernels[name]
        extent = Extent(1, ((kernel.taps - 1, (group,)),))
        taps.update({kernel.name: (kernel.taps, extent), kernel.tensor: (kernel.taps, extent)})
    terms = []
    for term in graph.terms:
        extents = (*term.extents, *present.get(term.source, ()))
        if term.source in taps and term.quantity != "latency":
            size, extent = taps[term.source]
            term = replace(term, coefficient=term.coefficient // size)
            extents = (*extents, extent)
        terms.append(replace(term, extents=extents))
    return ChannelGraph([*graph.groups.values(), *groups], terms, graph.tensors)


def harden(
    space: ChannelGraph, choice: Choice, budget: Budget, ranks: Mapping[str, FloatArray]
) -> dict[str, IntArray]:
    """The units and layers of highest rank, at exact costs. Raises UnreachableTargetError.

    Layers are lumps: of those that would go, from the highest rank on, each stays that in exchange for channels
    uses the budget better.
    """
    keep = global_keep(space, budget, ranks)
    gone = [name for name in choice.names if not len(keep[name])]
    load = _load(space, budget, keep)
    for name in sorted(gone, key=lambda name: -float(ranks[name][0])):
        if load >= CLOSE:
            break
        with_it = space.with_groups(
            replace(g, min_units=1) if g.name == name else g for g in space.groups.values()
        )
        try:
            other = global_keep(with_it, budget, ranks)
        except UnreachableTargetError:
            break
        if _load(space, budget, other) > load:
            space, keep, load = with_it, other, _load(space, budget, other)
    return keep


def _load(space: ChannelGraph, budget: Budget, keep: Mapping[str, IntArray]) -> float:
    return budget.load(space.cost({name: len(units) for name, units in keep.items()}))


@dataclass(frozen=True, slots=True, eq=False)
class _Outside:
    """What a kernel's taps beside the centre have of each contribution that its convolution reads."""

    tensor: str
    share: Mapping[str, FloatArray]
    """group -> (units,): of the squared norm of the weights."""
    size: int
    """Numbers of a contribution."""


class LayerEvidence:
    """What was measured of layers, and the coefficient that it gives."""

    def __init__(self, graph: ChannelGraph, choice: Choice, signals: SignalReader) -> None:
        self.groups = {group: _groups(graph, {graph.kernels[n].tensor}) for group, n in choice.kernels.items()}
        """Layer -> the groups that run through it."""
        self.groups |= {group: _groups(graph, graph.blocks[name].tensors) for group, name in choice.blocks.items()}
        self._outside = {group: _outside(graph, name, signals) for group, name in choice.kernels.items()}
        self._added = {
            group: (float(signals.read(Signal.BLOCK_CHANGE, name)[0]), streams(graph, name))
            for group, name in choice.blocks.items()
        }

    def at(
        self, energies: Energies, survival: Mapping[str, FloatArray], noise: float, c1: float
    ) -> dict[str, float]:
        """Layer -> Lambda, for energies as `energies.at(survival)` has just found them and sigma^2 = `noise`."""
        found = {}
        for group, outside in self._outside.items():
            total = 0.0
            for name, energy in energies.of_reader(outside.tensor).items():
                mean = float(energy.mean())
                part = outside.share[name] * energy / mean if mean > 0 else np.zeros_like(energy)
                size = np.full(len(part), float(outside.size))
                total += float(survival[name] @ np.log1p(scale(part * size, size, noise, c1) ** 2 / noise))
            found[group] = total
        for group, (added, streams) in self._added.items():
            channels = sum(float(survival[name].sum()) for name in streams if name in survival)
            found[group] = channels * float(np.log1p(added / (energies.unexplained * noise)))
        return found


def _outside(graph: ChannelGraph, name: str, signals: SignalReader) -> _Outside:
    kernel = graph.kernels[name]
    weight = signals.read(Signal.WEIGHT, kernel.tensor)
    whole = np.square(weight).sum(axis=(0, 2, 3))
    centre = np.square(weight[:, :, kernel.centre, kernel.centre]).sum(axis=0)
    shares = {}
    for group, piece in graph.slices_of.get((kernel.tensor, 1), ()):
        mine = piece.unit_of >= 0
        units = graph.groups[group].units
        total = np.bincount(piece.unit_of[mine], weights=whole[mine], minlength=units)
        middle = np.bincount(piece.unit_of[mine], weights=centre[mine], minlength=units)
        shares[group] = 1 - middle / np.maximum(total, 1e-300)
    return _Outside(kernel.tensor, shares, weight.shape[0] * (kernel.taps - 1))


def _groups(graph: ChannelGraph, tensors: Collection[str]) -> tuple[str, ...]:
    return tuple(
        name for name, group in graph.groups.items() if any(piece.tensor in tensors for piece in group.slices)
    )


def streams(graph: ChannelGraph, name: str) -> tuple[str, ...]:
    """Groups that the block writes and that live outside of it, too."""
    tensors = graph.blocks[name].tensors
    return tuple(
        group.name
        for group in graph.groups.values()
        if any(piece.tensor in tensors for piece in group.with_role("writes"))
        and any(piece.tensor not in tensors for piece in group.slices)
    )

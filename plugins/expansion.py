"""Expansion before the search: groups are widened, or convolutions run as branches, function-preserving.

Every branch ends in a norm, so the square of that norm's scale is the energy of what the branch adds to each
output channel. The scale mixture is then over all branches of a convolution, output by output: outputs of theta 0
are noise, and a branch that has nothing else vanishes. Branches have no price, since merged they cost nothing:
what the wide ones cost together, the kernel, is decided after they are merged (`layers`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np

from prunus.core.cost import FloatArray
from prunus.core.directives import Directive, Grow, Measure, Note, Observation
from prunus.core.errors import ConfigError
from prunus.core.graph import ChannelGraph
from prunus.core.signals import Signal
from prunus.plugins.ranking import signals_of
from prunus.plugins.recovery import changed
from prunus.plugins.scale_mixture import Coefficients, coefficients

LEAST = 0.02
"""A branch with a smaller share of outputs above the noise vanishes."""


def grow_wide(
    graph: ChannelGraph, ratio: float, *, every: bool
) -> Generator[Directive, Observation, tuple[ChannelGraph, float]]:
    """Widen groups that one layer writes, or `every` group that can be, by `ratio` (Net2Wider)."""
    widths = {}
    for name, group in graph.prunable.items():
        tied = (name,) if group.equal_count is None else graph.equal_counts[group.equal_count]
        inner = all(len(graph.groups[n].with_role("writes")) <= 1 for n in tied)
        if any(graph.growable(n) is not None for n in tied) or not (inner or every):
            continue
        step = math.lcm(*(graph.groups[n].multiple_of for n in tied))
        widths[name] = max(group.units, math.ceil(ratio * group.units / step) * step)
    if not widths:
        raise ConfigError("no group of this model can be widened; use expansion=none", key="expansion")
    grown = changed((yield Grow(widths=widths))).graph
    yield Note("expansion", {"groups": len(widths), "macs": grown.cost().macs / graph.cost().macs})
    return grown, grown.cost().macs


def branchable(graph: ChannelGraph) -> tuple[str, ...]:
    """Convolutions that can run as branches."""
    return tuple(name for name, kernel in graph.kernels.items() if kernel.branches)


def grow_branches(graph: ChannelGraph) -> Generator[Directive, Observation, tuple[ChannelGraph, float]]:
    """Let every convolution that can run as its branches: the graph, and the MACs of a forward pass."""
    grown = changed((yield Grow(widths={}, branches=branchable(graph))))
    branches = [name for name, block in grown.graph.blocks.items() if block.of is not None]
    macs = grown.forward_macs / graph.cost().macs
    yield Note("expansion", {"convolutions": len(branchable(graph)), "branches": len(branches), "macs": macs})
    return grown.graph, grown.forward_macs


@dataclass(frozen=True, slots=True)
class BranchCoefficients:
    """What the scale mixture says of the branches of a graph; nothing where there are none."""

    names: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()
    """Those to vanish; of each convolution at least the strongest stays."""
    theta: dict[str, FloatArray] = field(default_factory=dict)
    """branch -> (outputs,)"""
    noise: float = 1.0

    def decay(self, rate: float) -> dict[str, FloatArray]:
        """branch that stays -> (1,): mean over its outputs of rate * sigma^2 / (theta^2 + sigma^2)."""
        return {
            name: np.array([float(np.mean(rate * self.noise / (theta**2 + self.noise)))])
            for name, theta in self.theta.items()
            if name not in self.weak
        }


def branch_coefficients(
    graph: ChannelGraph, kappa: float, c1: float
) -> Generator[Directive, Observation, BranchCoefficients]:
    """Measure the norms that end the branches of `graph`, and judge."""
    branches: dict[str, list[str]] = {}
    for name, block in graph.blocks.items():
        if block.of is not None:
            branches.setdefault(block.of, []).append(name)
    if not branches:
        return BranchCoefficients()
    signals = signals_of((yield Measure(signals=frozenset({Signal.WEIGHT}))))
    energies = {
        name: np.square(signals.read(Signal.WEIGHT, f"{name}.norm.weight"))
        for names in branches.values()
        for name in names
    }
    joined = {of: np.concatenate([energies[name] for name in names]) for of, names in branches.items()}
    found = coefficients(joined, {of: np.ones(len(e)) for of, e in joined.items()}, kappa=kappa, c1=c1)
    theta = _parted(found, branches, energies)
    weak = []
    for names in branches.values():
        alive = {name: float((theta[name] > 0).mean()) for name in names}
        strongest = max(names, key=lambda name: (alive[name], float(energies[name].sum())))
        weak += [name for name in names if alive[name] < LEAST and name != strongest]
    yield Note("branches", {"left": len(energies) - len(weak), "vanished": ", ".join(weak)})
    return BranchCoefficients(tuple(energies), tuple(weak), theta, found.noise)


def _parted(
    found: Coefficients, branches: dict[str, list[str]], energies: dict[str, FloatArray]
) -> dict[str, FloatArray]:
    parted: dict[str, FloatArray] = {}
    for of, names in branches.items():
        splits = np.cumsum([len(energies[name]) for name in names])[:-1]
        parted.update(zip(names, np.split(found.theta[of], splits), strict=True))
    return parted

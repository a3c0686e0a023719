"""The search of gsm-anneal: where the annealing of probabilities stands, and how it goes on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from pydantic import Field

from prunus.core.allocation import best_units, ladders
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Changed, Directive, Measure, Note, Observation
from prunus.core.errors import ConfigError, PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.policy import PruningTask
from prunus.core.signals import Signal
from prunus.plugins.annealing import Lattice, mean_entropy
from prunus.plugins.discrepancy import sliced_weights
from prunus.plugins.energies import SIGNALS, Energies, Source
from prunus.plugins.layers import Choice, LayerEvidence, Layers, harden, with_layers
from prunus.plugins.pooled_moments import MOMENTS, PooledMoments
from prunus.plugins.ranking import signals_of
from prunus.plugins.scale_mixture import Coefficients, coefficients
from prunus.plugins.sensitivity import NONE_GONE, Gone, Settled, TrialConfig, measure_sensitivity, settle

_RIDGE = 1e-3
"""Of the mean variance, in trials."""
_IN_TURN = 0.25
"""Share of the units that move at a time when all at once do not settle."""
_LEAST_HOT = 1e-3
"""The first temperature where all units are worth the same: far above what a root is found to."""
_FROZEN, _TIE = 1e-10, 1e-6
"""The last temperature, and by how much the first unit is worth more than the last, as shares of T0."""
_TRUST = 0.5
"""Power of a group's sensitivity: halfway, on the scale of logarithms, between one noisy trial and none."""


@dataclass(frozen=True, slots=True, eq=False)
class Annealed:
    """Where a search ended."""

    keep: dict[str, IntArray]
    """group -> kept units; empty for a layer of the choice that goes as a whole."""
    ranks: dict[str, FloatArray]
    notes: list[Note]


class AnnealingConfig(TrialConfig):
    source: Source | Literal["auto"] = "auto"
    """What a unit's energy is: what its readers lose without it, the others `refitted`; `conditional` on who else
    survives; `weight`; or `gate_fisher`. `auto` is `refitted` (`conditional` to propose layers that go), and
    `weight` without data. Only the first is weighed by `sensitivity`."""
    normalise: bool = True
    """Bring energies to mean 1 inside each group; without it stages collapse. Not those of `refitted`, which are
    shares of what their readers compute: they are divided by what a unit costs."""
    kappa: float = Field(default=0.05, gt=0, le=1)
    """Noise floor, as a share of the median energy per number."""
    c1: float = Field(default=4.0, gt=0)
    """Weight of the prior 1/theta in the scale mixture."""
    cost: Literal["fixed", "recomputed"] = "fixed"
    """Prices c at the start, or again at every update (the narrow get narrower)."""
    cost_power: float = Field(default=0.0, ge=0, le=2)
    """Prices are c^cost_power: at 0 the cost enters through mu alone, which the pilot found best."""
    damping: float = Field(default=0.25, gt=0, le=1)
    """Step towards the new probabilities; 1 is undamped and oscillates into corners."""
    updates: int = Field(default=8, ge=1)
    """Updates per temperature."""
    hot: float = Field(default=2.0, gt=0)
    """First temperature, in standard deviations of Lambda."""
    cooling: float = Field(default=0.85, gt=0, lt=1)
    """Ratio of successive temperatures."""
    temperatures: int = Field(default=28, ge=1)
    """Length of the ladder; the last round goes on, at most as long again, until the entropy is low."""
    cold: float = Field(default=0.02, gt=0, lt=1)
    """The mean entropy, as a share of log 2, at which the search is over."""
    collapsed: float = Field(default=0.2, ge=0, le=1)
    """Groups that carry more than this share of the cost must not fall under their floors: that is a search
    gone wrong, not a small network. With `refitted` energies it is not, and the floors hold."""


@dataclass(slots=True)
class GroupSearch:
    """Where the annealing is: the current graph, its probabilities, and the next rung of the ladder."""

    config: AnnealingConfig
    graph: ChannelGraph
    macs: float
    """Of one forward pass through the model as it runs."""
    choice: Choice
    """Layers that may go as a whole."""
    units: int
    """All units that could go at the start; what was removed since counts as decided."""
    probabilities: dict[str, FloatArray] | None = None
    first: float | None = None
    """T0"""
    rung: int = 0
    prices: dict[str, FloatArray] | None = None
    sensitivity: dict[str, float] | None = None
    """group -> factor of its units' energies; None until it was measured."""
    gates: dict[str, FloatArray] | None = None
    """Gates that the current weights were trained with, to be folded at the next removal."""
    gone: Gone = NONE_GONE
    """Layers that `graph` is without: they are there still."""

    @property
    def space(self) -> ChannelGraph:
        """The graph with a group of one unit for each layer of the choice."""
        return with_layers(self.graph, self.choice) if self.choice.names else self.graph

    def restricted(self, answer: Changed, keep: Mapping[str, IntArray]) -> None:
        """Follow a removal: what is known of the units that are left."""
        graph = self.graph = answer.graph
        self.macs = answer.forward_macs
        self.probabilities = _taken(self.probabilities, keep, graph)
        self.prices = _taken(self.prices, keep, graph)
        self.gates = None

    def opened(self, layers: Layers) -> None:
        """From now on these layers may go, too; nothing speaks against one yet."""
        self.choice = Choice.of(self.graph, layers)
        if not self.choice.names:
            return
        self.units += len(self.choice.names)
        if self.probabilities is not None:
            self.probabilities |= {name: np.ones(1) for name in self.choice.names}
        self.prices = None

    def without(self, gone: Gone) -> GroupSearch:
        """The same search where these layers are gone and no others may go."""
        graph = self.graph.without_kernels(gone[1]).without_blocks(gone[0])
        everything = {name: np.arange(group.units) for name, group in graph.groups.items()}
        return replace(
            self,
            graph=graph,
            choice=Choice({}, {}),
            gone=gone,
            units=self.units - len(self.choice.names),
            probabilities=_taken(self.probabilities, everything, graph),
            prices=_taken(self.prices, everything, graph),
        )

    def collect(self, task: PruningTask) -> Generator[Directive, Observation, tuple[Energies, LayerEvidence]]:
        """Measure what speaks for units and layers, under the current gates."""
        config, source = self.config, self._source(task)
        if source == "gate_fisher" and not task.has_labels:
            raise ConfigError("source 'gate_fisher' needs labels; use source=conditional", key="source")
        signals = SIGNALS[source] if task.has_data else frozenset({Signal.WEIGHT})
        trials = self.sensitivity is None and source == "refitted" and config.tries(task)
        if trials:
            signals |= MOMENTS
        if self.choice.blocks:
            signals |= {Signal.BLOCK_CHANGE}
        blocks, kernels = self.gone
        refit = config.refit if self.gone != NONE_GONE else "none"
        request = Measure(
            signals, images=config.images, gates=self.gates, blocks=blocks, kernels=kernels, refit=refit
        )
        measured = signals_of((yield request))
        energies = Energies(self.graph, measured, source)
        evidence = LayerEvidence(self.graph, self.choice, measured)
        weights: dict[str, FloatArray] = {}
        moments: dict[str, FloatArray] = {}
        if trials:
            weights = {name: measured.read(Signal.WEIGHT, name) for name in sliced_weights(self.graph)}
            moments = PooledMoments().add(self.graph, measured)
        del measured  # gigabytes; and after the next directive nothing can be read
        if energies.assumed_variance:
            yield Note("energies", {"source": source, "variance": "1 where no activations were measured"})
        if trials:
            trial = config.trial(self.gone, config.images)
            alone = yield from measure_sensitivity(self.graph, weights, moments, _RIDGE, trial)
            self.sensitivity = {name: k**_TRUST for name, k in alone.items()}
        return energies, evidence

    def settle(
        self, task: PruningTask, energies: Energies, evidence: LayerEvidence
    ) -> Generator[Directive, Observation, Settled[Annealed]]:
        """Anneal to the end, again and again, until groups cost the held-out loss the same per saving."""
        return (
            yield from settle(
                self.graph,
                task.budget,
                lambda factors: replace(self, sensitivity=dict(factors)).ended(task.budget, energies, evidence),
                self.sensitivity or {},
                self.config.trial(self.gone),
                self.config.sweeps_of(task) if self.sensitivity else 0,
            )
        )

    def ended(self, budget: Budget, energies: Energies, evidence: LayerEvidence, weight: float = 1.0) -> Annealed:
        """Anneal to the end and harden: the same order, exact counts. The search itself stays where it is."""
        trial = replace(self)
        notes, ranks = trial.anneal(budget, energies, evidence, self.config.temperatures, last=True, weight=weight)
        keep = harden(trial.space, self.choice, budget, ranks)
        return Annealed(keep, ranks, notes)

    def _source(self, task: PruningTask) -> Source:
        if not task.has_data:
            return "weight"
        if self.config.source != "auto":
            return self.config.source
        branched = any(block.of is not None for block in self.graph.blocks.values())
        return "conditional" if self.choice.names or branched else "refitted"  # nothing with branches is refitted

    def coefficients(
        self,
        energies: Energies,
        survival: Mapping[str, FloatArray],
        costs: Mapping[str, FloatArray] | None = None,
    ) -> Coefficients:
        """Lambda of every unit where its companions survive with these probabilities.

        `costs`: of a unit, with mean 1; None takes all to cost the same.
        """
        config, found = self.config, energies.at(survival)
        comparable = energies.source == "refitted"
        if comparable:
            factors = self.sensitivity or {}
            for name, energy in found.items():
                cost = 1.0 if costs is None else costs[name]
                found[name] = factors.get(name, 1.0) * energy * energies.sizes[name] / cost
        normalise = config.normalise and not comparable
        return coefficients(found, energies.sizes, kappa=config.kappa, c1=config.c1, normalise=normalise)

    def anneal(
        self,
        budget: Budget,
        energies: Energies,
        evidence: LayerEvidence,
        until: int,
        *,
        last: bool,
        weight: float = 1.0,
    ) -> tuple[list[Note], dict[str, FloatArray]]:
        """Cool from `rung` to `until`, with damped updates; the last band until everything is decided.

        Beyond `until`, where all units at once did not settle, only some, drawn anew, move at every update; in the
        second half of that coefficients stay as they are and the temperature is next to 0, which decides between
        units that want each other or are the same.
        """
        lattice = Lattice(self.space, budget)
        if not lattice.names or lattice.load(np.ones_like(lattice.even())) <= 1:
            self.probabilities = lattice.named(np.ones_like(lattice.even()))
            self.rung = until
            return [], dict(self.probabilities)
        pi = lattice.even() if self.probabilities is None else lattice.vector(self.probabilities)
        if self.prices is None:
            self.prices = lattice.named(lattice.prices(np.ones_like(pi), self.config.cost_power))
        price = lattice.vector(self.prices)
        costs = lattice.named(lattice.prices(np.ones_like(pi), 1.0))
        notes: list[Note] = []
        value, mu = pi, 0.0
        rng = np.random.default_rng(0)  # of its own: the same search from the same evidence
        stop = until + (self.config.temperatures if last else 0)
        final = until + self.config.temperatures // 2
        while self.rung < stop:
            frozen = self.rung > final
            for _ in range(self.config.updates):
                if not frozen:
                    found = self.coefficients(energies, lattice.named(pi), costs)
                    layers = evidence.at(energies, lattice.named(pi), found.noise, self.config.c1)
                    worth = lattice.worth(pi, evidence.groups)  # Lambda for each unit's worth of savings
                    of_layers = {name: np.array([weight * layers[name] / worth[name]]) for name in layers}
                    value = lattice.vector(found.value | of_layers)
                if self.first is None:
                    of_units = np.concatenate([found.value[name] for name in lattice.names if name in found.value])
                    self.first = max(self.config.hot * float(of_units.std()), _LEAST_HOT)
                temperature = self.first * (_FROZEN if frozen else self.config.cooling**self.rung)
                if self.config.cost == "recomputed":
                    price = lattice.prices(pi, self.config.cost_power)
                ties = np.linspace(_TIE * self.first, 0.0, len(pi)) if frozen else 0.0
                target, mu = lattice.solve(value + ties, price, temperature)
                step = np.full(len(pi), self.config.damping)
                if until <= self.rung <= final:  # units that stand in for each other came and went together
                    step *= rng.random(len(pi)) < _IN_TURN
                pi = pi + step * (target - pi)
            self.rung += 1
            entropy = mean_entropy(pi, self.units)
            values = {"temperature": temperature, "entropy": entropy, "mu": mu, "load": lattice.load(pi)}
            notes.append(Note("anneal", values))
            if last and self.rung >= until and entropy < self._decided:
                break
        self.probabilities = lattice.named(pi)
        if last:
            self._guard(lattice, pi, floors=energies.source == "refitted")
        # pi is saturated where Lambda is far from the threshold: the margin orders what pi cannot tell apart
        margin = value - mu * price
        return notes, lattice.named(pi + 1e-6 * np.tanh(margin / (np.abs(margin).max() + 1e-300)))

    def survivors(self, vanish: float) -> dict[str, IntArray]:
        """Units with at least that probability, as many more as floors, multiples and ties want."""
        keep, probabilities = {}, self.probabilities or {}
        for ladder in ladders(self.graph):
            free = [name for name in ladder.groups if name in probabilities]
            likely = [int((probabilities[name] >= vanish).sum()) for name in free]
            wanted = max(likely, default=int(ladder.counts[-1]))
            count = int(ladder.counts[np.searchsorted(ladder.counts, wanted)])
            for name in ladder.groups:
                rank = probabilities.get(name, np.ones(self.graph.groups[name].units))
                keep[name] = best_units(rank, count)
        return keep

    @property
    def _decided(self) -> float:
        """The entropy below which a search is over: widths are whole, so one unit may stay in between.

        A hundredth more: at 1/2 it alone has all of that, and the others are close to 0 and 1, not there.
        """
        return max(self.config.cold, 1.01 / max(self.units, 1))

    def _guard(self, lattice: Lattice, pi: FloatArray, *, floors: bool) -> None:
        """What a sane annealing leaves: numbers, decisions, its budget, and no stage gone.

        `floors`: energies rise as a group gets narrow, so one that ends at its floor has nothing more to say.
        """
        if not np.isfinite(pi).all():
            bad = int((~np.isfinite(pi)).sum())
            raise PluginError("gsm-anneal", "probabilities are finite", f"{bad} are not.")
        entropy = mean_entropy(pi, self.units)
        if entropy >= self._decided:
            raise PluginError(
                "gsm-anneal",
                "annealing ends decided",
                f"The mean entropy is {entropy:.3f} of log 2, above {self.config.cold}; "
                "raise temperatures, or lower cooling or damping.",
            )
        load = lattice.load(pi)
        if abs(load - 1) > 0.05:
            said = f"The expected cost is {load:.3f} of it; lower damping."
            raise PluginError("gsm-anneal", "annealing ends at its budget", said)
        gone = {} if floors else lattice.collapsed(pi)
        weight = lattice.weight_of(gone)
        if weight > self.config.collapsed:
            worst = min(gone, key=lambda name: gone[name])
            raise PluginError(
                "gsm-anneal",
                "groups do not collapse",
                f"{len(gone)} of {len(lattice.names)} groups, which carry {weight:.0%} of the cost, fell under "
                f"their smallest width, {worst!r} to {gone[worst]:.1f} units. Keep normalise=true, cost=fixed and "
                "damping <= 0.3, ask for less, or allow it by collapsed=1.",
            )


def _taken(
    values: dict[str, FloatArray] | None, keep: Mapping[str, IntArray], graph: ChannelGraph
) -> dict[str, FloatArray] | None:
    if values is None:
        return None
    return {name: values[name][keep[name]] for name in graph.prunable}

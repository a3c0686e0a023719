"""gsm-anneal: expand, measure group sparsity by a Gaussian scale mixture, anneal, remove (methods, section 2).

After Lu et al., Growing-before-Pruning (Pattern Recognition 166, 2025). Per round:

    1  collect the energies e of all units' contributions           `Energies`
    2  Lambda = log(1 + theta^2 / sigma^2), global over groups      `coefficients`
    3  anneal pi = sigmoid((Lambda - mu c) / T) down the ladder     `_anneal`
    4  remove what has pi < vanish, refit, train gated by pi        `_round`

and at the end: harden to exact counts, refit, recover. With expansion "branches" the rounds train parallel
branches (`expansion`), which are merged before the end; then whole layers are units, too (`layers`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from prunus.core.allocation import best_units, ladders, raise_if_unreachable, uniform_keep
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Changed, Directive, Evaluate, Measure, Merge, Note, Observation, Remove
from prunus.core.errors import ConfigError, PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.signals import Signal
from prunus.plugins.annealing import Lattice, mean_entropy
from prunus.plugins.energies import SIGNALS, Energies, Source
from prunus.plugins.expansion import branch_coefficients, branchable, grow_branches, grow_wide
from prunus.plugins.layers import Choice, LayerEvidence, Layers, harden, with_layers
from prunus.plugins.ranking import signals_of
from prunus.plugins.recovery import RecoveryConfig, can_train, changed, evaluated, gentle, recover, removal
from prunus.plugins.scale_mixture import Coefficients, coefficients

WEIGHTS = (1e3, 2.0, 1.4, 1.0, 0.7, 0.5)
"""Factors of what speaks for layers that are tried: with the first, all stay."""
LONG = 20.0
"""From so many epochs on the ladder is cut into rounds that train."""


class GsmAnnealConfig(RecoveryConfig):
    expansion: Literal["none", "wide", "branches"] = "none"
    """`wide` grows groups by `ratio` first, function-preserving, and searches the larger network; `branches` lets
    convolutions run as parallel linear branches, of other kernels and depth, while the rounds train."""
    layers: Literal["auto", "none", "kernels", "blocks", "all"] = "auto"
    """Whole layers that may go: `kernels` shrink to 1 x 1, residual `blocks` vanish; `auto`: all with branches."""
    layer_weight: float | None = Field(default=None, gt=0)
    """Factor of what speaks for a layer, against what it saves; None tries several, and held-out images decide."""
    ratio: float = Field(default=1.5, gt=1, le=4)
    """Width after expansion over width before."""
    grow: Literal["inner", "all"] = "inner"
    """Expand groups that one layer writes, or residual streams too (2.25 times the MACs at ratio 1.5)."""
    source: Source = "conditional"
    """What a unit's energy is: `conditional` on who else survives, `weight`, or `gate_fisher`."""
    normalise: bool = True
    """Bring energies to mean 1 inside each group; without it stages collapse."""
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
    rounds: int | None = Field(default=None, ge=1, le=100)
    """Pieces of the ladder; None is 1 below 20 epochs (with branches 2) and 3 from there on."""
    round_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the training that is spent in rounds, gated; the rest recovers. An epoch counts by its MACs: one of
    a larger model takes as much from the budget as several of the pruned one."""
    round_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the rounds; None is the tail of the run's own cycle, a fifth of its peak to 0."""
    vanish: float = Field(default=0.02, gt=0, lt=0.5)
    """Units below this probability are removed at the end of a round."""
    decay: float = Field(default=5e-4, ge=0)
    """Per-unit weight decay of the scale mixture while training."""
    collapsed: float = Field(default=0.2, ge=0, le=1)
    """Groups that carry more than this share of the cost must not fall under their floors: that is a search
    gone wrong, not a small network."""


@dataclass(slots=True)
class _Search:
    """Where the annealing is: the current graph, its probabilities, and the next rung of the ladder."""

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
    gates: dict[str, FloatArray] | None = None
    """Gates that the current weights were trained with, to be folded at the next removal."""

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


class GsmAnneal(PruningPolicy):
    """Global group sparsity by a Gaussian scale mixture, decided by deterministic annealing."""

    Config: ClassVar[type[PluginConfig]] = GsmAnnealConfig
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT})

    def check(self, task: PruningTask) -> None:
        config = self.config
        assert isinstance(config, GsmAnnealConfig)
        if config.expansion == "branches":
            if not branchable(task.graph):
                said = "no convolution of this model can run as branches; use expansion=none"
                raise ConfigError(said, key="expansion")
            if not _piece(task, config):
                said = (
                    "branches are chosen by training them: expansion=branches needs labels, epochs and rounds > 1"
                )
                raise ConfigError(said, key="expansion")
        if _layers(task, config) != "none" and not task.has_data:
            raise ConfigError("layers are judged by what passes through them; --data is none", key="layers")

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, GsmAnnealConfig)
        layers = _layers(task, config)
        raise_if_unreachable(with_layers(task.graph, Choice.of(task.graph, layers)), task.budget)
        rounds = _rounds(task, config)
        piece = _piece(task, config)
        search = _Search(task.graph, task.graph.cost().macs, Choice({}, {}), _units(task.graph))
        spent = 0.0
        if config.expansion == "wide":
            search.graph, search.macs = yield from grow_wide(task.graph, config.ratio, every=config.grow == "all")
            search.units = _units(search.graph)
        elif config.expansion == "branches":
            search.graph, search.macs = yield from grow_branches(task.graph)
            yield gentle(task, _epochs(task, config, search, piece), config.round_lr, "branches")
            spent += piece
        for k in range(1, rounds):
            yield from _round(task, config, search, k, rounds, piece)
            spent += piece
        if any(block.of is not None for block in search.graph.blocks.values()):
            search.graph = changed((yield Merge())).graph
        search.opened(layers)
        keep = yield from _decide(task, config, search)
        result = changed((yield _remove(task, config, search, keep)))
        if not task.budget.met(result.graph.cost()):
            raise PluginError("gsm-anneal", "the plan meets the budget", f"It costs {result.graph.cost()}.")
        yield from recover(task, config, (1 - spent) * task.epochs)
        return result.plan


def _units(graph: ChannelGraph) -> int:
    return sum(group.units for group in graph.prunable.values())


def _epochs(task: PruningTask, config: GsmAnnealConfig, search: _Search, share: float) -> float:
    """How many epochs of the model as it is now are `share` of the whole training of the pruned one, in MACs."""
    pruned = task.budget.limits.get("macs")
    if pruned is None:  # as many as the same share of every group leaves
        space = with_layers(task.graph, Choice.of(task.graph, _layers(task, config)))
        keep = uniform_keep(space, task.budget, {name: np.ones(g.units) for name, g in space.prunable.items()})
        pruned = space.cost({name: len(units) for name, units in keep.items()}).macs
    return share * task.epochs * min(pruned / search.macs, 1.0)


def _layers(task: PruningTask, config: GsmAnnealConfig) -> Layers:
    """Latency is measured layer by layer as they are: nothing is known of what a 1 x 1 kernel would take."""
    layers = config.layers
    if layers == "auto":
        layers = "all" if config.expansion == "branches" and task.has_data else "none"
    if any(target.quantity == "latency" for target in task.budget.targets):
        layers = {"all": "blocks", "kernels": "none"}.get(layers, layers)  # type: ignore[assignment]
    return layers


def _rounds(task: PruningTask, config: GsmAnnealConfig) -> int:
    if config.rounds is not None:
        return min(config.rounds, config.temperatures)
    if not can_train(task, task.epochs):
        return 1
    return 3 if task.epochs >= LONG else 2 if config.expansion == "branches" else 1


def _piece(task: PruningTask, config: GsmAnnealConfig) -> float:
    """Share of the whole training that each round takes."""
    rounds = _rounds(task, config)
    return config.round_share / rounds if rounds > 1 and can_train(task, task.epochs) else 0.0


def _round(
    task: PruningTask, config: GsmAnnealConfig, search: _Search, k: int, rounds: int, piece: float
) -> Generator[Directive, Observation, None]:
    """Anneal one band of the ladder towards its budget, remove what vanished, train the rest under its gates.

    `piece`: share of the whole training.
    """
    budget = task.budget.partway(k / rounds, search.graph.cost() if k == 1 else None)
    until = round(config.temperatures * k / rounds)
    yield from _settle(task, config, search, budget, until)
    assert search.probabilities is not None
    keep = _survivors(search.graph, search.probabilities, config.vanish)
    branches = yield from branch_coefficients(search.graph, config.kappa, config.c1)
    if branches.weak or any(len(units) < search.graph.groups[name].units for name, units in keep.items()):
        removal = replace(_remove(task, config, search, keep), blocks=branches.weak)
        search.restricted(changed((yield replace(removal, refit="none") if branches.names else removal)), keep)
    if can_train(task, piece * task.epochs):
        rates = (yield from _measured(task, config, search))[1].decay(config.decay)
        search.gates = dict(search.probabilities)
        label = f"anneal {k} of {rounds}"
        decay = rates | branches.decay(config.decay)
        epochs = _epochs(task, config, search, piece)
        yield gentle(task, epochs, config.round_lr, label, gates=search.gates, decay=decay)


def _decide(
    task: PruningTask, config: GsmAnnealConfig, search: _Search
) -> Generator[Directive, Observation, dict[str, IntArray]]:
    """Collect statistics, anneal to the end, harden: the same order, exact counts.

    How much a layer is worth beside channels is tried: each outcome is refitted, and judged by held-out images.
    """
    if search.gates is not None:  # what is tried and refitted is the function that was trained
        search.graph = changed((yield Remove(keep={}, gates=search.gates))).graph
        search.gates = None
    evidence = yield from _collected(task, config, search)
    weights: tuple[float, ...] = (1.0,) if config.layer_weight is None else (config.layer_weight,)
    if config.layer_weight is None and search.choice.names and task.has_labels:
        weights = WEIGHTS
    outcomes: dict[object, tuple[float, dict[str, IntArray], list[Note], _Search]] = {}
    for weight in weights:
        trial = replace(search)
        try:
            notes, ranks = _anneal(
                config, trial, task.budget, *evidence, config.temperatures, last=True, weight=weight
            )
        except PluginError:
            if weight != weights[-1] or not outcomes:
                raise
            break
        keep = harden(trial.space, search.choice, task.budget, ranks)
        gone = search.choice.gone(keep, search.graph)
        if gone in outcomes:
            continue
        loss = 0.0
        if len(weights) > 1:
            loss = evaluated((yield _trial(config, search, keep))).loss
            yield Note("layers", {"weight": weight, "blocks": len(gone[0]), "kernels": len(gone[1]), "loss": loss})
        outcomes[gone] = loss, keep, notes, trial
    _, keep, notes, trial = min(outcomes.values(), key=lambda outcome: outcome[0])
    search.probabilities, search.rung = trial.probabilities, trial.rung
    yield from notes
    return keep


def _trial(config: GsmAnnealConfig, search: _Search, keep: Mapping[str, IntArray]) -> Evaluate:
    blocks, kernels = search.choice.gone(keep, search.graph)
    units = {name: kept for name, kept in keep.items() if name in search.graph.groups}
    return Evaluate(within=units, blocks=blocks, kernels=kernels, refit=config.refit)


def _settle(
    task: PruningTask, config: GsmAnnealConfig, search: _Search, budget: Budget, until: int
) -> Generator[Directive, Observation, None]:
    """Collect statistics and anneal down to rung `until`."""
    evidence = yield from _collected(task, config, search)
    notes, _ = _anneal(config, search, budget, *evidence, until, last=False)
    yield from notes


def _collected(
    task: PruningTask, config: GsmAnnealConfig, search: _Search
) -> Generator[Directive, Observation, tuple[Energies, LayerEvidence]]:
    source: Source = config.source if task.has_data else "weight"
    signals = SIGNALS[source] if task.has_data else frozenset({Signal.WEIGHT})
    if source == "gate_fisher" and not task.has_labels:
        raise ConfigError("source 'gate_fisher' needs labels; use source=conditional", key="source")
    if search.choice.blocks:
        signals |= {Signal.BLOCK_CHANGE}
    measured = signals_of((yield Measure(signals=signals, images=config.images, gates=search.gates)))
    energies = Energies(search.graph, measured, source)
    evidence = LayerEvidence(search.graph, search.choice, measured)
    if energies.assumed_variance:
        yield Note("energies", {"source": source, "variance": "1 where no activations were measured"})
    return energies, evidence


def _measured(
    task: PruningTask, config: GsmAnnealConfig, search: _Search
) -> Generator[Directive, Observation, tuple[Energies, Coefficients]]:
    assert search.probabilities is not None
    energies, _ = yield from _collected(task, config, search)
    return energies, _coefficients(config, energies, search.probabilities)


def _coefficients(
    config: GsmAnnealConfig, energies: Energies, survival: Mapping[str, FloatArray], *, fresh: bool = True
) -> Coefficients:
    found = energies.at(survival, fresh=fresh)
    return coefficients(found, energies.sizes, kappa=config.kappa, c1=config.c1, normalise=config.normalise)


def _anneal(
    config: GsmAnnealConfig,
    search: _Search,
    budget: Budget,
    energies: Energies,
    evidence: LayerEvidence,
    until: int,
    *,
    last: bool,
    weight: float = 1.0,
) -> tuple[list[Note], dict[str, FloatArray]]:
    """Cool from `search.rung` to `until`, with damped updates; the last band until everything is decided."""
    lattice = Lattice(search.space, budget)
    if not lattice.names or lattice.load(np.ones_like(lattice.even())) <= 1:
        search.probabilities = lattice.named(np.ones_like(lattice.even()))
        search.rung = until
        return [], dict(search.probabilities)
    pi = lattice.even() if search.probabilities is None else lattice.vector(search.probabilities)
    if search.prices is None:
        search.prices = lattice.named(lattice.prices(np.ones_like(pi), config.cost_power))
    price = lattice.vector(search.prices)
    notes: list[Note] = []
    value, mu = pi, 0.0
    stop = until + (config.temperatures if last else 0)
    while search.rung < stop:
        for update in range(config.updates):
            found = _coefficients(config, energies, lattice.named(pi), fresh=update == 0)
            layers = evidence.at(energies, lattice.named(pi), found.noise, config.c1)
            worth = lattice.worth(pi, evidence.groups)  # Lambda for each unit's worth of what a layer saves
            of_layers = {name: np.array([weight * layers[name] / worth[name]]) for name in layers}
            value = lattice.vector(found.value | of_layers)
            if search.first is None:
                of_units = np.concatenate([found.value[name] for name in lattice.names if name in found.value])
                search.first = max(config.hot * float(of_units.std()), 1e-9)
            temperature = search.first * config.cooling**search.rung
            if config.cost == "recomputed":
                price = lattice.prices(pi, config.cost_power)
            target, mu = lattice.solve(value, price, temperature)
            pi = (1 - config.damping) * pi + config.damping * target
        search.rung += 1
        entropy = mean_entropy(pi, search.units)
        notes.append(_note(temperature, entropy, mu, lattice.load(pi)))
        if last and search.rung >= until and entropy < _decided(config, search):
            break
    search.probabilities = lattice.named(pi)
    if last:
        _guard(config, search, lattice, pi)
    # pi is saturated where Lambda is far from the threshold: the margin orders what pi cannot tell apart
    margin = value - mu * price
    return notes, lattice.named(pi + 1e-6 * np.tanh(margin / (np.abs(margin).max() + 1e-300)))


def _note(temperature: float, entropy: float, mu: float, load: float) -> Note:
    return Note("anneal", {"temperature": temperature, "entropy": entropy, "mu": mu, "load": load})


def _decided(config: GsmAnnealConfig, search: _Search) -> float:
    """The entropy below which a search is over: widths are whole, so one unit may stay in between."""
    return max(config.cold, 1 / max(search.units, 1))


def _guard(config: GsmAnnealConfig, search: _Search, lattice: Lattice, pi: FloatArray) -> None:
    """What a sane annealing leaves: numbers, decisions, its budget, and no stage gone."""
    if not np.isfinite(pi).all():
        raise PluginError("gsm-anneal", "probabilities are finite", f"{int((~np.isfinite(pi)).sum())} are not.")
    entropy = mean_entropy(pi, search.units)
    if entropy >= _decided(config, search):
        raise PluginError(
            "gsm-anneal",
            "annealing ends decided",
            f"The mean entropy is {entropy:.3f} of log 2, above {config.cold}; "
            "raise temperatures, or lower cooling or damping.",
        )
    load = lattice.load(pi)
    if abs(load - 1) > 0.05:
        raise PluginError(
            "gsm-anneal", "annealing ends at its budget", f"The expected cost is {load:.3f} of it; lower damping."
        )
    gone = lattice.collapsed(pi)
    weight = lattice.weight_of(gone)
    if weight > config.collapsed:
        worst = min(gone, key=lambda name: gone[name])
        raise PluginError(
            "gsm-anneal",
            "groups do not collapse",
            f"{len(gone)} of {len(lattice.names)} groups, which carry {weight:.0%} of the cost, fell under their "
            f"smallest width, {worst!r} to {gone[worst]:.1f} units. Keep normalise=true, cost=fixed and "
            "damping <= 0.3, ask for less, or allow it by collapsed=1.",
        )


def _survivors(graph: ChannelGraph, probabilities: Mapping[str, FloatArray], vanish: float) -> dict[str, IntArray]:
    """Units with at least that probability, as many more as floors, multiples and ties want."""
    keep = {}
    for ladder in ladders(graph):
        free = [name for name in ladder.groups if name in probabilities]
        wanted = max((int((probabilities[name] >= vanish).sum()) for name in free), default=int(ladder.counts[-1]))
        count = int(ladder.counts[np.searchsorted(ladder.counts, wanted)])
        for name in ladder.groups:
            rank = probabilities.get(name, np.ones(graph.groups[name].units))
            keep[name] = best_units(rank, count)
    return keep


def _remove(task: PruningTask, config: GsmAnnealConfig, search: _Search, keep: Mapping[str, IntArray]) -> Remove:
    """What the search decided: units of groups, and whole layers."""
    blocks, kernels = search.choice.gone(keep, search.graph)
    units = {name: kept for name, kept in keep.items() if name in search.graph.groups}
    return replace(removal(task, config, units), gates=search.gates, blocks=blocks, kernels=kernels)


def _taken(
    values: dict[str, FloatArray] | None, keep: Mapping[str, IntArray], graph: ChannelGraph
) -> dict[str, FloatArray] | None:
    if values is None:
        return None
    return {name: values[name][keep[name]] for name in graph.prunable}

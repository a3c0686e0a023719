"""gsm-anneal: expand, measure group sparsity by a Gaussian scale mixture, anneal, remove (methods, section 2).

After Lu et al., Growing-before-Pruning (Pattern Recognition 166, 2025). Per round:

    1  collect the energies e of all units' contributions           `Energies`
    2  Lambda = log(1 + theta^2 / sigma^2), global over groups      `coefficients`
    3  anneal pi = sigmoid((Lambda - mu c) / T) down the ladder     `GroupSearch`
    4  remove what has pi < vanish, refit, train gated by pi        `_round`

and at the end: harden to exact counts, refit, recover. With expansion "branches" the rounds train parallel
branches (`expansion`), which are merged before the end; then whole layers are units, too (`layers`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from prunus.core.allocation import raise_if_unreachable, uniform_keep
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Directive, Merge, Note, Observation, Remove
from prunus.core.errors import ConfigError, PluginError, UnreachableTargetError
from prunus.core.graph import ChannelGraph
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.signals import Signal
from prunus.plugins.expansion import branch_coefficients, branchable, grow_branches, grow_wide
from prunus.plugins.group_search import Annealed, AnnealingConfig, GroupSearch
from prunus.plugins.layers import Choice, Layers, with_layers
from prunus.plugins.recovery import can_train, changed, evaluated, gentle, recover, removal
from prunus.plugins.sensitivity import NONE_GONE, Gone

WEIGHTS = (2.0, 1.4, 1.0, 0.7, 0.5)
"""Factors of what speaks for layers: each proposes some that go."""
LONG = 20.0
"""From so many epochs on an expanded network is pruned in more rounds that train."""


class GsmAnnealConfig(AnnealingConfig):
    expansion: Literal["none", "wide", "branches"] = "none"
    """`wide` grows groups by `ratio` first, function-preserving, and searches the larger network; `branches` lets
    convolutions run as parallel linear branches, of other kernels and depth, while the rounds train."""
    layers: Literal["auto", "none", "kernels", "blocks", "all"] = "auto"
    """Whole layers that may go: `kernels` shrink to 1 x 1, residual `blocks` vanish; `auto`: all with branches.
    Held-out images decide between several sets of them, and none."""
    layer_weight: float | None = Field(default=None, gt=0)
    """Factor of what speaks for a layer, against what it saves, which then decides; None proposes by several."""
    ratio: float = Field(default=1.5, gt=1, le=4)
    """Width after expansion over width before."""
    grow: Literal["inner", "all"] = "inner"
    """Expand groups that one layer writes, or residual streams too (2.25 times the MACs at ratio 1.5)."""
    rounds: int | None = Field(default=None, ge=1, le=100)
    """Pieces of the ladder; None is 1 without expansion (rounds that train bring nothing there:
    benchmarks/results/annealing), and with it 1 below 20 epochs (2 for branches) and 3 from there on."""
    round_share: float = Field(default=0.2, ge=0, le=1)
    """Share of the training for rounds, gated, in equal parts; the last round trains only where there are
    branches, and leaves its part to the recovery, as all of the rest. An epoch counts by its MACs: one of a larger
    model takes as much from the budget as several of the pruned one."""
    round_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the rounds; None is the tail of the recovery's cycle, a fifth of its peak to 0."""
    vanish: float = Field(default=0.02, gt=0, lt=0.5)
    """Units below this probability are removed at the end of a round."""
    decay: float = Field(default=5e-4, ge=0)
    """Per-unit weight decay of the scale mixture while training."""


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
        search = GroupSearch(config, task.graph, task.graph.cost().macs, Choice({}, {}), _units(task.graph))
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
        keep, gone = yield from _decide(task, config, search)
        result = changed((yield _remove(task, config, search, keep, gone)))
        if not task.budget.met(result.graph.cost()):
            raise PluginError("gsm-anneal", "the plan meets the budget", f"It costs {result.graph.cost()}.")
        yield from recover(task, config, (1 - spent) * task.epochs)
        return result.plan


def _units(graph: ChannelGraph) -> int:
    return sum(group.units for group in graph.prunable.values())


def pruned_macs(task: PruningTask, config: GsmAnnealConfig) -> float:
    """MACs of the pruned network: those of the target, or what the same share of every group leaves."""
    limit = task.budget.limits.get("macs")
    if limit is not None:
        return limit
    space = with_layers(task.graph, Choice.of(task.graph, _layers(task, config)))
    keep = uniform_keep(space, task.budget, {name: np.ones(g.units) for name, g in space.prunable.items()})
    return space.cost({name: len(units) for name, units in keep.items()}).macs


def _epochs(task: PruningTask, config: GsmAnnealConfig, search: GroupSearch, share: float) -> float:
    """How many epochs of the model as it is now are `share` of the whole training of the pruned one, in MACs."""
    return share * task.epochs * min(pruned_macs(task, config) / search.macs, 1.0)


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
    if config.expansion == "none" or not can_train(task, task.epochs):
        return 1
    return 3 if task.epochs >= LONG else 2 if config.expansion == "branches" else 1


def _piece(task: PruningTask, config: GsmAnnealConfig) -> float:
    """Share of the whole training that each round takes."""
    rounds = _rounds(task, config)
    return config.round_share / rounds if rounds > 1 and can_train(task, task.epochs) else 0.0


def _round(
    task: PruningTask, config: GsmAnnealConfig, search: GroupSearch, k: int, rounds: int, piece: float
) -> Generator[Directive, Observation, None]:
    """Anneal one band of the ladder towards its budget, remove what vanished, train the rest under its gates.

    `piece`: share of the whole training.
    """
    budget = task.budget.partway(k / rounds, search.graph.cost() if k == 1 else None)
    notes = yield from _band(task, search, budget, round(config.temperatures * k / rounds))
    yield from notes
    keep = search.survivors(config.vanish)
    branches = yield from branch_coefficients(search.graph, config.kappa, config.c1)
    if branches.weak or any(len(units) < search.graph.groups[name].units for name, units in keep.items()):
        removal = replace(_remove(task, config, search, keep), blocks=branches.weak)
        search.restricted(changed((yield replace(removal, refit="none") if branches.names else removal)), keep)
    if can_train(task, piece * task.epochs):
        assert search.probabilities is not None
        rates = yield from _unit_decay(task, config, search, search.probabilities)
        search.gates = dict(search.probabilities)
        label = f"anneal {k} of {rounds}"
        decay = rates | branches.decay(config.decay)
        epochs = _epochs(task, config, search, piece)
        yield gentle(task, epochs, config.round_lr, label, gates=search.gates, decay=decay)


def _band(
    task: PruningTask, search: GroupSearch, budget: Budget, until: int
) -> Generator[Directive, Observation, list[Note]]:
    """One band of the ladder. Its statistics end here: they are gigabytes, and training needs as much."""
    notes, _ = search.anneal(budget, *(yield from search.collect(task)), until, last=False)
    return notes


def _unit_decay(
    task: PruningTask, config: GsmAnnealConfig, search: GroupSearch, survival: Mapping[str, FloatArray]
) -> Generator[Directive, Observation, dict[str, FloatArray]]:
    """group -> (units,): weight decay by the scale mixture of what is left; its statistics end here, too."""
    energies, _ = yield from search.collect(task)
    return search.coefficients(energies, survival).decay(config.decay)


def _decide(
    task: PruningTask, config: GsmAnnealConfig, search: GroupSearch
) -> Generator[Directive, Observation, tuple[dict[str, IntArray], Gone]]:
    """Which layers go is proposed with one threshold for layers and channels; for each proposal, and for none,
    widths are searched and tried, and held-out images decide."""
    if search.gates is not None:  # what is tried and refitted is the function that was trained
        search.graph = changed((yield Remove(keep={}, gates=search.gates))).graph
        search.gates = None
    proposals = (yield from _proposals(task, config, search)) if search.choice.names else [NONE_GONE]
    best: tuple[float, Annealed, Gone] | None = None
    for gone in proposals:
        rest = search.without(gone)
        try:
            settled = yield from rest.settle(task, *(yield from rest.collect(task)))
        except (PluginError, UnreachableTargetError):
            if best is None and gone == proposals[-1]:
                raise
            continue
        loss = settled.loss
        if len(proposals) > 1:
            if loss is None:
                loss = evaluated((yield replace(config.trial(gone), within=settled.proposal.keep))).loss
            yield Note("layers", {"blocks": len(gone[0]), "kernels": len(gone[1]), "loss": loss})
        if best is None or (loss or 0.0) < best[0]:
            best = loss or 0.0, settled.proposal, gone
    assert best is not None
    _, annealed, gone = best
    yield from annealed.notes
    return annealed.keep, gone


def _proposals(
    task: PruningTask, config: GsmAnnealConfig, search: GroupSearch
) -> Generator[Directive, Observation, list[Gone]]:
    """Layers that may go, by how much one is worth beside channels; none is among them where trials can tell."""
    energies, evidence = yield from search.collect(task)
    if config.layer_weight is not None or not task.has_labels:
        annealed = search.ended(task.budget, energies, evidence, config.layer_weight or 1.0)
        return [search.choice.gone(annealed.keep, search.graph)]
    found = [NONE_GONE]
    for weight in WEIGHTS:
        try:
            annealed = search.ended(task.budget, energies, evidence, weight)
        except PluginError:
            continue
        gone = search.choice.gone(annealed.keep, search.graph)
        if gone not in found:
            found.append(gone)
    return found


def _remove(
    task: PruningTask,
    config: GsmAnnealConfig,
    search: GroupSearch,
    keep: Mapping[str, IntArray],
    gone: Gone = NONE_GONE,
) -> Remove:
    """What the search decided: units of groups, and whole layers."""
    blocks, kernels = gone
    return replace(removal(task, config, keep), gates=search.gates, blocks=blocks, kernels=kernels)

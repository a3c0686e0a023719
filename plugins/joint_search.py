"""Joint search and training from scratch: pruning as a search strategy (methods.md, section 1).

After X. T. Lu et al., IJCAI 2020 and TPAMI 2023, in the progressive form: a randomly initialised network
with learnable unit weights is trained on its hold-out and its train part in turn; at falling budgets,
noisy keep-sets are cut at thresholds that a network generates; the best sub-network is extracted, becomes
the next target, is taught by several teachers, and gets all the compute that is left.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from prunus.core.allocation import global_keep, raise_if_unreachable, smallest_counts
from prunus.core.cost import IntArray
from prunus.core.directives import (
    Directive,
    Distillation,
    Evaluate,
    Measure,
    Note,
    Observation,
    Remove,
    Snapshot,
    Train,
)
from prunus.core.errors import ConfigError
from prunus.core.graph import ChannelGraph
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.signals import Signal
from prunus.plugins.depth import spread_blocks
from prunus.plugins.ranking import signals_of
from prunus.plugins.recovery import changed, evaluated
from prunus.plugins.threshnet import ThreshNet
from prunus.plugins.threshold_search import ThresholdSearch, cut_scores, mean_overlap, unit_masses
from prunus.plugins.training_ledger import TrainingLedger
from prunus.plugins.unit_weights import UnitWeights, output_energies

_CONVERGED = 0.98
_FALL = 0.7
"""A round keeps about so much of the budget's quantity, unless `rounds` says otherwise."""
_FINAL_PIECES = 4
_LEAST_LOAD = 0.9
"""Blocks that go before the search leave at least this share of the target to be used."""


class JointSearchConfig(PluginConfig):
    rounds: int | None = Field(default=None, ge=1, le=20)
    """Extractions on the way to the target; None takes about 30% of the cost away in each."""
    cold_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the epochs that the whole network is trained before anything is removed."""
    round_share: float = Field(default=0.06, gt=0, lt=1)
    """Share of the epochs after each extraction but the last, which is trained with all that is left."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the one cycle over everything; None is the run's."""
    clip: float = Field(default=2.0, ge=0)
    """Largest norm of the gradients of a step; 0 is none. Without, a network that the peak rate is too high for
    loses what it learned and seldom recovers (benchmarks/results/joint_search.md#a-rate-that-is-too-high)."""
    fewer_blocks: float = Field(default=0.0, ge=0, le=1)
    """Share of the residual blocks that go before anything is trained, evenly from all stages, while the target
    asks for it. What they cost is left for wider layers (benchmarks/results/joint_search.md)."""
    unit_weights: Literal["learned", "random", "none"] = "learned"
    """Learned on the hold-out while training; `random` and `none` are for ablation."""
    unit_rate: float = Field(default=0.05, gt=0, le=1)
    """Largest usual step of a unit weight."""
    variance_reward: float = Field(default=1.0, ge=0)
    """How strongly unit weights of a group are driven apart."""
    noise: float = Field(default=0.3, ge=0)
    """Scale of the Gumbel perturbation of log energies, falling to 0 over the rounds."""
    sharpness: float = Field(default=1.0, ge=0.25, le=10)
    """Divides log energies before the softmax (tau)."""
    evaluations: int = Field(default=0, ge=0, le=4000)
    """Sub-networks that ThreshNet proposes over all rounds; 0 cuts all groups at one shared threshold. Off by
    default: at equal compute it has not earned its proposals yet (benchmarks/results/joint_search.md)."""
    search_share: float = Field(default=0.15, ge=0, lt=1)
    """ThreshNet proposes no more once the search has used this share of all compute."""
    offset_limit: float = Field(default=2.0, gt=1, le=8)
    """Largest factor by which ThreshNet changes what a group discards at the shared threshold."""
    reward_images: int = Field(default=512, ge=8)
    """Held-out images that judge a proposal."""
    reward_refit: Literal["sequential", "least-squares"] = "sequential"
    """The refit before a proposal is judged; `least-squares`, with batch-norm statistics re-estimated, is quicker
    and rougher. The last comparison of a round always refits sequentially."""
    images: int = Field(default=1024, ge=8)
    """Images for signals, refits and the last comparison of a round's candidates."""
    teachers: Literal["auto", "named", "never"] = "named"
    """Who teaches while it beats the student: `named` are the user's teachers, `auto` adds the moving average and
    the best larger sub-network. At equal compute these two cost more than they bring
    (benchmarks/results/joint_search.md)."""
    distil_weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the teachers in the loss."""
    ema: float = Field(default=0.99, gt=0, lt=1)
    """Decay per step of the moving average."""


class JointSearch(PruningPolicy):
    """Search for a compact network and train it at the same time, from random weights."""

    Config: ClassVar[type[PluginConfig]] = JointSearchConfig
    starts_from: ClassVar[Literal["trained", "scratch"]] = "scratch"
    needs: ClassVar[frozenset[Signal]] = frozenset(
        {Signal.WEIGHT, Signal.ACTIVATION_VARIANCE, Signal.GATE_GRADIENT}
    )

    def check(self, task: PruningTask) -> None:
        if not task.has_data or not task.has_labels:
            raise ConfigError(
                "joint-search trains from scratch and needs labelled images; got none. Give --data, or use "
                "--plugin one-shot for a trained model",
                key="data",
            )
        if task.epochs <= 0:
            raise ConfigError(
                f"joint-search trains from scratch and needs epochs; got --epochs {task.epochs:g}", key="epochs"
            )
        if task.classes is not None and task.classes < 2:
            raise ConfigError(
                f"joint-search learns to tell classes apart; the data has {task.classes} class", key="data"
            )
        config = self.config
        assert isinstance(config, JointSearchConfig)
        if config.fewer_blocks and not task.graph.blocks:
            said = "no block of this model passes its input through, so none can go; use fewer_blocks=0"
            raise ConfigError(said, key="fewer_blocks")
        blocks = _blocks_to_spare(task, config.fewer_blocks)
        raise_if_unreachable(task.graph.without_blocks(blocks), task.budget)

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, JointSearchConfig)
        graph = task.graph
        ledger = TrainingLedger(task.epochs, graph.cost(), task.held_out, task.calibration)
        teachers = _Teachers(task, config, ledger)
        yield from teachers.check_users()
        net = ThreshNet(task.rng, limit=config.offset_limit)
        search = ThresholdSearch(
            net,
            task.rng,
            ledger,
            config.reward_images,
            config.images,
            config.search_share,
            config.reward_refit,
        )
        blocks = _blocks_to_spare(task, config.fewer_blocks)
        if blocks:
            graph = changed((yield Remove({}, blocks=blocks))).graph
            yield Note("depth", {"gone": ", ".join(blocks), "macs": graph.cost().macs / task.graph.cost().macs})
        start, prunable = graph.cost(), tuple(graph.prunable)
        originals: dict[str, IntArray] = {n: np.arange(units, dtype=np.int64) for n, units in graph.units.items()}
        load = max(task.budget.load(start), 1.0)
        rounds = config.rounds or max(1, math.ceil(math.log(1 / load) / math.log(_FALL) - 0.1))
        overlaps: list[float] = []
        foreseen: dict[str, IntArray] = {}

        weights = UnitWeights(graph, config.unit_weights, config.unit_rate, config.variance_reward, task.rng)
        cold = task.epochs * config.cold_share
        graph = yield from _train_target(graph, weights, config, ledger, cold, pieces=4, warmup=0.3)
        index, progress = 0, 0.0
        while True:
            index += 1
            progress = 1.0 if index >= rounds or _converged(overlaps) else index / rounds
            budget = task.budget.partway(progress, start)
            measured = signals_of((yield Measure(frozenset(_ENERGY), images=config.images)))
            energies = weights.weighted(output_energies(graph, measured))

            at_target = global_keep(graph, task.budget, cut_scores(unit_masses(energies, config.sharpness)))
            ahead = {name: originals[name][units] for name, units in at_target.items()}
            if foreseen:
                overlaps.append(mean_overlap(foreseen, ahead, prunable))
                yield Note("overlap", {"round": index, "jaccard": overlaps[-1]})
            foreseen = ahead

            noise = config.noise * (1 - progress)
            episodes = config.evaluations // rounds
            keep = yield from search.choose(
                graph, budget, energies, index, episodes, noise, config.sharpness, progress
            )
            yield from teachers.remember(graph)
            result = changed(
                (yield Remove(keep, refit="sequential", recalibrate="if-better", images=config.images))
            )
            ledger.add_refit(graph, result.graph, config.images)
            graph, originals = result.graph, {n: originals[n][units] for n, units in keep.items()}
            if progress >= 1.0:
                break
            weights = UnitWeights(graph, config.unit_weights, config.unit_rate, config.variance_reward, task.rng)
            taught = yield from teachers.choose(graph, ())
            piece = task.epochs * config.round_share
            graph = yield from _train_target(graph, weights, config, ledger, piece, pieces=2, distil=taught)
        yield from _finish(graph, config, ledger, teachers)
        return result.plan


def _blocks_to_spare(task: PruningTask, share: float) -> tuple[str, ...]:
    """`share` of the blocks, or as many as leave a network of about the target's cost that can still meet it."""
    blocks = spread_blocks(task.graph, share)
    while blocks and task.budget.load(task.graph.without_blocks(blocks).cost()) < _LEAST_LOAD:
        deeper = task.graph.without_blocks(blocks[:-1])
        if task.budget.load(deeper.cost(smallest_counts(deeper))) > 1.0:
            break
        blocks = blocks[:-1]
    return blocks


_ENERGY = (Signal.WEIGHT, Signal.ACTIVATION_VARIANCE)


def _converged(overlaps: list[float]) -> bool:
    return len(overlaps) >= 2 and min(overlaps[-2:]) >= _CONVERGED


def _train_target(
    graph: ChannelGraph,
    weights: UnitWeights,
    config: JointSearchConfig,
    ledger: TrainingLedger,
    epochs: float,
    *,
    pieces: int,
    warmup: float = 0.0,
    distil: Distillation | None = None,
) -> Generator[Directive, Observation, ChannelGraph]:
    """Train the target at the constant peak rate; unit weights learn between the pieces, then fold in."""
    if not weights.learned:
        pieces = 1
    for k in range(pieces):
        train = Train(
            min(epochs / pieces, ledger.epochs_left(graph)),
            lr=config.lr,
            warmup=warmup,
            schedule="constant",
            start=k / pieces,
            stop=(k + 1) / pieces,
            gates=weights.gates,
            distil=distil,
            clip=config.clip or None,
            label="search",
        )
        yield from ledger.train(graph, train)
        if weights.learned:
            signals = frozenset({Signal.GATE_GRADIENT})
            seen = yield Measure(signals, split="holdout", images=config.images, gates=weights.gates)
            ledger.add_backward(graph, config.images)
            weights.learn(signals_of(seen))
    if weights.gates is None:
        return graph
    yield Note("unit-weights", weights.spread())
    return changed((yield Remove({}, gates=weights.gates))).graph


def _finish(
    graph: ChannelGraph, config: JointSearchConfig, ledger: TrainingLedger, teachers: _Teachers
) -> Generator[Directive, Observation, None]:
    """All remaining compute for the final network: the falling half of the cycle."""
    for k in range(_FINAL_PIECES):
        if ledger.epochs_left(graph) <= 0:
            break
        taught = yield from teachers.choose(graph, ("ema",) if k > 0 else ())
        factor = teachers.cost_factor(graph, taught)
        train = Train(
            ledger.epochs_left(graph, factor) / (_FINAL_PIECES - k),
            lr=config.lr,
            warmup=0.0,
            start=k / _FINAL_PIECES,
            stop=(k + 1) / _FINAL_PIECES,
            distil=taught,
            ema=config.ema if teachers.own else None,
            clip=config.clip or None,
            label="train",
        )
        yield from ledger.train(graph, train)
    yield Note("compute", ledger.summary())


class _Teachers:
    """Who may teach: only who beats the student on the hold-out at the moment."""

    def __init__(self, task: PruningTask, config: JointSearchConfig, ledger: TrainingLedger) -> None:
        self.own = config.teachers == "auto"
        """Whether the network's own moving average and larger sub-network may teach."""
        self._named = () if config.teachers == "never" else task.teachers
        self._task, self._config, self._ledger = task, config, ledger
        self._larger: tuple[float, ChannelGraph] | None = None
        self._of_named: dict[str, float] = {}
        """Held-out accuracy of the user's teachers, which learn nothing more."""

    def check_users(self) -> Generator[Directive, Observation, None]:
        """Judge the user's teachers; one that cannot answer for this data fails before anything is trained."""
        for name in self._named:
            self._of_named[name] = yield from self._accuracy(self._task.graph, name)
            yield Note("teacher", {"name": name, "accuracy": self._of_named[name]})

    def remember(self, graph: ChannelGraph) -> Generator[Directive, Observation, None]:
        """Keep the current target as a teacher if it is the best so far."""
        if not self.own:
            return
        accuracy = yield from self._accuracy(graph, None)
        if self._larger is None or accuracy >= self._larger[0]:
            yield Snapshot("larger")
            self._larger = (accuracy, graph)

    def choose(
        self, graph: ChannelGraph, further: tuple[str, ...]
    ) -> Generator[Directive, Observation, Distillation | None]:
        own = (*(("larger",) if self._larger else ()), *further) if self.own else ()
        names = (*own, *self._named)
        if not names:
            return None
        student = yield from self._accuracy(graph, None)
        better, values = [], {"student": student}
        for name in names:
            if name in self._of_named:
                values[name] = self._of_named[name]
            else:
                values[name] = yield from self._accuracy(self._graph_of(name, graph), name)
            if values[name] > student:
                better.append(name)
        yield Note("teachers", {**values, "teaching": ", ".join(better) or "none"})
        return Distillation(tuple(better), weight=self._config.distil_weight) if better else None

    def cost_factor(self, graph: ChannelGraph, taught: Distillation | None) -> float:
        """Training MACs with these teachers over those without: a forward pass is a third of a step."""
        if taught is None:
            return 1.0
        teachers = sum(self._graph_of(name, graph).cost().macs for name in taught.teachers)
        return 1.0 + teachers / max(3.0 * graph.cost().macs, 1.0)

    def _graph_of(self, name: str, graph: ChannelGraph) -> ChannelGraph:
        if name == "larger" and self._larger is not None:
            return self._larger[1]
        # the user's own teachers are of unknown size: as large as the original, until Trained.macs tells
        return self._task.graph if name in self._named else graph

    def _accuracy(self, graph: ChannelGraph, name: str | None) -> Generator[Directive, Observation, float]:
        answer = evaluated((yield Evaluate(model=name, images=self._config.images)))
        self._ledger.add_forward(graph, answer.samples)
        return answer.accuracy

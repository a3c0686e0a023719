"""Bayesian iterative pruning with reparameterization (methods.md, section 3).

After X. T. Lu et al., ACM MM 2022: units are judged by the change of the output distribution that their
removal leaves after the best refit; a Bayesian model of every unit, corrected by each round's results,
predicts the probability that it goes; the probabilities decide the round, and the kept weights are
reparameterized from that distribution, so that no weight moves onto units that are likely to go next.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from prunus.core.allocation import raise_if_unreachable
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray
from prunus.core.directives import Directive, Evaluate, Measure, Note, Observation, Remove, Train
from prunus.core.errors import ConfigError, UnreachableTargetError
from prunus.core.graph import ChannelGraph
from prunus.core.importance import PluginConfig
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask
from prunus.core.signals import Signal
from prunus.plugins.discrepancy import Discrepancy, sliced_weights
from prunus.plugins.greedy_removal import Selection, log_scores, select
from prunus.plugins.pooled_moments import MOMENTS, PooledMoments
from prunus.plugins.ranking import signals_of
from prunus.plugins.recovery import can_train, changed, evaluated, recover, removal
from prunus.plugins.sensitivity import TrialConfig, measure_sensitivity, settle
from prunus.plugins.unit_belief import Belief, prediction_quality, pruning_probabilities

_HIGHEST_SURVIVAL_TERM = 0.9
_SHORT = 1.5
"""Up to so many epochs one round is best: recovery between rounds costs more than it brings."""


class BayesReparamConfig(TrialConfig):
    memory: Literal["kalman", "none"] = "kalman"
    """`kalman` carries a belief about every unit through the rounds; `none` looks at the last round only."""
    survival: bool = True
    """Refit (if `sequential`) with the probability that a kept unit goes next, so that it carries less, as far as
    each layer can bear it: without a bound weights fade over the rounds, until training diverges."""
    rounds: int | None = Field(default=None, ge=1)
    """None is 1 up to 1.5 epochs of recovery and 3 beyond."""
    folds: int = Field(default=4, ge=1)
    """Disjoint parts of the calibration images, whose disagreement is the observation's noise."""
    ridge: float = Field(default=1e-3, gt=0)
    """Of the mean variance, added to every variance."""
    round_epochs: float = Field(default=0.15, ge=0)
    """At most so much recovery between rounds."""
    round_lr: float = Field(default=0.01, gt=0)
    """Peak learning rate between rounds, falling to 0: a high one destroys what the refit kept."""
    tolerance: float | None = Field(default=None, gt=0, le=1)
    """Largest fall of the held-out accuracy over a round and its recovery. Beyond it the following steps are
    halved once; beyond it again the run stops. None never stops."""


class BayesReparam(PruningPolicy):
    """Discrepancy of output distributions, a belief over the rounds, reparameterization from it."""

    Config: ClassVar[type[PluginConfig]] = BayesReparamConfig
    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.WEIGHT}) | MOMENTS

    def check(self, task: PruningTask) -> None:
        if not task.has_data:
            raise ConfigError(
                "bayes-reparam needs images (a few hundred, without labels) to see what units carry; got "
                "--data none. Give --data, or use --plugin one-shot --importance magnitude",
                key="data",
            )
        raise_if_unreachable(task.graph, task.budget)

    def run(self, task: PruningTask) -> Generator[Directive, Observation, PruningPlan]:
        config = self.config
        assert isinstance(config, BayesReparamConfig)
        graph, start = task.graph, task.graph.cost()
        rounds = config.rounds or (1 if task.epochs <= _SHORT else 3)
        guard = _Guard(config.tolerance, task)
        beliefs: dict[str, Belief] = {}
        forecast: _Forecast | None = None
        sensitivity: dict[str, float] | None = None
        progress, spent, index = 0.0, 0.0, 0
        while True:
            index += 1
            progress = _next(progress, guard.step / rounds)
            budget = task.budget.partway(progress, start)
            seen = yield from _observe(graph, budget, config, sensitivity)
            if sensitivity is None:
                sensitivity = yield from _sensitivity(task, config, seen)
                if sensitivity:
                    seen = seen.weighted(graph, budget, config.ridge, sensitivity)
            seen.moments.clear()  # as large as the precisions that were made of them
            beliefs = _believe(config, beliefs, seen)
            probabilities, tau = pruning_probabilities(graph, budget, beliefs)
            chosen = select(graph, budget, seen.discrepancy, beliefs, seen.scores, tau)
            yield _round_note(index, graph, budget, chosen, probabilities, tau)
            if forecast is not None and forecast.probabilities:
                yield forecast.note(index, graph, chosen)

            following = task.budget.partway(_next(progress, guard.step / rounds), start)
            forecast, beliefs = _forecast(graph, following, config, chosen, seen, beliefs)
            del seen  # the refit needs the room
            last = progress >= 1.0
            result = changed((yield _reparameterize(task, config, chosen, None if last else forecast)))
            graph = result.graph
            if last:
                break
            share = min(config.round_epochs, task.epochs / (rounds + 1), task.epochs - spent)
            if can_train(task, share):
                yield Train(share, lr=config.round_lr, warmup=0.0, label=f"round {index}")
                spent += share
            yield from guard.check(graph, index)
        yield from recover(task, config, task.epochs - spent)
        return result.plan


def _next(progress: float, step: float) -> float:
    return 1.0 if progress + step > 1.0 - 1e-9 else progress + step


# --- what a round sees ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    weights: dict[str, FloatArray]
    moments: dict[str, FloatArray]
    discrepancy: Discrepancy
    """From all folds together."""
    scores: dict[str, FloatArray]
    """group -> (units,): z = log(D / c)."""
    noise: dict[str, float]
    """group -> variance of z as the mean of the folds."""

    def weighted(
        self, graph: ChannelGraph, budget: Budget, ridge: float, sensitivity: Mapping[str, float]
    ) -> _Seen:
        discrepancy = Discrepancy(graph, self.weights, self.moments, ridge, sensitivity)
        return replace(self, discrepancy=discrepancy, scores=log_scores(graph, budget, discrepancy))


def _observe(
    graph: ChannelGraph, budget: Budget, config: BayesReparamConfig, sensitivity: Mapping[str, float] | None
) -> Generator[Directive, Observation, _Seen]:
    """Measure fold by fold; z from the pooled moments, its noise from the folds' disagreement."""
    signals = frozenset({Signal.WEIGHT}) | MOMENTS
    weights: dict[str, FloatArray] = {}
    pooled = PooledMoments()
    per_fold: list[dict[str, FloatArray]] = []
    for k in range(config.folds):
        reader = signals_of((yield Measure(signals, images=config.images, fold=(k, config.folds))))
        weights = weights or {name: reader.read(Signal.WEIGHT, name) for name in sliced_weights(graph)}
        part = pooled.add(graph, reader)
        if config.folds > 1:
            alone = Discrepancy(graph, weights, part, config.ridge, scores_only=True)
            per_fold.append(log_scores(graph, budget, alone))
        del reader, part  # as large as all covariances: they must not wait for the next fold's
    noise = dict.fromkeys(graph.prunable, 0.0)
    if per_fold:
        for name in noise:
            variance = np.var([scores[name] for scores in per_fold], axis=0, ddof=1)
            noise[name] = float(variance.mean()) / config.folds
    if pooled.without_covariance:
        yield Note("covariance-missing", {"readers": ", ".join(sorted(pooled.without_covariance))})
    # with this note the last fold is over, too: the run writes down what was read, and lets go of it
    yield Note("folds", {"folds": config.folds, "variance": float(np.mean([*noise.values()] or 0.0))})
    moments = pooled.moments()
    del pooled
    discrepancy = Discrepancy(graph, weights, moments, config.ridge, sensitivity)
    return _Seen(weights, moments, discrepancy, log_scores(graph, budget, discrepancy), noise)


def _sensitivity(
    task: PruningTask, config: BayesReparamConfig, seen: _Seen
) -> Generator[Directive, Observation, dict[str, float]]:
    """group -> factor of its discrepancies, by trials of each group alone and where one round would end."""
    if not config.tries(task):
        return {}
    graph, budget = task.graph, task.budget
    alone = yield from measure_sensitivity(
        graph, seen.weights, seen.moments, config.ridge, config.trial(images=config.images)
    )
    if not alone or config.sweeps_of(task) == 0:
        return alone

    def propose(factors: Mapping[str, float]) -> Selection:
        judged = seen.weighted(graph, budget, config.ridge, factors)
        beliefs = _believe(config, {}, judged)
        _, tau = pruning_probabilities(graph, budget, beliefs)
        return select(graph, budget, judged.discrepancy, beliefs, judged.scores, tau)

    settled = yield from settle(graph, budget, propose, alone, config.trial(), config.sweeps_of(task))
    return settled.factors


def _believe(config: BayesReparamConfig, before: Mapping[str, Belief], seen: _Seen) -> dict[str, Belief]:
    beliefs = {}
    for name, z in seen.scores.items():
        if config.memory == "kalman" and name in before:
            beliefs[name] = before[name].observed(z, seen.noise[name])
        else:
            beliefs[name] = Belief.first(z, seen.noise[name])
    return beliefs


# --- what a round foretells -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Forecast:
    """One step ahead, in the coordinates after the removal: group -> (units,)."""

    probabilities: dict[str, FloatArray]
    no_memory: dict[str, FloatArray]
    """The last score, changed by what the removals did to it; negative, so that high means likely."""
    previous: dict[str, FloatArray]
    """The last score as it was."""

    def note(self, index: int, graph: ChannelGraph, chosen: Selection) -> Note:
        went = np.concatenate(
            [~np.isin(np.arange(graph.groups[name].units), chosen.keep[name]) for name in self.probabilities]
        ).astype(np.float64)
        values: dict[str, float | int] = {"round": index}
        predictors = {"": self.probabilities, "no_memory_": self.no_memory, "previous_": self.previous}
        for label, scores in predictors.items():
            quality = prediction_quality(np.concatenate(list(scores.values())), went, probabilities=not label)
            values[f"{label}auc"], values[f"{label}overlap"] = quality.auc, quality.overlap
            if quality.brier is not None:
                values["brier"], values["chance"] = quality.brier, quality.chance
        return Note("prediction", values)


def _forecast(
    graph: ChannelGraph,
    following: Budget,
    config: BayesReparamConfig,
    chosen: Selection,
    seen: _Seen,
    beliefs: Mapping[str, Belief],
) -> tuple[_Forecast, dict[str, Belief]]:
    """Predict every kept unit's belief and its probability to go in the following round."""
    after = graph.restrict(chosen.keep)
    ahead = {
        name: belief.predicted(chosen.change[name]).kept(chosen.keep[name])
        for name, belief in beliefs.items()
        if name in after.prunable
    }
    if not ahead:
        return _Forecast({}, {}, {}), {}
    probabilities, _ = pruning_probabilities(after, following, ahead)
    no_memory = {name: -(seen.scores[name] + chosen.change[name])[chosen.keep[name]] for name in ahead}
    previous = {name: -seen.scores[name][chosen.keep[name]] for name in ahead}
    return _Forecast(probabilities, no_memory, previous), ahead


def _reparameterize(
    task: PruningTask, config: BayesReparamConfig, chosen: Selection, forecast: _Forecast | None
) -> Remove:
    survival: dict[str, FloatArray] | None = None
    if config.survival and config.refit == "sequential" and forecast is not None:
        survival = {name: np.zeros(len(chosen.change[name])) for name in forecast.probabilities}
        for name, p in forecast.probabilities.items():
            survival[name][chosen.keep[name]] = np.minimum(p, _HIGHEST_SURVIVAL_TERM)
    plain = removal(task, config, chosen.keep)
    return Remove(plain.keep, None, plain.refit, survival, plain.recalibrate, plain.images)


def _round_note(
    index: int,
    graph: ChannelGraph,
    budget: Budget,
    chosen: Selection,
    probabilities: Mapping[str, FloatArray],
    tau: float,
) -> Note:
    kept = {name: len(units) for name, units in chosen.keep.items()}
    values: dict[str, float | int | str | list[float]] = {
        "round": index,
        "tau": tau,
        "load": budget.load(graph.cost(kept)),
        "kept": sum(kept[name] for name in probabilities),
    }
    values |= {f"probability/{name}": [round(float(v), 4) for v in p] for name, p in probabilities.items()}
    return Note("bayes-round", values)


class _Guard:
    """Watches the held-out accuracy: steps are halved once, then the run stops."""

    def __init__(self, tolerance: float | None, task: PruningTask) -> None:
        self.step = 1.0
        self._tolerance = tolerance if task.has_labels else None
        self._task, self._before = task, task.dense_accuracy

    def check(self, graph: ChannelGraph, index: int) -> Generator[Directive, Observation, None]:
        if self._tolerance is None:
            return
        accuracy = evaluated((yield Evaluate())).accuracy
        fall = 0.0 if self._before is None else self._before - accuracy
        self._before = accuracy
        if fall <= self._tolerance:
            return
        stopped = int(self.step < 1.0)
        yield Note("tolerance", {"round": index, "accuracy": accuracy, "fall": fall, "stopped": stopped})
        if self.step == 1.0:
            self.step = 0.5
            return
        targets = ", ".join(target.text for target in self._task.budget.targets)
        share = graph.cost().share_of(self._task.budget.dense)
        raise UnreachableTargetError(
            targets,
            f"macs={share['macs']:.1%}, params={share['params']:.1%}",
            f"round {index} lost {fall:.3f} of held-out accuracy, more than the tolerance {self._tolerance}, "
            "with halved steps; raise the tolerance or the epochs",
        )

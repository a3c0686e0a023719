"""The search of one round: keep-sets cut at generated thresholds, judged on the hold-out after the refit.

Units of a group have masses p = softmax((log energy + s Gumbel) / tau): with s = 0 and tau = 1 the share of
their group's energy. A group keeps the smallest prefix with mass >= r_g = 1 - (1 - r) f_g, the shared r such
that the budget is met, f_g ThreshNet's offset on what is discarded. A unit with mass M above it stays as
long as (1 - M) / f_g > 1 - r: so one exact search over these scores finds r, floors and multiples included,
and no proposal exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence

import numpy as np

from prunus.core.allocation import global_keep
from prunus.core.budget import Budget
from prunus.core.cost import FloatArray, IntArray
from prunus.core.directives import Directive, Evaluate, Note, Observation, Refit
from prunus.core.graph import ChannelGraph
from prunus.plugins.recovery import evaluated
from prunus.plugins.threshnet import ThreshNet, describe
from prunus.plugins.training_ledger import TrainingLedger

_FINALISTS = 2
"""Proposals, and as many perturbed keep-sets, that are judged on more images against equal thresholds."""


def unit_masses(
    energies: Mapping[str, FloatArray],
    sharpness: float,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
) -> dict[str, FloatArray]:
    """group -> (units,): p, summing to 1 in every group."""
    masses = {}
    for name, energy in energies.items():
        logits = np.log(np.maximum(energy, 1e-12))
        if rng is not None and noise > 0:
            logits = logits + noise * rng.gumbel(size=len(logits))
        p = np.exp((logits - logits.max()) / sharpness)
        masses[name] = np.asarray(p / p.sum())
    return masses


def cut_scores(
    masses: Mapping[str, FloatArray], factors: Mapping[str, float] | None = None
) -> dict[str, FloatArray]:
    """group -> (units,): (1 - mass of the better units) / f_g; ranking by it cuts all groups at one r."""
    scores = {}
    for name, p in masses.items():
        order = np.argsort(-p, kind="stable")
        above = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
        values = np.empty(len(p))
        values[order] = 1.0 - above
        scores[name] = values / (1.0 if factors is None else factors[name])
    return scores


def mean_overlap(first: Mapping[str, IntArray], second: Mapping[str, IntArray], groups: Collection[str]) -> float:
    """Mean Jaccard index of the kept units over `groups`."""
    indices = []
    for name in groups:
        both = len(np.intersect1d(first[name], second[name]))
        indices.append(both / max(len(first[name]) + len(second[name]) - both, 1))
    return float(np.mean(indices)) if indices else 1.0


class ThresholdSearch:
    """Proposes, judges and learns; ThreshNet keeps what it learned from round to round."""

    def __init__(
        self,
        net: ThreshNet,
        rng: np.random.Generator,
        ledger: TrainingLedger,
        reward_images: int,
        images: int,
        share: float,
        reward_refit: Refit = "sequential",
    ) -> None:
        """`share`: proposals end once the search has used so much of the whole compute allowance."""
        self._share, self._reward_refit = share, reward_refit
        self._net, self._rng, self._ledger = net, rng, ledger
        self._reward_images, self._images = reward_images, images

    def choose(
        self,
        graph: ChannelGraph,
        budget: Budget,
        energies: Mapping[str, FloatArray],
        index: int,
        episodes: int,
        noise: float,
        sharpness: float,
        progress: float,
    ) -> Generator[Directive, Observation, dict[str, IntArray]]:
        """The round's keep-set. A proposal is accepted only if it beats equal thresholds."""
        plain = unit_masses(energies, sharpness)
        equal = global_keep(graph, budget, cut_scores(plain))
        if episodes == 0 or not plain:
            return equal
        features = self._features(graph, budget, plain, progress)
        rewards: list[float] = []
        proposals: list[dict[str, IntArray]] = []
        for _ in range(episodes):
            if self._ledger.search_share >= self._share:
                break
            choices = self._net.sample(features, self._rng)
            keep = global_keep(graph, budget, cut_scores(plain, self._factors(plain, choices)))
            reward = -(yield from self._loss(graph, keep, self._reward_images, self._reward_refit))
            self._net.learn(features, choices, reward)
            rewards.append(reward)
            proposals.append(keep)
        if not rewards:
            return equal
        settled = self._factors(plain, self._net.best(features))
        best = [proposals[k] for k in np.argsort(-np.array(rewards), kind="stable")[:_FINALISTS]]
        # perturbed keep-sets are judged but do not teach: their noise drowns what thresholds change
        perturbed = [unit_masses(energies, sharpness, noise, self._rng) for _ in range(_FINALISTS)]
        candidates = {
            "equal": equal,
            "settled": global_keep(graph, budget, cut_scores(plain, settled)),
            **{f"sampled-{k}": keep for k, keep in enumerate(best)},
            **{
                f"perturbed-{k}": global_keep(graph, budget, cut_scores(masses, settled))
                for k, masses in enumerate(perturbed)
            },
        }
        losses: dict[str, float] = {}
        for name, keep in candidates.items():
            losses[name] = yield from self._loss(graph, keep, self._images, "sequential")
        chosen = min(losses, key=lambda name: losses[name])
        values: dict[str, float | int | str | Sequence[float]] = {"round": index, "accepted": chosen}
        values |= {"entropy": self._net.entropy(features), "rewards": rewards}
        values |= {f"loss/{name}": loss for name, loss in losses.items()}
        yield Note("threshold-search", values)
        return candidates[chosen]

    def _loss(
        self, graph: ChannelGraph, keep: Mapping[str, IntArray], images: int, refit: Refit
    ) -> Generator[Directive, Observation, float]:
        # the weaker refit leaves batch-norm statistics that are wrong for what is left
        recalibrate = refit != "sequential"
        answer = evaluated((yield Evaluate(within=keep, refit=refit, recalibrate=recalibrate, images=images)))
        after = graph.restrict(keep)
        self._ledger.add_forward(after, answer.samples)
        self._ledger.add_refit(graph, after, images)
        return answer.loss

    def _factors(self, masses: Mapping[str, FloatArray], choices: IntArray) -> dict[str, float]:
        return {name: float(self._net.offsets[c]) for name, c in zip(masses, choices, strict=True)}

    @staticmethod
    def _features(
        graph: ChannelGraph, budget: Budget, masses: Mapping[str, FloatArray], progress: float
    ) -> FloatArray:
        counts = graph.cost_model.counts(graph.units)
        slope = np.maximum(budget.gradient(graph, counts), 0.0) * counts
        share = dict(zip(graph.groups, slope / max(float(slope.sum()), 1e-300), strict=True))
        load = budget.load(graph.cost())
        rows = [
            describe(p, k / max(len(masses) - 1, 1), float(share[name]), load, progress)
            for k, (name, p) in enumerate(masses.items())
        ]
        return np.stack(rows)

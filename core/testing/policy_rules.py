"""The rules for policies, tried by running them on a small network in numpy, journal and resume included."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunus.core.checkpoints import Checkpoints
from prunus.core.digest import digest
from prunus.core.directives import Changed, Directive, Observation, Train
from prunus.core.errors import PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.journal import Journal
from prunus.core.plan import PruningPlan
from prunus.core.plugin_settings import configure
from prunus.core.policy import PruningPolicy
from prunus.core.registry import check_policy
from prunus.core.run import execute
from prunus.core.signals import NEEDS_DATA, Signal, SignalReader
from prunus.core.testing.simulation import SimulatedAdapter

EPOCHS = 2.0
SLACK = 1.1
"""Training may go over its budget by so much, where steps are rounded up."""
MAX_DIRECTIVES = 20_000
_BELONGS = "0" * 64


class WeightNorm:
    """The estimator that policies rank by while they are tested: data-free, and different for every unit."""

    needs = frozenset({Signal.WEIGHT})
    comparable_across_groups = False

    def score(self, group: Any, signals: SignalReader) -> np.ndarray:
        total = np.zeros(group.units)
        for piece in group.with_role("writes"):
            rows = np.moveaxis(signals.read(Signal.WEIGHT, piece.tensor), piece.axis, 0)
            np.add.at(total, piece.unit_of, np.square(rows).reshape(len(rows), -1).sum(axis=1))
        return np.asarray(np.sqrt(total), dtype=np.float64)


@dataclass(slots=True)
class Seen:
    """Events that remember the digest of every directive and what it would cost; can stop the run."""

    plugin: str
    stop_before: int | None = None
    digests: list[str] = field(default_factory=list)
    macs: float = 0.0
    """Epochs of training, each weighed by the MACs of the network that was trained."""
    graph: ChannelGraph | None = None

    def began(self, index: int, directive: Directive) -> None:
        if index == self.stop_before:
            raise KeyboardInterrupt
        if index > MAX_DIRECTIVES:
            raise PluginError(
                self.plugin, "a run ends", f"It yielded {MAX_DIRECTIVES} directives on a toy network."
            )

    def carried_out(self, index: int, directive: Directive, observation: Observation) -> None: ...

    def answered(self, index: int, directive: Directive, observation: Observation, seconds: float) -> None:
        self.digests.append(digest(directive))
        if isinstance(observation, Changed):
            self.graph = observation.graph
        if isinstance(directive, Train) and self.graph is not None:
            counts = {group: len(units) for group, units in (directive.within or {}).items()}
            self.macs += directive.epochs * self.graph.cost(counts).macs

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None: ...

    def notice(self, text: str) -> None: ...


def _run(
    policy: type[PruningPolicy],
    name: str,
    *targets: str,
    seen: Seen | None = None,
    seed: int = 0,
    epochs: float = EPOCHS,
    has_data: bool = True,
    folder: Path | None = None,
    **groups: Any,
) -> tuple[PruningPlan, SimulatedAdapter]:
    scratch = policy.starts_from == "scratch"
    adapter = SimulatedAdapter((8, 24, 16, 4), samples=256, dense_epochs=0 if scratch else 4, **groups)
    estimator: Any = WeightNorm() if policy.needs_estimator else None
    task = adapter.task(
        *targets, epochs=epochs, seed=seed, estimator=estimator, has_data=has_data, has_labels=has_data
    )
    events = seen if seen is not None else Seen(name)
    events.graph = task.graph
    journal = checkpoints = None
    if folder is not None:
        journal, checkpoints = _journal(folder), Checkpoints(folder / "checkpoint")
    plan = execute(
        policy(configure(policy.Config, name, {})),
        task,
        adapter,
        plugin=name,
        events=events,
        journal=journal,
        checkpoints=checkpoints,
    )
    return plan, adapter


def _journal(folder: Path) -> Journal:
    where = folder / "journal"
    exists = (where / "head.json").exists()
    return Journal.open(where, "kit", _BELONGS) if exists else Journal.create(where, "kit", _BELONGS)


def usable_class(policy: type[PruningPolicy], name: str) -> None:
    check_policy(name, policy)


def meets_every_target(policy: type[PruningPolicy], name: str) -> None:
    for targets in (("macs=50%",), ("params=30%",), ("macs=60%", "params=40%")):
        _run(policy, name, *targets)


def keeps_whole_multiples(policy: type[PruningPolicy], name: str) -> None:
    plan, _ = _run(policy, name, "macs=60%", h0={"multiple_of": 4}, h1={"multiple_of": 8})
    for group, multiple, units in (("h0", 4, 24), ("h1", 8, 16)):
        kept = plan.kept_counts[group]
        if kept % multiple and kept != units:
            raise PluginError(name, "kept counts are whole multiples", f"{group}: {kept} of {multiple}.")


def leaves_locked_groups_alone(policy: type[PruningPolicy], name: str) -> None:
    plan, _ = _run(policy, name, "macs=70%", h1={"locked": "for the test"})
    if plan.kept_counts["h1"] != 16:
        raise PluginError(name, "locked groups keep everything", f"It kept {plan.kept_counts['h1']} of 16.")


def keeps_equal_counts(policy: type[PruningPolicy], name: str) -> None:
    tied: dict[str, Any] = {"h0": {"equal_count": "tied"}, "h1": {"equal_count": "tied"}}
    scratch = policy.starts_from == "scratch"
    adapter = SimulatedAdapter((8, 16, 16, 4), samples=256, dense_epochs=0 if scratch else 4, **tied)
    estimator: Any = WeightNorm() if policy.needs_estimator else None
    task = adapter.task("macs=60%", epochs=EPOCHS, estimator=estimator)
    execute(policy(), task, adapter, plugin=name, events=Seen(name))


def deterministic(policy: type[PruningPolicy], name: str) -> None:
    seen = [Seen(name), Seen(name)]
    for i, one in enumerate(seen):
        np.random.seed(i)  # a policy that draws from here is caught
        _run(policy, name, "macs=50%", seen=one)
    if seen[0].digests != seen[1].digests:
        pairs = zip(seen[0].digests, seen[1].digests, strict=False)
        index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(s.digests) for s in seen))
        rule = "equal task and observations, equal directives"
        raise PluginError(name, rule, f"Directive {index} differs: is task.rng its only source of randomness?")


def resumes(policy: type[PruningPolicy], name: str) -> None:
    whole = Seen(name)
    plan, adapter = _run(policy, name, "macs=50%", seen=whole)
    for stop in sorted({1, len(whole.digests) // 2, len(whole.digests) - 1}):
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(KeyboardInterrupt):
                _run(policy, name, "macs=50%", seen=Seen(name, stop_before=stop), folder=Path(folder))
            again, other = _run(policy, name, "macs=50%", folder=Path(folder))
        same = all(np.array_equal(weight, other.weights[key]) for key, weight in adapter.weights.items())
        if again.keep != plan.keep or not same:
            rule = "a resumed run ends in the same plan and weights"
            raise PluginError(name, rule, f"Stopped before directive {stop}, it did not.")


def trains_within_its_budget(policy: type[PruningPolicy], name: str) -> None:
    for epochs in (0.0, EPOCHS):
        if epochs == 0 and policy.starts_from == "scratch":
            continue
        seen = Seen(name)
        _, adapter = _run(policy, name, "macs=50%", seen=seen, epochs=epochs)
        dense = adapter.trace().cost().macs
        if seen.macs > SLACK * epochs * dense:
            rule = "a policy trains no longer than task.epochs"
            raise PluginError(name, rule, f"It was given {epochs:g} epochs and used {seen.macs / dense:.3g}.")


def runs_without_data(policy: type[PruningPolicy], name: str) -> None:
    if policy.starts_from == "scratch" or policy.needs & NEEDS_DATA:
        return
    _run(policy, name, "macs=50%", epochs=0.0, has_data=False)


POLICY_RULES: dict[str, Callable[[type[PruningPolicy], str], None]] = {
    "it is a usable class whose Config has valid defaults": usable_class,
    "the plan meets every target": meets_every_target,
    "kept counts are whole multiples": keeps_whole_multiples,
    "locked groups keep everything": leaves_locked_groups_alone,
    "groups that are tied keep equal counts": keeps_equal_counts,
    "equal task and observations, equal directives": deterministic,
    "a resumed run ends in the same plan and weights": resumes,
    "a policy trains no longer than task.epochs": trains_within_its_budget,
    "a policy that declares no data runs without data": runs_without_data,
}

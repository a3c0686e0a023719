"""The rules for policies, tried by running them on a small network in numpy, journal and resume included."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunus.core.checkpoints import Checkpoints
from prunus.core.digest import digest
from prunus.core.directives import Changed, Directive, Observation, Train
from prunus.core.errors import ConfigError, PluginError
from prunus.core.graph import ChannelGraph
from prunus.core.journal import Journal
from prunus.core.plan import PruningPlan
from prunus.core.plugin_settings import configure
from prunus.core.policy import PruningPolicy, ask
from prunus.core.registry import check_policy
from prunus.core.run import Preamble, execute
from prunus.core.signals import NEEDS_DATA, Signal, SignalReader
from prunus.core.testing.simulation import SimulatedAdapter

EPOCHS = 2.0
WIDTHS = (8, 24, 16, 4)
HASH_SEEDS = ("0", "2")
"""Two orders of {"h0", "h1"}, the groups of the network that policies are tried on."""
SLACK = 1.1
"""Training may go over its budget by so much, where steps are rounded up."""
MAX_DIRECTIVES = 20_000
_BELONGS = "0" * 64


NOT_THERE = 3
CHILD = "PRUNUS_CONTRACT_CHILD"
_CHILD = f"""
import importlib, json, operator, sys
sys.path[:], module, name, plugin = json.loads(sys.argv[1])
try:
    policy = operator.attrgetter(name)(importlib.import_module(module))
except (ImportError, AttributeError):  # defined in a function, in a test, or in what was run as a script
    sys.exit({NOT_THERE})
from prunus.core.testing.policy_rules import print_digests
print_digests(policy, plugin)
"""


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
    has_labels: bool = True,
    folder: Path | None = None,
    widths: tuple[int, ...] = WIDTHS,
    **groups: Any,
) -> tuple[PruningPlan, SimulatedAdapter]:
    """One run as the command line makes it: asked whether it can serve the task, then the preamble, then `run`."""
    scratch = policy.starts_from == "scratch"
    adapter = SimulatedAdapter(widths, samples=256, dense_epochs=0 if scratch else 4, **groups)
    estimator: Any = WeightNorm() if policy.needs_estimator else None
    labelled = has_data and has_labels
    task = adapter.task(
        *targets, epochs=epochs, seed=seed, estimator=estimator, has_data=has_data, has_labels=labelled
    )
    events = seen if seen is not None else Seen(name)
    events.graph = task.graph
    journal = checkpoints = None
    if folder is not None:
        journal, checkpoints = _journal(folder), Checkpoints(folder / "checkpoint")
    method = policy(configure(policy.Config, name, {}))
    ask(method, name, task)
    plan = execute(
        method,
        task,
        adapter,
        plugin=name,
        events=events,
        preamble=None if scratch or not has_data else Preamble(evaluate=labelled),
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
    _run(policy, name, "macs=60%", widths=(8, 16, 16, 4), **tied)


def ends_where_nothing_is_left(policy: type[PruningPolicy], name: str) -> None:
    """The one group that may shrink has one step to go: after it, with rounds ahead, nothing can be chosen."""
    options: dict[str, Any] = {"h0": {"multiple_of": 12}, "h1": {"locked": "for the test"}}
    plan, _ = _run(policy, name, "macs=60%", epochs=10 * EPOCHS, **options)
    if plan.kept_counts["h0"] != 12:
        raise PluginError(name, "it removes the one step there is", f"It kept {plan.kept_counts['h0']} of 24.")


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


def same_in_every_process(policy: type[PruningPolicy], name: str) -> None:
    """Two processes whose sets of strings have different orders. A class that they cannot import is passed."""
    if CHILD in os.environ:  # the module that holds the policy runs the kit when it is imported
        return
    said = json.dumps([sys.path, policy.__module__, policy.__qualname__, name])
    command = [sys.executable, "-c", _CHILD, said]
    children = [
        subprocess.Popen(
            command, env={**os.environ, "PYTHONHASHSEED": seed, CHILD: "1"}, stdout=subprocess.PIPE, text=True
        )
        for seed in HASH_SEEDS
    ]
    first, second = (child.communicate()[0] for child in children)
    if any(child.returncode == NOT_THERE for child in children):
        return
    rule = "equal task and observations, equal directives, in every process"
    if any(child.returncode for child in children):
        raise PluginError(name, rule, "It fails in a process of its own.")
    if first.splitlines()[-1] != second.splitlines()[-1]:
        raise PluginError(name, rule, "Two processes differ: does it go through a set of names?")


def print_digests(policy: type[PruningPolicy], name: str) -> None:
    """The digest of every directive of one run, on one line."""
    seen = Seen(name)
    _run(policy, name, "macs=50%", seen=seen)
    print("", *seen.digests)


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


def serves_images_without_labels(policy: type[PruningPolicy], name: str) -> None:
    """Or says before anything starts, by a ConfigError of `check`, that it cannot."""
    try:
        _run(policy, name, "macs=50%", epochs=0.0, has_labels=False)
    except ConfigError:
        return


POLICY_RULES: dict[str, Callable[[type[PruningPolicy], str], None]] = {
    "it is a usable class whose Config has valid defaults": usable_class,
    "the plan meets every target": meets_every_target,
    "kept counts are whole multiples": keeps_whole_multiples,
    "locked groups keep everything": leaves_locked_groups_alone,
    "groups that are tied keep equal counts": keeps_equal_counts,
    "a run ends well where nothing is left to shrink": ends_where_nothing_is_left,
    "equal task and observations, equal directives": deterministic,
    "equal task and observations, equal directives, in every process": same_in_every_process,
    "a resumed run ends in the same plan and weights": resumes,
    "a policy trains no longer than task.epochs": trains_within_its_budget,
    "a policy that declares no data runs without data": runs_without_data,
    "a policy serves images without labels, or says at once that it cannot": serves_images_without_labels,
}

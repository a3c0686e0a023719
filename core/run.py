"""Running a method: its directives are checked, carried out, journaled; a crashed run is replayed to where it was.

A run is one generator: the preamble (dense training, where it is needed) and then the policy. Its answers
come from the journal as far as the newest usable checkpoint reaches, and from the adapter after that.
So a crash costs at most the directive in flight, and a Train not even that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Protocol

from prunus.core.adapter import ModelAdapter
from prunus.core.checkpoints import Checkpoint, Checkpoints
from prunus.core.digest import digest
from prunus.core.directive_rules import DirectiveRules
from prunus.core.directives import (
    Changed,
    Directive,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Merge,
    Observation,
    Remove,
    Snapshot,
    Train,
    Trained,
)
from prunus.core.errors import JournalError, PluginError, PrunusError, TrainingError
from prunus.core.graph import ChannelGraph
from prunus.core.journal import Entry, Journal
from prunus.core.observations import RecordingReader
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask

CHANGES_STATE = (Train, Grow, Merge, Remove, Snapshot)
DENSE = frozenset({"dense"})
MAX_DIRECTIVES = 100_000
MAX_IDLE = 5_000
"""Directives in a row that change nothing (Measure, Evaluate, Note): beyond it the policy loops for ever."""

Program = Generator[Directive, Observation, PruningPlan]
Conducted = Generator[Train, Trained | None, PruningPlan]
"""A run seen by whoever trains: everything but Train is carried out, a Train is answered by what it came to."""


class Events(Protocol):
    """Who is told how the run goes."""

    def began(self, index: int, directive: Directive) -> None:
        """Before a directive is carried out (not for those answered by the journal)."""
        ...

    def carried_out(self, index: int, directive: Directive, observation: Observation) -> None:
        """After a directive was carried out, before it is journaled: called again if the run dies in between."""
        ...

    def answered(self, index: int, directive: Directive, observation: Observation, seconds: float) -> None:
        """The observation is about to go to the method; also for those answered by the journal."""
        ...

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        """One step of a directive. Raises KeyboardInterrupt to stop the run at this step."""
        ...

    def notice(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Preamble:
    """What a run does before its policy."""

    dense_epochs: float = 0.0
    """Train the dense model first for so many epochs."""
    evaluate: bool = True
    """Measure the dense model's held-out accuracy."""


def program(policy: PruningPolicy, task: PruningTask, preamble: Preamble | None) -> Program:
    """The preamble and then the policy, as one generator; the policy's task says how good the dense model is."""
    if preamble is not None:
        if preamble.dense_epochs > 0:
            yield Train(epochs=preamble.dense_epochs, label="dense")
        if preamble.evaluate:
            dense = yield Evaluate()
            assert isinstance(dense, Evaluated)
            task = replace(task, dense_accuracy=dense.accuracy)
        yield Snapshot("dense")
    return (yield from policy.run(task))


def execute(
    policy: PruningPolicy,
    task: PruningTask,
    adapter: ModelAdapter,
    *,
    plugin: str,
    events: Events,
    preamble: Preamble | None = None,
    journal: Journal | None = None,
    checkpoints: Checkpoints | None = None,
) -> PruningPlan:
    """Run `policy` to its end and return its plan, checked: it is the adapter's last one, within the budget.

    With a journal that holds entries the run is resumed. `adapter` must be freshly opened. Raises PluginError
    where the plugin broke a rule, and whatever the adapter raises; KeyboardInterrupt passes through with
    everything up to the last step on disk.
    """
    steps = conduct(
        policy,
        task,
        adapter,
        plugin=plugin,
        events=events,
        preamble=preamble,
        journal=journal,
        checkpoints=checkpoints,
    )
    with contextlib.closing(steps):
        answer: Trained | None = None
        while True:
            try:
                wanted = steps.send(answer)
            except StopIteration as end:
                plan: PruningPlan = end.value
                return plan
            answer = adapter.train(wanted)


def conduct(
    policy: PruningPolicy,
    task: PruningTask,
    adapter: ModelAdapter,
    *,
    plugin: str,
    events: Events,
    preamble: Preamble | None = None,
    journal: Journal | None = None,
    checkpoints: Checkpoints | None = None,
) -> Conducted:
    """The run that `execute` carries out, with its trainings left to the caller: a loop that the user owns.

    Yields every Train that is to be carried out now and must be sent what came of it; nothing else differs.
    """
    run = _Run(task, adapter, plugin, events, preamble, journal, checkpoints)
    adapter.watch(run)
    run.restore()
    return (yield from run.drive(program(policy, task, preamble)))


class _Run:
    """The state of one run while it goes on; also the adapter's `Watcher`."""

    def __init__(
        self,
        task: PruningTask,
        adapter: ModelAdapter,
        plugin: str,
        events: Events,
        preamble: Preamble | None,
        journal: Journal | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._task, self._adapter, self._plugin, self._events = task, adapter, plugin, events
        self._journal, self._checkpoints = journal, checkpoints
        self._replay: list[Entry] = []
        self._rules = DirectiveRules(plugin, task, task.graph, reserved=DENSE if preamble is None else frozenset())
        self._plan: PruningPlan | None = None
        self._index = 0
        self._boundaries = 0
        self._idle = 0
        self._pending = ("", "", 0.0)
        """Kind, digest and seconds of the Measure whose signals are being read."""

    def restore(self) -> None:
        """Bring the adapter to the newest usable checkpoint and keep the journal entries that lead to it."""
        if self._journal is None:
            return
        found: Checkpoint | None = None
        if self._checkpoints is not None:
            journaled = len(self._journal.entries)
            found = self._checkpoints.restore(journaled, self._adapter.restore, self._events.notice)
            self._checkpoints.forget_after(found)
        reached = found.next_index if found is not None else 0
        self._boundaries = found.boundary if found is not None else 0
        changing = {cls.__name__ for cls in CHANGES_STATE}
        entries = self._journal.entries
        while reached < len(entries) and entries[reached].kind not in changing:
            reached += 1
        if found is not None and found.boundary and reached > found.next_index:
            raise JournalError(f"checkpoint {found.path} does not fit the journal")
        self._journal.truncate(reached)
        self._replay = list(self._journal.entries)

    def drive(self, steps: Program) -> Conducted:
        observation: Observation = None
        try:
            while True:
                directive = self._next(steps, observation)
                observation = None  # what was measured is the policy's to keep, or to let go
                if isinstance(directive, PruningPlan):
                    return self._finished(directive)
                self._rules.check(directive)
                self._count(directive)
                observation = yield from self._answer(directive)
                self._learn(directive, observation)
                self._index += 1
        finally:
            steps.close()

    def _next(self, steps: Program, observation: Observation) -> Directive | PruningPlan:
        try:
            return steps.send(observation)
        except StopIteration as end:
            if not isinstance(end.value, PruningPlan):
                raise PluginError(
                    self._plugin, "run must return a PruningPlan", f"It returned {type(end.value).__name__}."
                ) from None
            return end.value
        except PrunusError:
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise PluginError(self._plugin, "run must not raise", detail) from error
        finally:
            self._settle(observation)

    def _settle(self, observation: Observation) -> None:
        """Signals were read while the policy thought: only now is that observation complete."""
        if isinstance(observation, RecordingReader):
            observation.close()
            kind, key, seconds = self._pending
            if self._journal is not None:
                self._journal.append(kind, key, observation, seconds)

    def _count(self, directive: Directive) -> None:
        self._idle = 0 if isinstance(directive, CHANGES_STATE) else self._idle + 1
        if self._idle > MAX_IDLE:
            raise PluginError(
                self._plugin,
                f"at most {MAX_IDLE} directives in a row may change nothing",
                "It only measures, evaluates or notes: does it loop for ever?",
            )
        if self._index >= MAX_DIRECTIVES:
            raise PluginError(self._plugin, f"a run has at most {MAX_DIRECTIVES} directives")

    def _answer(self, directive: Directive) -> Generator[Train, Trained | None, Observation]:
        key = self._digest(directive)
        if self._index < len(self._replay):
            return self._recall(directive, key)
        self._events.began(self._index, directive)
        started = time.monotonic()
        observation = (yield directive) if isinstance(directive, Train) else self._carry_out(directive)
        self._events.carried_out(self._index, directive, observation)
        seconds = time.monotonic() - started
        self._events.answered(self._index, directive, observation, seconds)
        kind = type(directive).__name__
        if isinstance(observation, RecordingReader):
            self._pending = (kind, key, seconds)
        elif self._journal is not None:
            self._journal.append(kind, key, observation, seconds)
        self._boundaries = 0
        if isinstance(directive, CHANGES_STATE) and self._checkpoints is not None:
            self._checkpoints.write(self._index + 1, 0, self._adapter.checkpoint)
        return observation

    def _recall(self, directive: Directive, key: str) -> Observation:
        entry = self._replay[self._index]
        if entry.kind != type(directive).__name__ or entry.directive != key:
            raise PluginError(
                self._plugin,
                "it must be a deterministic function of its task and observations",
                f"Directive {self._index} was {entry.kind} when the run began, and is another "
                f"{type(directive).__name__} now. If the plugin or prunus itself was changed since, resume with "
                "what began the run, or begin a new one.",
            )
        observation = entry.observation
        self._events.answered(self._index, directive, observation, entry.seconds)
        return observation

    def _digest(self, directive: Directive) -> str:
        try:
            return digest(directive)
        except (TypeError, ValueError, RecursionError) as error:
            raise PluginError(self._plugin, "directives hold plain data", f"{error}.") from error

    def _carry_out(self, directive: Directive) -> Observation:
        adapter = self._adapter
        if isinstance(directive, Measure):
            return RecordingReader(adapter.measure(directive), self._plugin)
        if isinstance(directive, Evaluate):
            return adapter.evaluate(directive)
        if isinstance(directive, Grow):
            return adapter.grow(directive)
        if isinstance(directive, Merge):
            return adapter.merge(directive)
        if isinstance(directive, Remove):
            return adapter.remove(directive)
        if isinstance(directive, Snapshot):
            adapter.snapshot(directive)
        return None

    def _learn(self, directive: Directive, observation: Observation) -> None:
        if isinstance(observation, Changed):
            self._rules.graph, self._plan = observation.graph, observation.plan
        if isinstance(observation, Trained | Evaluated) and not _finite(observation.loss):
            raise TrainingError(f"the loss is {observation.loss} after directive {self._index}")
        if isinstance(directive, Snapshot):
            self._rules.snapshots.add(directive.name)
            if directive.name == "dense":  # taken by the preamble, the method cannot take it again
                self._rules.reserved = DENSE
        if isinstance(directive, Train) and directive.ema is not None and directive.within is None:
            self._rules.snapshots.add("ema")

    def _finished(self, plan: PruningPlan) -> PruningPlan:
        if self._plan is None:
            raise PluginError(self._plugin, "it must yield Remove at least once before it returns")
        if plan != self._plan:
            raise PluginError(self._plugin, "it must return the plan of its last Remove, Merge or Grow")
        if plan.branches:
            name = next(iter(plan.branches))
            raise PluginError(self._plugin, "branches are merged in the end", f"{name!r} still runs as branches.")
        check_budget(self._plugin, self._task, self._rules.graph)
        return plan

    def progress(
        self, label: str, done: int, total: int, loss: float | None = None, lr: float | None = None
    ) -> None:
        self._events.progress(label, done, total, loss, lr)

    def boundary(self) -> None:
        self._boundaries += 1
        if self._checkpoints is not None and self._journal is not None:
            self._checkpoints.write(self._index, self._boundaries, self._adapter.checkpoint)

    def notice(self, text: str) -> None:
        self._events.notice(text)


def check_budget(plugin: str, task: PruningTask, graph: ChannelGraph) -> None:
    """Raises PluginError if the final graph costs more than the budget allows."""
    cost = graph.cost()
    if task.budget.met(cost):
        return
    over = [f"{q} {getattr(cost, q):,.6g} > {limit:,.6g}" for q, limit in task.budget.limits.items()]
    raise PluginError(plugin, "the final plan must meet every target", f"It costs {'; '.join(over)}.")


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


__all__ = ["Conducted", "Events", "Preamble", "Program", "check_budget", "conduct", "execute", "program"]

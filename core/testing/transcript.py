"""Running a method against an adapter without a run folder, and what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from prunus.core.directives import Directive, Note, Observation
from prunus.core.plan import PruningPlan
from prunus.core.policy import PruningPolicy, PruningTask

D = TypeVar("D")


class Answering(Protocol):
    """Anything that answers directives, such as `SimulatedAdapter`."""

    def answer(self, directive: Directive) -> Observation: ...


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a method did: its directives in order, its notes and its plan."""

    plan: PruningPlan
    directives: tuple[Directive, ...]

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(d for d in self.directives if isinstance(d, Note))

    def of(self, kind: type[D]) -> tuple[D, ...]:
        """All directives of one kind."""
        return tuple(d for d in self.directives if isinstance(d, kind))


def drive(policy: PruningPolicy, task: PruningTask, adapter: Answering) -> Transcript:
    """Run a method to its end, without a journal. Raises what the method has against the task."""
    policy.check(task)
    directives: list[Directive] = []
    method = policy.run(task)
    observation: Observation = None
    try:
        directive = next(method)
        while True:
            directives.append(directive)
            observation = adapter.answer(directive)
            directive = method.send(observation)
    except StopIteration as stop:
        return Transcript(stop.value, tuple(directives))

"""The figures of a run for an experiment tracker: TensorBoard, Weights & Biases, MLflow, ...

The horizontal axis is the training step of the run. A resumed run logs the rows of its journal again, at the
steps where they were, so that a tracker that starts anew has the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from prunus.core.directives import Directive, Observation, Trained

_EVERY = 10
"""Steps of training from one logged loss to the next."""
_NOT_FIGURES = frozenset({"index", "seconds"})


class Tracker(Protocol):
    """One place where figures go."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


@runtime_checkable
class TrackedSession(Protocol):
    """A session whose framework knows experiment trackers."""

    def trackers(self, run: str, folder: Path) -> Sequence[Tracker]:
        """Those that the settings name, for the run called `run`, with their files in `folder`.

        Raises ConfigError for one that is not there.
        """
        ...


class Tracking:
    """Sends what happens to every tracker."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._steps = 0

    def progress(self, label: str, done: int, total: int, loss: float | None, lr: float | None) -> None:
        """After step `done` of the training in flight."""
        if done % _EVERY == 0 or done == total:
            values = {f"{label}/step_loss": loss, "lr": lr}
            self._log({name: value for name, value in values.items() if value is not None}, self._steps + done)

    def answered(self, row: Mapping[str, Any], directive: Directive, observation: Observation) -> None:
        """A directive is done; `row` is its line of metrics.jsonl."""
        if isinstance(observation, Trained):
            self._steps += observation.steps
        self._log(_figures(row), self._steps)

    def result(self, values: Mapping[str, float | None]) -> None:
        """The last figures; nothing follows."""
        self._log({name: value for name, value in values.items() if value is not None}, self._steps)
        for tracker in self._trackers:
            tracker.finish()

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if values:
            for tracker in self._trackers:
                tracker.log(values, step)


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, named by what they are of: recover/loss, holdout/accuracy, remove/macs, ..."""
    of = row.get("note") or row.get("label") or row.get("split") or str(row["kind"]).lower()
    if row.get("model"):
        of = f"{of} of {row['model']}"
    numbers = {**row, **row.get("values", {})}
    return {
        f"{of}/{name}": float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NOT_FIGURES
    }

"""A job of several processes: the first one's adapter says what all are to do, and the others do it.

The method runs once, in the first process. Every directive is sent to the others and carried out by all,
each on its share of the images; before that, all compare the hashes of their plans. Only the first process
writes. What a resumed run reads, it sends on, so that the others need not see the run's folder, and the
number of processes may be another than before. Only then the plans are not compared: they become the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from prunus.adapters.pytorch.adapter import AdapterSettings, PyTorchAdapter
from prunus.adapters.pytorch.batches import DataBundle
from prunus.adapters.pytorch.processes import SeveralProcesses
from prunus.adapters.pytorch.shrinking_model import Origin
from prunus.adapters.pytorch.signals import MeasuredSignals
from prunus.core.digest import digest
from prunus.core.directives import (
    Changed,
    Evaluate,
    Evaluated,
    Grow,
    Measure,
    Merge,
    Remove,
    Snapshot,
    Train,
    Trained,
)
from prunus.core.errors import JournalError

_DIRECTIVES = ("evaluate", "train", "grow", "merge", "remove", "snapshot")


class LeadingAdapter(PyTorchAdapter):
    """The first process's adapter: others follow whatever is asked of it."""

    def __init__(
        self,
        model: nn.Module,
        origin: Origin,
        settings: AdapterSettings,
        data: DataBundle | None,
        processes: SeveralProcesses,
    ) -> None:
        super().__init__(model, origin, settings, data, processes)
        self._others = processes

    def _order(self, task: str, argument: Any = None) -> None:
        self._others.tell((task, argument))
        self._others.check_same("plan", plan_digest(self))

    def measure(self, directive: Measure) -> MeasuredSignals:
        self._order("measure", directive)
        reader = super().measure(directive)
        reader.announce = lambda names: self._order("collect", names)
        return reader

    def evaluate(self, directive: Evaluate) -> Evaluated:
        self._order("evaluate", directive)
        return super().evaluate(directive)

    def train(self, directive: Train) -> Trained:
        self._order("train", directive)
        return super().train(directive)

    def grow(self, directive: Grow) -> Changed:
        self._order("grow", directive)
        return super().grow(directive)

    def merge(self, directive: Merge) -> Changed:
        self._order("merge", directive)
        return super().merge(directive)

    def remove(self, directive: Remove) -> Changed:
        self._order("remove", directive)
        return super().remove(directive)

    def snapshot(self, directive: Snapshot) -> None:
        self._order("snapshot", directive)
        super().snapshot(directive)

    def test(self) -> Evaluated:
        self._order("test")
        return super().test()

    def restore(self, folder: Path) -> None:
        super().restore(folder)  # first: where this refuses, the others are asked for another checkpoint alone
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self._others.tell(("restore", names))  # until all have it, plans differ; the next directive compares them
        for name in names:
            self._others.tell((folder / name).read_bytes())

    def dismiss(self) -> None:
        """The job is done. Raises ProcessError if another process holds another plan."""
        self._order("leave")
        self._others.leave()


def follow(adapter: PyTorchAdapter, processes: SeveralProcesses) -> None:
    """Carry out what the first process's `LeadingAdapter` orders, until it dismisses.

    Raises ProcessError if that process ends before or if plans differ, and what `adapter` raises.
    """
    reader: MeasuredSignals | None = None
    while True:
        task, argument = processes.tell(None)
        if task == "restore":
            _restore(adapter, argument, processes)
            continue
        processes.check_same("plan", plan_digest(adapter))
        if task == "leave":
            processes.leave()
            return
        if task == "measure":
            reader = adapter.measure(argument)
        elif task == "collect":
            assert reader is not None
            reader.collect(argument)
        elif task == "test":
            adapter.test()
        else:
            assert task in _DIRECTIVES
            getattr(adapter, task)(argument)


def _restore(adapter: PyTorchAdapter, names: list[str], processes: SeveralProcesses) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in names:
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise JournalError(f"the checkpoint names a file outside of its folder: {name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(processes.tell(None))
        adapter.restore(folder)


def plan_digest(adapter: PyTorchAdapter) -> str:
    """The hash of everything that has happened to the model, wherever it happened."""
    return digest(adapter.plan.model_dump(mode="json", exclude={"provenance"}))

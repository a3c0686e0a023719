"""Running one cell of a comparison, or training the dense model that cells start from."""

from __future__ import annotations

import importlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prunus.core.adapter import OpenSession, Session
from prunus.core.compare_protocol import Cell, Protocol, Teaching
from prunus.core.compare_record import (
    SOURCE,
    CellRecord,
    DenseRecord,
    Outcome,
    ResultsFolder,
    content_of,
    named,
    source_digest,
)
from prunus.core.directives import Evaluate, Evaluated, Train
from prunus.core.errors import ConfigError
from prunus.core.plan import PruningPlan
from prunus.core.pruning import Silent, prune
from prunus.core.registry import Registry
from prunus.core.report import Report
from prunus.core.run_folder import RunFolder
from prunus.core.settings import RunSettings

_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
"""What getrusage counts in."""


@dataclass(frozen=True, slots=True)
class RivalJob:
    """All that a rival is told. It answers with an `Outcome`."""

    settings: RunSettings
    """Model, data, seed, training settings, target, recovery epochs, and the dense model as checkpoint."""
    teaching: Teaching
    config: Mapping[str, Any]
    """The entry's own settings."""
    dense: DenseRecord
    dense_epochs: float
    limit: float
    """The target: MACs of one forward pass of one image."""
    open_session: OpenSession

    @property
    def share(self) -> float:
        """The target as a share of the dense model's MACs."""
        return self.limit / self.dense.macs


Rival = Callable[[RivalJob], Outcome]


def train_dense(protocol: Protocol, seed: int, results: ResultsFolder, registry: Registry) -> DenseRecord:
    """The dense model of that seed: from its folder, or trained now and saved there."""
    key = protocol.dense_key(seed)
    found = results.read_dense(key)
    if found is not None:
        return found
    started = time.monotonic()
    session = registry.adapter(protocol.adapter)(protocol.dense_settings(seed))
    trained = session.adapter.train(Train(epochs=protocol.dense.epochs, label="dense"))
    holdout, test = _judged(session)
    folder = results.dense_folder(key)
    folder.mkdir(parents=True, exist_ok=True)
    session.save(folder, PruningPlan(model=session.source), {})
    record = DenseRecord(
        seed=seed,
        accuracy=test.accuracy,
        holdout=holdout.accuracy,
        macs=session.graph.cost().macs,
        training_macs=trained.macs,
        seconds=round(time.monotonic() - started, 1),
        content=content_of(folder),
    )
    results.write_dense(key, record)
    return record


def run_cell(
    protocol: Protocol, cell: Cell, results: ResultsFolder, registry: Registry, import_from: Path | None
) -> CellRecord:
    """Run the cell and write its record. Raises what the run raises: the caller records failures."""
    key = protocol.key(cell)
    dense = train_dense(protocol, cell.seed, results, registry)
    wall, cpu = time.monotonic(), time.process_time()
    checkpoint = results.dense_folder(protocol.dense_key(cell.seed)) / "model.safetensors"
    settings = protocol.settings(cell, checkpoint)
    if cell.entry.rival is not None:
        outcome, versions = _run_rival(protocol, cell, settings, dense, registry, import_from)
    else:
        outcome, versions = _run_plugin(protocol, cell, settings, dense, registry, results.work_folder(key))
    record = CellRecord(
        **named(cell, key),  # type: ignore[arg-type]
        status="done",
        dense=dense,
        outcome=outcome,
        seconds=round(time.monotonic() - wall, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MEMORY_UNIT,
        versions={**versions, SOURCE: source_digest()},
    )
    results.write(record)
    return record


def _run_plugin(
    protocol: Protocol, cell: Cell, settings: RunSettings, dense: DenseRecord, registry: Registry, work: Path
) -> tuple[Outcome, dict[str, str]]:
    scratch = registry.policy(settings.plugin).starts_from == "scratch"
    if scratch:
        epochs = scratch_epochs(protocol.dense.epochs, cell.epochs, _limit(settings, dense) / dense.macs)
        settings = settings.model_copy(update={"checkpoint": None, "epochs": cell.entry.compute * epochs})
    opened: list[Session] = []

    def open_session(chosen: RunSettings) -> Session:
        opened.append(registry.adapter(chosen.adapter)(chosen))
        return opened[0]

    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = prune(
            settings,
            RunFolder(work),
            registry,
            Silent(),
            resume=False,
            overwrite=True,
            open_session=open_session,
        )
        holdout = opened[0].adapter.evaluate(Evaluate())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    assert report.pruned.accuracy is not None
    spent = [f"{settings.epochs:g} epochs of the dense network's compute, from scratch"] if scratch else []
    opening = opened[0].describe().notes  # of the machine and the model, not of this cell
    outcome = Outcome(
        accuracy=report.pruned.accuracy,
        holdout=holdout.accuracy,
        macs=report.pruned.macs,
        params=report.pruned.params,
        training_macs=_compute(report),
        uses_dense=not scratch,
        notes=(*spent, *(note for note in report.notes if note not in opening)),
    )
    return outcome, report.versions


def _compute(report: Report) -> float:
    """MACs of all trainings, and of the search where the method counted it (its note "compute")."""
    noted = [row["values"]["macs"] for row in report.history if row.get("note") == "compute"]
    return max(report.training_macs, *noted) if noted else report.training_macs


def scratch_epochs(dense_epochs: float, recovery_epochs: float, share: float) -> float:
    """The compute of dense training plus recovery at `share` of the MACs, in epochs of the dense network."""
    return dense_epochs + recovery_epochs * share


def _run_rival(
    protocol: Protocol,
    cell: Cell,
    settings: RunSettings,
    dense: DenseRecord,
    registry: Registry,
    import_from: Path | None,
) -> tuple[Outcome, dict[str, str]]:
    assert cell.entry.rival is not None
    rival = load_rival(cell.entry.rival, import_from)
    versions: dict[str, str] = {}

    def open_session(chosen: RunSettings) -> Session:
        session = registry.adapter(chosen.adapter)(chosen)
        versions.update(session.describe().versions)
        return session

    limit = _limit(settings, dense)
    job = RivalJob(settings, cell.teaching, cell.config, dense, protocol.dense.epochs, limit, open_session)
    return rival(job), versions


def load_rival(target: str, import_from: Path | None) -> Rival:
    """Import `module:function`. Raises ConfigError saying what is missing."""
    if import_from is not None and str(import_from) not in sys.path:
        sys.path.append(str(import_from))
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rival {target!r} cannot be imported: {error}", key="rival") from None
    return cast(Rival, found)


def _limit(settings: RunSettings, dense: DenseRecord) -> float:
    target = settings.parsed_targets[0]
    return target.share * dense.macs if target.share is not None else cast(float, target.amount)


def _judged(session: Session) -> tuple[Evaluated, Evaluated]:
    test = session.test()
    if test is None:
        raise ConfigError("a comparison needs data; the protocol's data is none", key="data")
    return session.adapter.evaluate(Evaluate()), test

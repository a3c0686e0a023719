"""`--target latency=12ms`: a table of timed layers before the run, a measurement of the result after it.

The table (`latency.json` in the run folder) is measured once: a resumed run reads it, so that it decides as
before. It is corrected where it matters: the original model, evenly narrowed to the target, is timed, and
the table scaled to what was measured, before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from prunus.core.adapter import Session
from prunus.core.allocation import raise_if_unreachable, uniform_keep
from prunus.core.budget import Budget, Target
from prunus.core.cost import Cost
from prunus.core.errors import ConfigError, JournalError
from prunus.core.files import write_atomically
from prunus.core.latency import Correction, LatencyTable, Stopwatch
from prunus.core.run_folder import RunFolder

TABLE_FILE = "latency.json"
MARGIN = 0.02
"""The table is made slower by so much: two measurements of one model differ."""
_ROUNDS = 2
_MAX_BYTES = 64 * 2**20
_TABLES = TypeAdapter(LatencyTable)


class LatencyResult(BaseModel):
    """What came of a latency target; seconds of one sample on this machine."""

    model_config = ConfigDict(extra="forbid")
    limit: float
    dense: float
    pruned: float
    predicted: float
    threads: int
    check_errors: list[float]
    """Relative errors of the table on whole models that it was not fitted to."""
    message: str


def timed(session: Session, targets: Sequence[Target], folder: RunFolder, resume: bool) -> LatencyTable | None:
    """Give the session's graph latency terms, if a target asks for them: measured, or the run's own.

    Raises ConfigError if the adapter cannot time models, UnreachableTargetError, JournalError for a damaged
    table.
    """
    wanted = [target for target in targets if target.quantity == "latency"]
    if not wanted:
        return None
    if not isinstance(session, Stopwatch):
        raise ConfigError(f"adapter {session.settings.adapter!r} cannot time models", key="target")
    began = resume and (folder.journal / "head.json").exists()
    table = read_table(folder) if began else _measured(session, wanted)
    session.add_terms(table.terms)
    return table


def full_cost(session: Session, table: LatencyTable | None) -> Cost:
    """The cost that shares are shares of: latency as it was measured."""
    cost = session.graph.cost()
    return cost if table is None else replace(cost, latency=table.dense)


def _measured(session: Stopwatch, targets: Sequence[Target]) -> LatencyTable:
    table = session.time_layers()
    for _ in range(_ROUNDS):
        graph = session.graph.with_terms(table.terms)
        budget = Budget.resolve(targets, replace(graph.cost(), latency=table.dense))
        raise_if_unreachable(graph, budget)
        keep = uniform_keep(graph, budget, {name: np.ones(group.units) for name, group in graph.groups.items()})
        counts = {name: len(units) for name, units in keep.items()}
        seconds = session.time_at(counts) * (1 + MARGIN)
        correction = Correction(budget.limits["latency"], graph.cost(counts).latency, seconds)
        table = replace(table, terms=correction.apply(table.terms))
    return table


def result(session: Session, table: LatencyTable, budget: Budget) -> LatencyResult:
    """Times the session's model as it is now."""
    assert isinstance(session, Stopwatch)
    predicted = session.adapter.graph.cost().latency
    correction = Correction(budget.limits["latency"], predicted, session.time_at(None))
    message = str(correction)
    if not correction.met:
        again = correction.limit / correction.factor * 1e3
        message += f"; repeat with --target latency={again:.3g}ms, which allows for the difference"
    return LatencyResult(
        limit=correction.limit,
        dense=table.dense,
        pruned=correction.measured,
        predicted=predicted,
        threads=table.threads,
        check_errors=[float(e) for e in table.errors],
        message=message,
    )


def write_table(folder: RunFolder, table: LatencyTable) -> None:
    write_atomically(folder.path / TABLE_FILE, _TABLES.dump_json(table))


def read_table(folder: RunFolder) -> LatencyTable:
    """Raises JournalError if the file is missing or damaged."""
    path = folder.path / TABLE_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise JournalError(f"{path} is larger than a latency table can be")
        table = _TABLES.validate_json(path.read_bytes())
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise JournalError(f"{path} is damaged: {where}: {first['msg']}") from None
    if not all(0 <= t.coefficient < math.inf and t.quantity == "latency" for t in table.terms):
        raise JournalError(f"{path} is damaged: a latency term is negative, not finite or of another quantity")
    return table

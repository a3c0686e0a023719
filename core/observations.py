"""Observations as plain data and back, and the reader that remembers what was read from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from prunus.core.cost import FloatArray
from prunus.core.directives import Changed, Evaluated, Observation, Trained, Verification
from prunus.core.errors import ConfigError, JournalError, PlanError, PluginError
from prunus.core.graph_record import GraphRecord, rebuild_graph, record_graph
from prunus.core.plan import PruningPlan
from prunus.core.signals import Signal, SignalReader

Arrays = Mapping[str, np.ndarray]
TRIANGULAR = 64
"""Symmetric matrices from this side on are stored as their lower triangle."""
_Name = Annotated[str, Field(max_length=512)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _NothingRecord(_Record):
    kind: Literal["nothing"] = "nothing"


class _TrainedRecord(_Record):
    kind: Literal["trained"] = "trained"
    loss: float
    accuracy: float | None
    macs: float
    steps: int
    least: float | None = None


class _EvaluatedRecord(_Record):
    kind: Literal["evaluated"] = "evaluated"
    loss: float
    accuracy: float
    samples: int


class _VerificationRecord(_Record):
    kind: Literal["exact", "skipped"]
    max_error: float
    scale: float


class _ChangedRecord(_Record):
    kind: Literal["changed"] = "changed"
    graph: GraphRecord
    plan: PruningPlan
    verification: _VerificationRecord
    refit_from: float | None
    branched_macs: float | None = None


class _ReadRecord(_Record):
    signal: Signal
    name: _Name


class _ArrayRecord(_ReadRecord):
    side: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Of a symmetric matrix that is stored as its lower triangle; None if the array is stored as it is."""


class _SignalsRecord(_Record):
    kind: Literal["signals"] = "signals"
    reads: list[_ArrayRecord]
    """The i-th read's array is stored as "read.i"."""
    absent: list[_ReadRecord]
    """Names that were asked for and are not there."""
    there: list[_ReadRecord]
    """Names that `has` said yes to."""


ObservationRecord = Annotated[
    _NothingRecord | _TrainedRecord | _EvaluatedRecord | _ChangedRecord | _SignalsRecord,
    Field(discriminator="kind"),
]

_Key = tuple[Signal, str]


class RecordingReader:
    """Passes reads on to `source` and remembers the answers, until it is closed."""

    def __init__(self, source: SignalReader, plugin: str) -> None:
        self._source, self._plugin = source, plugin
        self._closed = False
        self.reads: dict[_Key, FloatArray] = {}
        self.presence: dict[_Key, bool] = {}

    def read(self, signal: Signal, name: str) -> FloatArray:
        self._check_open()
        key = (signal, name)
        if key not in self.reads:
            try:
                # in the order of memory that the journal gives back: sums depend on it
                array = np.asarray(self._source.read(signal, name), dtype=np.float64, order="C")
            except PlanError:
                self.presence[key] = False
                raise
            array = array.view()
            array.setflags(write=False)
            self.reads[key] = array
        return self.reads[key]

    def has(self, signal: Signal, name: str) -> bool:
        self._check_open()
        key = (signal, name)
        if key not in self.presence:
            self.presence[key] = self._source.has(signal, name)
        return self.presence[key]

    def close(self) -> None:
        """From now on reading is the plugin's fault. What was read stays until it is recorded."""
        self._closed = True
        del self._source  # with what it measured

    def _check_open(self) -> None:
        if self._closed:
            rule = "signals can be read only until the next directive is yielded"
            raise PluginError(self._plugin, rule, "Copy what you need before yielding.")


class RecordedReader:
    """Answers from the journal what was read the first time."""

    def __init__(self, reads: Mapping[_Key, FloatArray], presence: Mapping[_Key, bool]) -> None:
        self._reads, self._presence = reads, presence

    def read(self, signal: Signal, name: str) -> FloatArray:
        if self._presence.get((signal, name)) is False:
            raise PlanError(f"there is no {signal.value} of {name!r}")
        if (signal, name) not in self._reads:
            raise JournalError(
                f"the journal holds no {signal.value} of {name!r}: the method is not a deterministic function of "
                "its observations, or its code has changed since the run began"
            )
        return self._reads[signal, name]

    def has(self, signal: Signal, name: str) -> bool:
        if (signal, name) in self._reads:
            return True
        if (signal, name) not in self._presence:
            raise ConfigError(f"the journal does not know whether there was {signal.value} of {name!r}")
        return self._presence[signal, name]


def record(observation: Observation) -> tuple[ObservationRecord, dict[str, np.ndarray]]:
    """The observation as validated plain data, and its arrays."""
    if observation is None:
        return _NothingRecord(), {}
    if isinstance(observation, Trained):
        return _TrainedRecord(**asdict(observation)), {}
    if isinstance(observation, Evaluated):
        return _EvaluatedRecord(**asdict(observation)), {}
    if isinstance(observation, Changed):
        graph, indices = record_graph(observation.graph)
        verification = _VerificationRecord(**asdict(observation.verification))
        changed = _ChangedRecord(
            graph=graph,
            plan=observation.plan,
            verification=verification,
            refit_from=observation.refit_from,
            branched_macs=observation.branched_macs,
        )
        return changed, {"indices": indices}
    if isinstance(observation, RecordingReader):
        return _record_reads(observation)
    raise TypeError(f"{type(observation).__name__} is not an observation")


def _record_reads(reader: RecordingReader) -> tuple[_SignalsRecord, dict[str, np.ndarray]]:
    """Takes the arrays out of `reader`: they may be gigabytes, and runs measure many times."""
    said = [(key, there) for key, there in reader.presence.items() if key not in reader.reads]
    reads, stored = [], {}
    for i, (signal, name) in enumerate(list(reader.reads)):
        array = reader.reads.pop((signal, name))
        side = len(array) if _is_symmetric(array) else None
        reads.append(_ArrayRecord(signal=signal, name=name, side=side))
        stored[f"read.{i}"] = _narrowed(array if side is None else array[np.tri(side, dtype=bool)])
    signals = _SignalsRecord(
        reads=reads,
        absent=[_ReadRecord(signal=s, name=n) for (s, n), there in said if not there],
        there=[_ReadRecord(signal=s, name=n) for (s, n), there in said if there],
    )
    return signals, stored


def _narrowed(array: FloatArray) -> np.ndarray:
    """In single precision where that holds every number exactly, as it does weights."""
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    return np.asarray(single if np.array_equal(single, array) else array, order="C")


def _is_symmetric(array: FloatArray) -> bool:
    """True for a covariance that is large enough for half of it to matter."""
    square = array.ndim == 2 and array.shape[0] == array.shape[1] >= TRIANGULAR
    return square and np.array_equal(array, array.T)


def _whole(triangle: np.ndarray, side: int) -> np.ndarray:
    """The symmetric matrix of a lower triangle. Raises ValueError if it is of another size."""
    if triangle.shape != (side * (side + 1) // 2,):
        raise ValueError(f"the triangle of a {side} x {side} matrix cannot be an array of shape {triangle.shape}")
    lower = np.tri(side, dtype=bool)
    matrix = np.empty((side, side))
    matrix.T[lower] = triangle
    matrix[lower] = triangle
    return matrix


def rebuild(record: ObservationRecord, arrays: Arrays) -> Observation:
    """The observation of a record. Raises PlanError or KeyError if the arrays do not fit it."""
    if isinstance(record, _NothingRecord):
        return None
    if isinstance(record, _TrainedRecord):
        return Trained(record.loss, record.accuracy, record.macs, record.steps, record.least)
    if isinstance(record, _EvaluatedRecord):
        return Evaluated(record.loss, record.accuracy, record.samples)
    if isinstance(record, _ChangedRecord):
        verification = Verification(**record.verification.model_dump())
        graph = rebuild_graph(record.graph, arrays["indices"])
        return Changed(graph, record.plan, verification, record.refit_from, record.branched_macs)
    reads = {}
    for i, item in enumerate(record.reads):
        array = arrays[f"read.{i}"]
        reads[item.signal, item.name] = _frozen(array if item.side is None else _whole(array, item.side))
    presence = {(item.signal, item.name): False for item in record.absent}
    presence |= {(item.signal, item.name): True for item in record.there}
    return RecordedReader(reads, presence)


def _frozen(array: np.ndarray) -> FloatArray:
    plain = np.array(array, dtype=np.float64)
    plain.setflags(write=False)
    return plain

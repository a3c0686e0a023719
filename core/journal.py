"""The journal of a run: every directive's digest with its observation, on disk, in order.

    journal/head.json           schema, version, digest of what the run depends on
    journal/000017.json         one entry: kind, digest of the directive, observation, SHA-256 of itself
    journal/000017.safetensors  the entry's arrays, if it has any

Entries are written once, atomically, arrays first. Reading trusts nothing: sizes are bounded, digests
are checked, and names inside a file never become paths.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save_file

from prunus.core.directives import Observation
from prunus.core.errors import JournalError, PlanError
from prunus.core.files import sync_folder, write_atomically
from prunus.core.observations import ObservationRecord, rebuild, record

SCHEMA = 1
MAX_ENTRY_BYTES = 64 * 2**20
MAX_ARRAY_BYTES = 16 * 2**30
_ENTRY_NAME = re.compile(r"(\d{6})\.json")
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Head(BaseModel):
    """What a journal belongs to. Further keys of other versions are passed over, so that they can be refused."""

    model_config = ConfigDict(extra="ignore")
    schema_: Annotated[int, Field(alias="schema")]
    version: Annotated[str, Field(max_length=64)]
    """Version of prunus that began the run."""
    belongs_to: _Digest
    """Digest of graph, settings and everything else that the directives follow from."""


class _EntryRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")
    index: Annotated[int, Field(ge=0, lt=10**6)]
    kind: Literal["Measure", "Train", "Evaluate", "Grow", "Merge", "Remove", "Snapshot", "Note"]
    directive: _Digest
    seconds: float
    observation: ObservationRecord
    arrays: _Digest | None
    """SHA-256 of the array file; None if there is none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One directive that was carried out, and what came back."""

    index: int
    kind: str
    directive: str
    """Digest of the directive."""
    seconds: float
    folder: Path

    @property
    def observation(self) -> Observation:
        """Read from the disk each time: the measurements of a long run do not fit in memory together.

        Raises JournalError if the files are no longer what they were when the journal was opened.
        """
        return _observation(self.folder, self.index, _read_record(self.folder, self.index))


class Journal:
    """An append-only folder. Everything in it is checked when it is opened, one entry after the other."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.folder, self.entries = folder, entries

    @classmethod
    def create(cls, folder: Path, version: str, belongs_to: str) -> Journal:
        """A new, empty journal; `folder` must not hold one."""
        folder.mkdir(parents=True, exist_ok=True)
        head = Head.model_validate({"schema": SCHEMA, "version": version, "belongs_to": belongs_to})
        write_atomically(folder / "head.json", head.model_dump_json(by_alias=True, indent=1))
        return cls(folder, [])

    @classmethod
    def open(cls, folder: Path, version: str, belongs_to: str | None) -> Journal:
        """The journal in `folder`, all entries checked.

        Raises JournalError naming the file that is missing or damaged, both versions if another schema wrote
        it, or that it belongs to another run.
        """
        head = read_head(folder)
        if head.schema_ != SCHEMA:
            raise JournalError(
                f"{folder} was written with journal schema {head.schema_} by prunus {head.version}; this is "
                f"prunus {version}, which reads schema {SCHEMA}. Resume it with that version."
            )
        if belongs_to is not None and head.belongs_to != belongs_to:
            raise JournalError(
                f"{folder} belongs to another model, data set, configuration or library version than the one "
                f"at hand (written by prunus {head.version}); start a new run"
            )
        return cls(folder, _read_entries(folder))

    def append(self, kind: str, directive: str, observation: Observation, seconds: float) -> None:
        """Write the next entry. Raises OSError (disk full) with the journal as it was."""
        index = len(self.entries)
        observed, arrays = record(observation)
        checksum = None
        if arrays:
            checksum = _write_arrays(self._arrays(index), arrays)
        entry = _EntryRecord.model_validate(
            {
                "index": index,
                "kind": kind,
                "directive": directive,
                "seconds": seconds,
                "observation": observed,
                "arrays": checksum,
            }
        )
        data = entry.model_dump(mode="json", by_alias=True)
        text = json.dumps({"entry": data, "sha256": _checksum(data)}, indent=0)
        if len(text) > MAX_ENTRY_BYTES:
            raise JournalError(f"entry {index} ({kind}) is {len(text)} bytes, the limit is {MAX_ENTRY_BYTES}")
        write_atomically(self._entry(index), text)
        self.entries.append(Entry(index, kind, directive, seconds, self.folder))

    def truncate(self, length: int) -> None:
        """Forget the entries from `length` on, the last one first, so that a crash leaves no gap."""
        while len(self.entries) > length:
            index = len(self.entries) - 1
            self._entry(index).unlink(missing_ok=True)
            self._arrays(index).unlink(missing_ok=True)
            self.entries.pop()
        sync_folder(self.folder)

    def _entry(self, index: int) -> Path:
        return self.folder / f"{index:06d}.json"

    def _arrays(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    """Write the arrays, without a copy of all in memory; the SHA-256 of the file. Raises OSError."""
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        try:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary)
        except SafetensorError as error:  # what the system said, in words
            raise OSError(f"{temporary.name} cannot be written: {error}") from error
        with temporary.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()

    write_atomically(path, write)
    return digest


def read_head(folder: Path) -> Head:
    """The head of a journal. Raises JournalError."""
    path = folder / "head.json"
    try:
        return Head.model_validate_json(_read_bounded(path, 2**16))
    except ValidationError as error:
        raise JournalError(f"{path} is damaged: {error.errors()[0]['msg']}") from None


def _read_entries(folder: Path) -> list[Entry]:
    found = sorted(int(m[1]) for path in folder.iterdir() if (m := _ENTRY_NAME.fullmatch(path.name)))
    if found != list(range(len(found))):
        missing = next(i for i, index in enumerate(found) if index != i)
        raise JournalError(f"{folder}: entry {missing:06d}.json is missing")
    return [_read_entry(folder, index) for index in found]


def _read_entry(folder: Path, index: int) -> Entry:
    record = _read_record(folder, index)
    _observation(folder, index, record)
    return Entry(index, record.kind, record.directive, record.seconds, folder)


def _read_record(folder: Path, index: int) -> _EntryRecord:
    path = folder / f"{index:06d}.json"
    raw = _read_bounded(path, MAX_ENTRY_BYTES)
    try:
        outer = json.loads(raw)
        data = outer["entry"]
        if outer["sha256"] != _checksum(data):
            raise JournalError(f"{path} is damaged: its checksum does not match")
        parsed = _EntryRecord.model_validate(data)
    except ValidationError as error:
        raise JournalError(f"{path} is damaged: {error.errors()[0]['msg']}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise JournalError(f"{path} is damaged: {type(error).__name__} {str(error)[:200]}") from None
    if parsed.index != index:
        raise JournalError(f"{path} is damaged: it says it is entry {parsed.index}")
    return parsed


def _observation(folder: Path, index: int, record: _EntryRecord) -> Observation:
    arrays = _read_arrays(folder / f"{index:06d}.safetensors", record.arrays)
    try:
        return rebuild(record.observation, arrays)
    except (PlanError, KeyError, IndexError, ValueError, OverflowError) as error:
        raise JournalError(f"{folder / f'{index:06d}.json'} is damaged: {error}") from None


def _read_arrays(path: Path, checksum: str | None) -> dict[str, np.ndarray]:
    if checksum is None:
        return {}
    content = _read_bounded(path, MAX_ARRAY_BYTES)
    if hashlib.sha256(content).hexdigest() != checksum:
        raise JournalError(f"{path} is damaged: its checksum does not match")
    try:
        return dict(load_arrays(content))
    except (SafetensorError, ValueError, KeyError) as error:
        raise JournalError(f"{path} is damaged: {error}") from None


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise JournalError(f"{path} is {size} bytes, more than the {limit} allowed")
        return path.read_bytes()
    except FileNotFoundError:
        raise JournalError(f"{path} is missing") from None
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from None


def _checksum(data: Any) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()

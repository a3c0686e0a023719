"""What a comparison leaves on disk: one JSON file per cell, one folder per dense model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunus.core.compare_protocol import Cell, Protocol
from prunus.core.errors import LoadError
from prunus.core.files import write_atomically
from prunus.core.plugin_settings import first_problem

SOURCE = "source"
"""Among a record's versions: the state of the product's own source (`source_digest`)."""


class DenseRecord(BaseModel):
    """A dense model that all cells of its seed start from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int
    accuracy: float
    holdout: float
    macs: float
    training_macs: float
    seconds: float
    content: str
    """SHA-256 of the files of the model."""


class Outcome(BaseModel):
    """What a cell came to. Accuracies are shares of 1; MACs are of one image, or of a whole training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    accuracy: float
    """On test, measured once, at the end."""
    holdout: float
    macs: float
    params: float
    training_macs: float
    """Of the cell alone: 3 forwards per image, teachers' forwards included."""
    uses_dense: bool
    """True if the dense training was spent, too."""
    notes: tuple[str, ...] = ()
    """What was chosen by the hold-out, what was worked round."""


class CellRecord(BaseModel):
    """A finished cell, or one that failed and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cell: str
    key: str
    entry: str
    group: str
    target: str
    epochs: float
    teaching: str
    seed: int
    status: Literal["done", "failed"]
    error: str | None = None
    dense: DenseRecord | None = None
    outcome: Outcome | None = None
    seconds: float = 0.0
    """Wall-clock time, tracing and testing included."""
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    """Bytes, of the whole process."""
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def failure(cls, cell: Cell, key: str, error: str) -> CellRecord:
        return cls(**named(cell, key), status="failed", error=error)  # type: ignore[arg-type]

    @property
    def total_macs(self) -> float:
        """Training from random weights to the result."""
        if self.outcome is None or self.dense is None:
            return 0.0
        return self.outcome.training_macs + (self.dense.training_macs if self.outcome.uses_dense else 0.0)


def named(cell: Cell, key: str) -> dict[str, object]:
    """The fields of a record that say which cell it is."""
    return {
        "cell": cell.name,
        "key": key,
        "entry": cell.entry.name,
        "group": cell.entry.side,
        "target": cell.target,
        "epochs": cell.epochs,
        "teaching": cell.teaching,
        "seed": cell.seed,
    }


class ResultsFolder:
    """OUTPUT/: cells/KEY.json, dense/KEY/, and the tables made from them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        for folder in (self.path / "cells", self.path / "dense"):
            folder.mkdir(parents=True, exist_ok=True)

    def cell_file(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.json"

    def dense_folder(self, key: str) -> Path:
        return self.path / "dense" / key

    def work_folder(self, key: str) -> Path:
        """Where a cell runs; gone when it is finished."""
        return self.path / "work" / key

    def write(self, record: CellRecord) -> None:
        write_atomically(self.cell_file(record.key), record.model_dump_json(indent=1) + "\n")

    def read(self, cell: Cell, key: str) -> CellRecord | None:
        """The record of that cell, called by its present name; None if there is none. Raises LoadError."""
        path = self.cell_file(key)
        if not path.is_file():
            return None
        try:
            found = CellRecord.model_validate_json(path.read_text("utf-8"))
        except ValidationError as error:
            raise LoadError(
                f"{path} is damaged: {first_problem(error)}; delete it to run its cell again"
            ) from None
        return found.model_copy(update=named(cell, key))

    def read_all(self, protocol: Protocol) -> list[CellRecord]:
        """All records of the protocol's cells that are there, in the order of the grid."""
        found = (self.read(cell, protocol.key(cell)) for cell in protocol.cells)
        return [record for record in found if record is not None]

    def read_dense(self, key: str) -> DenseRecord | None:
        """The record of a dense model, None if there is none. Raises LoadError if its files have changed."""
        folder = self.dense_folder(key)
        path = folder / "dense.json"
        if not path.is_file():
            return None
        try:
            record = DenseRecord.model_validate_json(path.read_text("utf-8"))
        except ValidationError as error:
            raise LoadError(f"{path} is damaged: {first_problem(error)}; delete {folder}") from None
        if content_of(folder) != record.content:
            raise LoadError(f"the dense model in {folder} is not the one that was trained; delete the folder")
        return record

    def write_dense(self, key: str, record: DenseRecord) -> None:
        write_atomically(self.dense_folder(key) / "dense.json", record.model_dump_json(indent=1) + "\n")


def content_of(folder: Path) -> str:
    """SHA-256 of a saved model's files, names included."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in ("plan.json", "model.safetensors"):
            whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def source_digest() -> str:
    """A short name for the product's source: cells of one table should share it."""
    root = Path(__file__).resolve().parents[1]
    whole = hashlib.sha256()
    for folder in ("core", "plugins", "adapters"):
        for path in sorted((root / folder).rglob("*.py")):
            whole.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]

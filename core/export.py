"""What an export produced, and the proof that it answers like the model it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

ExportFormat = Literal["onnx", "program", "hub"]
"""`onnx`: an ONNX file. `program`: a torch.export archive (.pt2). `hub`: a folder for a model hub."""
OUTPUTS: dict[ExportFormat, str] = {"onnx": "model.onnx", "program": "model.pt2", "hub": "hub"}
"""What an export is called inside the run's folder."""
TOLERANCE = 1e-4
"""Largest difference to the model's own output that an export may show, as a share of the largest output."""


@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison of the exported file with the model."""

    inputs: Literal["random", "real"]
    batch: int
    max_error: float
    """Largest absolute difference over all outputs."""
    scale: float
    """Largest absolute value in the model's own outputs."""

    @property
    def relative_error(self) -> float:
        """`max_error` as a share of `scale`; absolute where the model answers with zeros."""
        return self.max_error / (self.scale or 1.0)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """One written file."""

    path: Path
    format: ExportFormat
    bytes: int
    dynamic_batch: bool
    """True if the file takes any batch size; otherwise only the one in `checks`."""
    checks: tuple[Parity, ...]
    notes: tuple[str, ...] = ()
    """What the user should know: why the batch size is fixed."""

    @property
    def max_error(self) -> float:
        """The worst relative error of all comparisons."""
        return max(check.relative_error for check in self.checks)


@runtime_checkable
class Exporter(Protocol):
    """A session whose framework writes files for other runtimes, or folders for a model hub."""

    def export(
        self, folder: Path, path: Path, form: ExportFormat, input_size: tuple[int, int, int]
    ) -> ExportReport:
        """Write the model of the finished run in `folder` to `path`, for images of `input_size` (C, H, W).

        Compared with the model on random images, and on test images where the session has data. Raises
        TraceError if the model has no such form, VerificationError if the file answers differently,
        MissingDependencyError without the packages it takes.
        """
        ...


@runtime_checkable
class Publisher(Protocol):
    """A session that can upload a folder written in the format `hub`."""

    def publish(self, folder: Path, repository: str) -> str:
        """Upload to `OWNER/NAME` and return its address. Raises LoadError if the hub does not take it."""
        ...

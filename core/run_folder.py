"""The folder of a run: what lies where, and who may write into it.

runs/NAME/  run.toml  plan.json  model.safetensors  report.json  report.html  metrics.jsonl  dense.json
            journal/  checkpoint/  trackers/
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.core.errors import ConfigError, JournalError, LoadError, RunExistsError
from prunus.core.files import write_atomically
from prunus.core.plan import UNNAMED
from prunus.core.settings import RunSettings, make_settings, read_settings

FILES = (
    "run.toml",
    "plan.json",
    "model.safetensors",
    "report.json",
    "report.html",
    "metrics.jsonl",
    "dense.json",
    "latency.json",
    "model.onnx",
    "model.onnx.data",
    "model.pt2",
)
_HUB = ("README.md", "config.json", "model.safetensors")
"""What an export for a model hub leaves in the folder hub/."""
FOLDERS = ("journal", "checkpoint", "trackers")
_HALF_WRITTEN = re.compile(r"\..+\.\d+\.tmp")
"""What a process that was killed while it wrote a file leaves behind."""
MAX_JSON_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run, and its small files."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "run.toml"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        return (self.path / "report.json").is_file()

    @property
    def holds_run(self) -> bool:
        """True for what begins every run: other files of these names (weights, a journal) are somebody's own."""
        return self.settings_file.is_file() or (self.journal / "head.json").is_file()

    def check(self, overwrite: bool) -> None:
        """Raises RunExistsError if it holds a run and `overwrite` is false, ConfigError if it holds anything else.

        Nothing but a run is ever overwritten.
        """
        if self.holds_run:
            if not overwrite:
                raise RunExistsError(str(self.path))
            return
        try:
            names = {p.name for p in self.path.iterdir()} - {".lock"} if self.path.exists() else set()
            strangers = sorted(name for name in names if not _HALF_WRITTEN.fullmatch(name))
        except OSError as error:
            raise ConfigError(f"folder {self.path} cannot be used: {error.strerror}", key="output") from None
        if strangers:
            raise ConfigError(
                f"folder {self.path} is not empty and holds no run ({strangers[0]}, ...); choose another --output",
                key="output",
            )

    def clear(self) -> None:
        """Delete the run's own files."""
        for name in (*FILES, *(f"hub/{name}" for name in _HUB)):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            (self.path / "hub").rmdir()
        for name in FOLDERS:
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)

    def sweep(self) -> None:
        """Delete what a killed process left half written. The folder must be locked."""
        for folder in (self.path, self.journal):
            for path in folder.glob(".*.tmp"):
                if _HALF_WRITTEN.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the run and its folder, if nothing else is in it."""
        self.clear()
        (self.path / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def read_settings(self, trust: bool) -> RunSettings:
        """The settings the run began with.

        Raises JournalError if there is no run here, ConfigError if they name code and `trust` is false, or a model
        that nothing but the program that gave it can make again.
        """
        if not self.settings_file.is_file():
            raise JournalError(f"{self.path} holds no run (there is no run.toml in it)")
        values = read_settings(self.settings_file)
        values.pop("trust", None)
        settings = make_settings({**values, "trust": trust})
        if (settings.model or "").startswith(UNNAMED):
            raise ConfigError(
                f"the model of {self.path} was an object in Python and no command can make it again: go on by the "
                "same call of prune with resume=True, load the result by load(..., original=...)",
                key="model",
            )
        if settings.code and not trust:
            raise ConfigError(
                f"{self.settings_file} names code to run ({settings.code[0]!r}); pass --trust if you trust its "
                "author",
                key="trust",
            )
        return settings

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Raises LoadError naming the file."""
        path = self.path / name
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise LoadError(f"{path} is larger than the {MAX_JSON_BYTES} bytes allowed")
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise LoadError(f"{self.path} holds no finished run ({name} is missing)") from None
        except (OSError, ValueError, RecursionError) as error:
            raise LoadError(f"{path} cannot be read: {error}") from None
        if not isinstance(data, dict):
            raise LoadError(f"{path} is damaged: it holds no JSON object")
        return data


def choose_folder(settings: RunSettings, root: Path = Path("runs")) -> Path:
    """A folder that does not exist yet, named after plugin, model, data and target."""
    parts = [settings.plugin, settings.model or "", settings.data, settings.targets[0].strip("%").replace("=", "")]
    words = [re.sub(r"[^A-Za-z0-9.-]+", "-", part.rstrip("/").split("/")[-1]).strip("-.") for part in parts]
    name = "_".join(word for word in words if word)[:120]
    candidate, number = root / name, 1
    while candidate.exists():
        number += 1
        candidate = root / f"{name}_{number}"
    return candidate

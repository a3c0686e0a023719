"""The checkpoints of a run: whole folders that appear by one rename, the last two kept.

checkpoint/000012.000/   before directive 12
checkpoint/000012.003/   inside directive 12, at its third boundary
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prunus.core.errors import JournalError
from prunus.core.files import sync_folder

KEPT = 2
MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{6})\.(\d{3,9})")


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """The state from which directive `next_index` is to be executed, or continued if `boundary` is not 0."""

    next_index: int
    boundary: int
    path: Path


class Checkpoints:
    """All checkpoints in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest_first(self) -> list[Checkpoint]:
        if not self.folder.is_dir():
            return []
        found = [
            Checkpoint(int(match[1]), int(match[2]), path)
            for path in self.folder.iterdir()
            if (match := _NAME.fullmatch(path.name)) and path.is_dir()
        ]
        return sorted(found, reverse=True)

    def write(self, next_index: int, boundary: int, save: Callable[[Path], None]) -> None:
        """Let `save` fill a folder and move it into place. Raises OSError with the older ones untouched."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"{next_index:06d}.{boundary:03d}"
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
            save(temporary)
            (temporary / MANIFEST).write_text(json.dumps(_checksums(temporary), indent=0))
            _sync_tree(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(self.folder)
        for old in self.newest_first()[KEPT:]:
            shutil.rmtree(old.path, ignore_errors=True)

    def restore(
        self, journaled: int, restore: Callable[[Path], None], notice: Callable[[str], None]
    ) -> Checkpoint | None:
        """Restore from the newest checkpoint that works and that the journal reaches; None if there is none.

        A damaged one is reported, and the one before is taken.
        """
        for checkpoint in self.newest_first():
            if checkpoint.next_index > journaled:
                continue
            try:
                _check_manifest(checkpoint.path)
                restore(checkpoint.path)
            except JournalError as error:
                notice(f"checkpoint {checkpoint.path.name} cannot be used ({error}); taking the one before")
                continue
            return checkpoint
        return None

    def forget_after(self, checkpoint: Checkpoint | None) -> None:
        """Remove every checkpoint newer than `checkpoint` (all, if None): they belong to a discarded course."""
        for other in self.newest_first():
            if checkpoint is None or other > checkpoint:
                shutil.rmtree(other.path, ignore_errors=True)
        if self.folder.is_dir():
            for left in self.folder.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as handle:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
    return sums


def _check_manifest(folder: Path) -> None:
    try:
        promised = json.loads((folder / MANIFEST).read_text("utf-8"))
        found = _checksums(folder)
    except (OSError, ValueError) as error:
        raise JournalError(f"{folder / MANIFEST} cannot be read: {error}") from None
    if not isinstance(promised, dict):
        raise JournalError(f"{folder / MANIFEST} is damaged")
    if promised != found:
        wrong = sorted(name for name in {*promised, *found} if promised.get(name) != found.get(name))
        raise JournalError(f"{folder / wrong[0]} is damaged: its checksum does not match")


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder)

"""One process per run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from prunus.core.errors import JournalError


class RunLock:
    """Holds `folder/.lock` while the run goes on; the system lets go of it however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        """Raises JournalError naming the other process if the folder is in use."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise JournalError(
                f"{self._path.parent} is in use by another process (pid {holder}); wait for it, or choose another "
                "--output"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

"""Working through the grid: one process per cell, so many at once, each cell cached under its content."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from prunus.core.compare_protocol import Cell, Protocol
from prunus.core.compare_record import CellRecord, ResultsFolder
from prunus.core.compare_worker import command
from prunus.core.errors import ConfigError, LoadError, PrunusError
from prunus.core.pruning import find_method
from prunus.core.registry import Registry


@dataclass(frozen=True, slots=True)
class Grid:
    """A protocol, where its results go, and how to run a cell of it."""

    protocol: Protocol
    file: Path
    results: ResultsFolder
    registry: tuple[Path, ...] = ()

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Cells without a finished record; failed ones are tried again."""
        found = ((cell, self.results.read(cell, self.protocol.key(cell))) for cell in cells)
        return [cell for cell, record in found if record is None or record.status == "failed"]

    def check(self, cells: Sequence[Cell]) -> None:
        """Raises ConfigError naming the entry if a name or a setting of its method is wrong; nothing has run yet.

        What else is wrong with a method becomes the record of its cells, and the other entries run.
        """
        registry = Registry.discover(self.registry)
        registry.entry("adapters", self.protocol.adapter)
        different = {(cell.entry.name, cell.teaching): cell for cell in cells if cell.entry.plugin is not None}
        for cell in different.values():
            try:
                find_method(self.protocol.settings(cell, None), registry)
            except ConfigError as error:
                raise ConfigError(f"{self.file}, entry {cell.entry.name!r}: {error}", key="entries") from None
            except PrunusError:
                continue

    def forget(self, cells: Sequence[Cell]) -> None:
        """Delete the records of `cells`."""
        for cell in cells:
            self.results.cell_file(self.protocol.key(cell)).unlink(missing_ok=True)

    def run(self, cells: Sequence[Cell], jobs: int, finished: Callable[[CellRecord], None]) -> None:
        """Train what dense models `cells` start from, then run them, `jobs` at a time.

        `finished` is called in this thread after each cell, failed or not. Raises LoadError if a dense model
        cannot be trained. SIGINT and SIGTERM end the children and raise KeyboardInterrupt: finished cells stay
        on disk, the rest is for the next call.
        """
        processes = _Processes(self._environment)
        with _termination_interrupts(), ThreadPoolExecutor(jobs) as pool:
            try:
                seeds = list(dict.fromkeys(cell.seed for cell in cells))
                for done in as_completed([pool.submit(self._train_dense, processes, seed) for seed in seeds]):
                    done.result()
                for record in as_completed([pool.submit(self._run_cell, processes, cell) for cell in cells]):
                    finished(record.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                processes.stop()
                raise

    @property
    def _environment(self) -> dict[str, str]:
        """Libraries that start threads before they read settings take the protocol's number as well."""
        threads = str(self.protocol.dense_settings(self.protocol.seeds[0]).threads or 1)
        return {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }

    def _train_dense(self, processes: _Processes, seed: int) -> None:
        if self.results.read_dense(self.protocol.dense_key(seed)) is not None:
            return
        words = command(self.file, self.results.path, self.registry, seed=seed)
        code, said = processes.run(words)
        if code:
            raise LoadError(f"the dense model of seed {seed} could not be trained: {said or f'exit code {code}'}")

    def _run_cell(self, processes: _Processes, cell: Cell) -> CellRecord:
        key = self.protocol.key(cell)
        self.forget([cell])
        code, said = processes.run(command(self.file, self.results.path, self.registry, cell=cell.name))
        record = self.results.read(cell, key)
        if record is None:  # killed, out of memory: it could not say so itself
            record = CellRecord.failure(cell, key, f"its process ended with code {code}: {said or 'no word'}")
            self.results.write(record)
        return record


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM does what SIGINT does, so that no child outlives this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, 130)
"""Ctrl-C reaches the children first: what they leave behind is no failure."""


class _Processes:
    """Children that can all be stopped."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, words: Sequence[str]) -> tuple[int, str]:
        """(exit code, last line on stderr). Raises KeyboardInterrupt if interrupted, or after `stop`."""
        with self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            child = subprocess.Popen(
                words, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            self._running.add(child)
        _, said = child.communicate()
        with self._lock:
            self._running.discard(child)
            if self._stopped or child.returncode in _INTERRUPTED:
                raise KeyboardInterrupt
        return child.returncode, (said.strip().splitlines() or [""])[-1]

    def stop(self) -> None:
        """End what runs, gently first."""
        with self._lock:
            self._stopped = True
            children = list(self._running)
        for child in children:
            child.terminate()
        deadline = time.monotonic() + 5
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()

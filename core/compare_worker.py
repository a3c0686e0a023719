"""One process of a comparison: trains one dense model or runs one cell, and always leaves a record."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from prunus.core.compare_cell import run_cell, train_dense
from prunus.core.compare_protocol import Protocol, read_protocol
from prunus.core.compare_record import CellRecord, ResultsFolder
from prunus.core.errors import PrunusError
from prunus.core.registry import Registry


def command(
    protocol: Path, output: Path, registry: Sequence[Path], *, cell: str | None = None, seed: int | None = None
) -> list[str]:
    """The words that run one cell, or train one dense model, in a process of its own."""
    work = ["--cell", cell] if cell is not None else ["--dense", str(seed)]
    files = [word for path in registry for word in ("--registry", str(path))]
    return [sys.executable, "-m", "prunus.core.compare_worker", str(protocol), str(output), *work, *files]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare_worker")
    parser.add_argument("protocol", type=Path)
    parser.add_argument("output", type=Path)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--cell")
    work.add_argument("--dense", type=int)
    parser.add_argument("--registry", type=Path, action="append", default=[])
    given = parser.parse_args(words)
    protocol, results = read_protocol(given.protocol), ResultsFolder(given.output)
    registry = Registry.discover(given.registry)
    if given.cell is None:
        return _guarded(lambda: train_dense(protocol, given.dense, results, registry))
    cell = next(cell for cell in protocol.cells if cell.name == given.cell)
    folder = rivals_folder(protocol, given.protocol)
    return _guarded(
        lambda: run_cell(protocol, cell, results, registry, folder),
        lambda text: results.write(CellRecord.failure(cell, protocol.key(cell), text)),
    )


def rivals_folder(protocol: Protocol, file: Path) -> Path | None:
    """Where the protocol's rivals are imported from."""
    return None if protocol.import_from is None else (file.parent / protocol.import_from).resolve()


def _guarded(work: Callable[[], object], failed: Callable[[str], None] | None = None) -> int:
    """Do the work; an error becomes one line on stderr and, for a cell, its record."""
    try:
        work()
    except Exception as error:  # rivals may fail in any way they like
        text = str(error) if isinstance(error, PrunusError) else f"{type(error).__name__}: {error}"
        text = " ".join(text.split())[:2000]
        if not isinstance(error, PrunusError) or os.environ.get("PRUNUS_DEBUG"):
            traceback.print_exc()
        print(text, file=sys.stderr)
        if failed is not None:
            failed(text)
        return error.exit_code if isinstance(error, PrunusError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

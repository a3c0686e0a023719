"""`optimize compare`: a protocol's grid, run as far as it is not there yet, and its table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunus.core.streams import stdout_for_json

if TYPE_CHECKING:
    from prunus.core.compare_grid import Grid
    from prunus.core.compare_protocol import Cell
    from prunus.core.compare_table import Results


def compare(
    protocol: Annotated[Path, typer.Argument(help="The protocol, a TOML file.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the results \\[runs/compare-NAME].", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Cells that run at the same time.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Only cells whose name matches, such as '*/macs=25%/*/seed0'. Repeatable."),
    ] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run the selected cells again.")] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Run nothing: name each cell, its state and its command.")
    ] = False,
    registry: Annotated[
        list[Path] | None,
        typer.Option("--registry", help="Further registry file. Repeatable.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")
    ] = False,
) -> int:
    """Compare methods and rivals on one protocol: same data, same compute, every seed.

    Finished cells are kept: call again to go on after a stop. A protocol may name code to run (rivals): run
    those of authors you trust.
    """
    from prunus.core.compare_grid import Grid
    from prunus.core.compare_protocol import read_protocol
    from prunus.core.compare_record import ResultsFolder

    with stdout_for_json(as_json) as out:
        plan = read_protocol(protocol)
        cells = plan.select(only or ())
        folder = _free(output or Path("runs") / f"compare-{protocol.stem}")
        grid = Grid(plan, protocol, ResultsFolder(folder), tuple(registry or ()))
        words = ["optimize", "compare", str(protocol), "--output", str(folder)]
        words += [word for path in registry or () for word in ("--registry", str(path))]
        again = f"{shlex.join(words)} --only CELL --rerun"
        if list_:
            out.write(_listed(grid, cells, again, as_json))
            return 0
        failed = _run(grid, cells, again, jobs, rerun)
        table = _write_tables(grid, again)
        _write_plots(grid, again)
        out.write(_summary(grid, cells, failed) if as_json else table)
    return 1 if failed else 0


def _free(folder: Path) -> Path:
    """`folder`, unless a run lies there: its files are not for a comparison to write among."""
    from prunus.core.errors import ConfigError
    from prunus.core.run_folder import RunFolder

    if RunFolder(folder).settings_file.exists():
        raise ConfigError(f"folder {folder} holds a run; choose another --output for the comparison", key="output")
    return folder


def _run(grid: Grid, cells: tuple[Cell, ...], again: str, jobs: int, rerun: bool) -> list[str]:
    """Run what is missing; returns the names of the cells that failed."""
    from prunus.core.compare_record import CellRecord
    from prunus.core.display import duration
    from prunus.core.run_lock import RunLock

    grid.check(cells if rerun else grid.missing(cells))
    grid.results.create()
    failed: list[str] = []
    with RunLock(grid.results.path):
        if rerun:
            grid.forget(cells)
        missing = {cell.name: cell for cell in grid.missing(cells)}
        done = len(cells) - len(missing)
        _tell(f"{done} of {len(cells)} cells are there already{_left(grid, missing.values(), jobs)}")

        def finished(record: CellRecord) -> None:
            nonlocal done
            done += 1
            missing.pop(record.cell)
            if record.outcome is None:
                failed.append(record.cell)
                text = f"failed: {record.error}; again: {again.replace('CELL', shlex.quote(record.cell))}"
            else:
                text = f"{100 * record.outcome.accuracy:.2f}% in {duration(record.seconds)}"
            _tell(f"[{done}/{len(cells)}] {record.cell}: {text}{_left(grid, missing.values(), jobs)}")
            _write_tables(grid, again)

        try:
            grid.run(list(missing.values()), jobs, finished)
        except KeyboardInterrupt:
            _tell(f"stopped; {done} of {len(cells)} cells are kept, the same command goes on")
            raise
    return failed


def _left(grid: Grid, missing: Collection[Cell], jobs: int) -> str:
    """How long the rest takes, as far as that can be told."""
    from prunus.core.compare_forecast import seconds_left
    from prunus.core.display import duration

    seconds = seconds_left(list(missing), grid.results.read_all(grid.protocol)) if missing else None
    return "" if seconds is None else f"; about {duration(seconds / min(jobs, len(missing)))} left"


def _results(grid: Grid, again: str) -> Results:
    from prunus.core.compare_table import Results

    return Results(grid.protocol, tuple(grid.results.read_all(grid.protocol)), again)


def _write_tables(grid: Grid, again: str) -> str:
    """table.md, table.json and table.csv of all that is there; returns the first."""
    from prunus.core.compare_table import as_csv, as_json, markdown
    from prunus.core.files import write_atomically

    results, folder = _results(grid, again), grid.results.path
    text = markdown(results)
    write_atomically(folder / "table.md", text)
    write_atomically(folder / "table.json", as_json(results))
    write_atomically(folder / "table.csv", as_csv(results))
    return text


def _write_plots(grid: Grid, again: str) -> None:
    """plot.svg, and budgets.svg where several budgets train, if matplotlib is there; the tables stand without."""
    from prunus.core.compare_plot import budgets_svg, macs_svg
    from prunus.core.errors import MissingDependencyError
    from prunus.core.files import write_atomically

    results, folder = _results(grid, again), grid.results.path
    try:
        write_atomically(folder / "plot.svg", macs_svg(results))
        if sum(epochs > 0 for epochs in grid.protocol.epochs) > 1:
            write_atomically(folder / "budgets.svg", budgets_svg(results))
    except MissingDependencyError as error:
        _tell(str(error))


def _listed(grid: Grid, cells: tuple[Cell, ...], again: str, as_json: bool) -> str:
    rows: list[dict[str, Any]] = []
    for cell in cells:
        record = grid.results.read(cell, grid.protocol.key(cell))
        state = record.status if record is not None else "missing"
        command = again.replace("CELL", shlex.quote(cell.name))
        rows.append({"cell": cell.name, "key": grid.protocol.key(cell), "status": state, "command": command})
    if as_json:
        return json.dumps({"cells": rows}) + "\n"
    return "".join(f"{row['status']:8}{row['command']}\n" for row in rows)


def _summary(grid: Grid, cells: tuple[Cell, ...], failed: list[str]) -> str:
    folder = grid.results.path
    facts = {
        "output": str(folder),
        "cells": len(cells),
        "done": len(cells) - len(grid.missing(cells)),
        "failed": failed,
        "table": str(folder / "table.json"),
    }
    return json.dumps(facts) + "\n"


def _tell(text: str) -> None:
    typer.echo(text, err=True)

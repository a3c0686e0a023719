"""`optimize latency`: how much faster a finished run's model really is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunus.core.streams import stdout_for_json

if TYPE_CHECKING:
    from prunus.core.latency import LatencyComparison, Timing


def latency(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    batch: Annotated[int, typer.Option("--batch", min=1, max=65_536, help="Images per forward pass.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=4096, help="Threads \\[the run's].", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=100_000, help="Samples of each model.")] = 30,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", show_default=False)] = None,
    registry: Annotated[
        list[Path] | None, typer.Option("--registry", help="Further registry file.", show_default=False)
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Allow a run folder to name code (python:...).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Time the original model and the pruned one in turns, on this machine."""
    from prunus.core.errors import ConfigError
    from prunus.core.finished import image_size, read_report, settings_for
    from prunus.core.latency import Stopwatch
    from prunus.core.registry import Registry

    finished = read_report(run)
    size = image_size(finished)
    macs_share = finished.pruned.macs / max(finished.dense.macs, 1)
    settings = settings_for(run, trust, data="none", device=device)
    with stdout_for_json(as_json) as out:
        session: object = Registry.discover(registry or ()).adapter(settings.adapter)(settings)
        if not isinstance(session, Stopwatch):
            raise ConfigError(f"adapter {settings.adapter!r} cannot time models", key="adapter")
        found = session.compare_latency(run, size, batch=batch, threads=threads, repeats=repeats, dtype=dtype)
        if as_json:
            out.write(json.dumps({"run": str(run), **_facts(found, macs_share)}) + "\n")
        else:
            _show(found, macs_share)
    return 0


def _facts(found: LatencyComparison, macs_share: float) -> dict[str, Any]:
    return {
        "batch": found.batch,
        "threads": found.threads,
        "dtype": found.dtype,
        "device": found.device,
        "dense": _seconds(found.dense),
        "pruned": _seconds(found.pruned),
        "ratio": found.ratio,
        "ratio_quartiles": list(found.ratio_quartiles),
        "fastest_ratio": found.pruned.fastest / found.dense.fastest,
        "noisy": found.noisy,
        "speedup": 1 / found.ratio,
        "macs_share": macs_share,
        "won_per_macs": found.won_per_macs(macs_share),
    }


def _seconds(timing: Timing) -> dict[str, Any]:
    return {
        "median": timing.median,
        "fastest": timing.fastest,
        "quartiles": list(timing.quartiles),
        "samples": len(timing.samples),
    }


def _show(found: LatencyComparison, macs_share: float) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"batch {found.batch}, {found.threads} threads, {found.dtype}, {found.device}"
    table = Table(title=f"Latency ({where})", title_justify="left")
    for column in ("", "median", "half of the samples between", "fastest"):
        table.add_column(column, justify="right" if column else "left")
    for name, timing in (("dense", found.dense), ("pruned", found.pruned)):
        low, high = timing.quartiles
        table.add_row(name, _ms(timing.median), f"{_ms(low)} and {_ms(high)}", _ms(timing.fastest))
    low, high = found.ratio_quartiles
    fastest = found.pruned.fastest / found.dense.fastest
    table.add_row("pruned / dense", f"{found.ratio:.1%}", f"{low:.1%} and {high:.1%}", f"{fastest:.1%}")
    console = Console(highlight=False)
    console.print(table)
    won = found.won_per_macs(macs_share)
    per = "" if won is None else f"; latency won per MACs removed: {won:.2f}"
    console.print(f"{1 / found.ratio:.2f} times as fast with {macs_share:.1%} of the MACs{per}")
    if found.noisy:
        console.print("note: the samples scatter; the machine was busy. Repeat when it is idle.", style="yellow")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"

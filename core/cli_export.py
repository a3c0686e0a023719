"""`optimize export`: a finished run as a file that other runtimes read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prunus.core.streams import stdout_for_json

if TYPE_CHECKING:
    from prunus.core.export import ExportReport
    from prunus.core.settings import RunSettings


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    form: Annotated[
        Literal["onnx", "program"],
        typer.Option("--format", help="onnx, or program: a torch.export archive (.pt2)."),
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write [RUN/model.onnx].", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Check on these images instead of the run's; none: random alone.", show_default=False
        ),
    ] = None,
    registry: Annotated[
        list[Path] | None, typer.Option("--registry", help="Further registry file.", show_default=False)
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Allow a run folder to name code (python:...).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Write a finished run's model for other runtimes, and prove that the file answers alike."""
    from prunus.core.errors import ConfigError
    from prunus.core.export import SUFFIXES, Exporter
    from prunus.core.finished import read_report, settings_for

    size = read_report(run).input_size
    settings = settings_for(run, trust, data=data)
    with stdout_for_json(as_json) as out:
        session = _opened(settings, registry, fixed_data=data is not None)
        if not isinstance(session, Exporter):
            raise ConfigError(f"adapter {settings.adapter!r} cannot export models", key="adapter")
        report = session.export(run, output or run / f"model{SUFFIXES[form]}", form, size)
        if as_json:
            out.write(json.dumps({"run": str(run), **_facts(report)}) + "\n")
        else:
            _show(report)
    return 0


def _opened(settings: RunSettings, registry: list[Path] | None, *, fixed_data: bool) -> object:
    """The session on the run's data; without, if they are not on this machine."""
    from prunus.core.errors import LoadError
    from prunus.core.registry import Registry

    open_session = Registry.discover(registry or ()).adapter(settings.adapter)
    try:
        return open_session(settings)
    except LoadError as error:
        if fixed_data or settings.data == "none":
            raise
        print(f"optimize: compared on random images alone ({error})", file=sys.stderr)
        return open_session(settings.model_copy(update={"data": "none"}))


def _facts(report: ExportReport) -> dict[str, Any]:
    from prunus.core.export import TOLERANCE

    return {
        "file": str(report.path),
        "format": report.format,
        "bytes": report.bytes,
        "dynamic_batch": report.dynamic_batch,
        "max_error": report.max_error,
        "tolerance": TOLERANCE,
        "checks": [
            {"inputs": c.inputs, "batch": c.batch, "max_error": c.max_error, "scale": c.scale}
            for c in report.checks
        ],
        "notes": list(report.notes),
    }


def _show(report: ExportReport) -> None:
    from rich.console import Console

    from prunus.core.display import human

    console = Console(highlight=False)
    batch = "any batch size" if report.dynamic_batch else "one batch size"
    console.print(f"[bold]{report.path}[/]: {report.format}, {human(report.bytes, 'B')}, {batch}", soft_wrap=True)
    for check in report.checks:
        console.print(
            f"  {check.inputs} images, batch {check.batch}: differs by at most {check.relative_error:.1e} "
            "of the largest output"
        )
    for note in report.notes:
        console.print(f"  note: {note}", style="yellow")

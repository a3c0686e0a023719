"""`optimize export`: a finished run as a file that other runtimes read, or a folder for a model hub."""

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
        Literal["onnx", "program", "hub"],
        typer.Option(
            "--format",
            help="onnx; program: a torch.export archive (.pt2); hub: a folder with weights and model card.",
        ),
    ] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option("--output", help="File or folder \\[RUN/model.onnx, RUN/hub...].", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", help="With --format hub: upload to OWNER/NAME as well.", show_default=False),
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
    from prunus.core.export import OUTPUTS, Exporter, Publisher
    from prunus.core.finished import image_size, read_report, settings_for

    if push is not None and (form != "hub" or push.count("/") != 1):
        raise ConfigError(f"--push {push} takes OWNER/NAME, and --format hub", key="push")
    size = image_size(read_report(run))
    settings = settings_for(run, trust, data=data)
    path = _free(output or run / OUTPUTS[form], form)
    with stdout_for_json(as_json) as out:
        session = _opened(settings, registry, fixed_data=data is not None)
        if not isinstance(session, Exporter):
            raise ConfigError(f"adapter {settings.adapter!r} cannot export models", key="adapter")
        report = session.export(run, path, form, size)
        address = None
        if push is not None:
            if not isinstance(session, Publisher):
                raise ConfigError(f"adapter {settings.adapter!r} cannot upload models", key="push")
            address = session.publish(report.path, push)
        if as_json:
            out.write(json.dumps({"run": str(run), **_facts(report), "address": address}) + "\n")
        else:
            _show(report, address)
    return 0


def _free(path: Path, form: str) -> Path:
    """`path`, if an export may go there. Raises ConfigError for what a run is made of, and a folder for a file."""
    from prunus.core.errors import ConfigError
    from prunus.core.run_folder import RunFolder

    # where a link lies and where it leads to
    for place in (path.parent.resolve() / path.name, path.resolve()):
        for folder in (place, *place.parents):
            own = place.relative_to(folder).parts[:1]
            run = RunFolder(folder)
            lies_here = run.settings_file.is_file() and (run.finished or run.journal.is_dir())
            if lies_here and (not own or own[0] in _run_files()):
                raise ConfigError(
                    f"--output {path} belongs to the run in {folder}, which no export may change; choose another",
                    key="output",
                )
    if form != "hub" and path.is_dir():
        raise ConfigError(f"--output {path} is a folder; --format {form} writes a file", key="output")
    return path


def _run_files() -> set[str]:
    """What a run is made of; not what was exported from it."""
    from prunus.core.export import OUTPUTS
    from prunus.core.run_folder import FILES, FOLDERS

    exports = {name for output in OUTPUTS.values() for name in (output, f"{output}.data")}
    return {*FILES, *FOLDERS, ".lock"} - exports


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


def _show(report: ExportReport, address: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    from prunus.core.display import human

    console = Console(highlight=False, markup=False, emoji=False)
    batch = "any batch size" if report.dynamic_batch else "one batch size"
    facts = f": {report.format}, {human(report.bytes, 'B')}, {batch}"
    console.print(Text.assemble((str(report.path), "bold"), facts), soft_wrap=True)
    for check in report.checks:
        console.print(
            f"  {check.inputs} images, batch {check.batch}: differs by at most {check.relative_error:.1e} "
            "of the largest output"
        )
    for note in report.notes:
        console.print(f"  note: {note}", style="yellow")
    if report.format == "hub":
        console.print(f'  in Python: prunus.adapters.pytorch.from_pretrained("{report.path}")', soft_wrap=True)
    if address is not None:
        console.print(f"  pushed to {address}", soft_wrap=True)

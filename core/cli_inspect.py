"""`optimize inspect`, `evaluate` and `report`: looking at a model and at finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunus.core.streams import stdout_for_json

if TYPE_CHECKING:
    from prunus.core.adapter import Session
    from prunus.core.graph import ChannelGraph

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Registries = Annotated[
    list[Path] | None, typer.Option("--registry", help="Further registry file.", show_default=False)
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow a run folder to name code (python:...).")]


def inspect(
    model: Annotated[
        str, typer.Argument(help="timm/NAME, torchvision/NAME, prunus/NAME or python:module:factory.")
    ],
    pretrained: Annotated[bool, typer.Option("--pretrained", help="With published weights.")] = False,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", show_default=False)] = None,
    data: Annotated[str, typer.Option("--data", help="Resize input and classifier to this data.")] = "none",
    img_size: Annotated[int | None, typer.Option("--img-size", show_default=False)] = None,
    adapter: Annotated[str, typer.Option("--adapter")] = "pytorch",
    slices: Annotated[
        bool, typer.Option("--slices", help="List the tensors of every group (with --json).")
    ] = False,
    registry: Registries = None,
    as_json: Json = False,
) -> int:
    """Show what can be pruned in a model, what is locked and why, and what it costs."""
    from prunus.core.settings import make_settings

    values: dict[str, Any] = {"model": model, "pretrained": pretrained, "data": data, "adapter": adapter}
    values |= {k: v for k, v in (("checkpoint", checkpoint), ("img_size", img_size)) if v is not None}
    settings = make_settings(values)
    with stdout_for_json(as_json) as out:
        session = _open(settings, registry)
        if as_json:
            out.write(json.dumps(_inspection(session, slices)) + "\n")
        else:
            from rich.console import Console

            from prunus.core.display_graph import graph_tables

            Console().print(graph_tables(session.describe(), session.graph, slices))
    return 0


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Other data of the same classes.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option("--device", show_default=False)] = None,
    registry: Registries = None,
    trust: Trust = False,
    as_json: Json = False,
) -> int:
    """Load a finished run and measure its accuracy on the test split."""
    from prunus.core.errors import ConfigError
    from prunus.core.finished import read_report, settings_for

    finished = read_report(run)
    settings = settings_for(run, trust, data=data, device=device)
    if settings.data == "none":
        why = f"{run} was made without data" if data is None else "--data none leaves nothing to evaluate on"
        raise ConfigError(f"{why}; name labelled data with --data", key="data")
    with stdout_for_json(as_json) as out:
        session = _open(settings, registry)
        if not session.has_labels:
            raise ConfigError(
                f"there is nothing to evaluate without labels, and {settings.data} has none; name labelled data "
                "with --data",
                key="data",
            )
        session.load(run)
        tested = session.test()
        assert tested is not None
        facts = {
            "run": str(run),
            "model": finished.model,
            "accuracy": tested.accuracy,
            "loss": tested.loss,
            "samples": tested.samples,
            "macs": finished.pruned.macs,
            "params": finished.pruned.params,
            "bytes": finished.pruned.bytes,
        }
        if as_json:
            out.write(json.dumps(facts) + "\n")
        else:
            from rich.console import Console
            from rich.text import Text

            from prunus.core.display import human

            size = f"{human(finished.pruned.macs)} MACs, {human(finished.pruned.params)} parameters"
            said = Text.assemble(
                f"{finished.model}: ",
                (f"{tested.accuracy:.2%}", "bold"),
                f" of {tested.samples:,} test images (loss {tested.loss:.4f}), {size}",
            )
            Console().print(said, soft_wrap=True)
    return 0


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    as_json: Json = False,
) -> int:
    """Show a finished run again, and rebuild its report.html."""
    from prunus.core.finished import read_report
    from prunus.core.report_page import write_page

    finished = read_report(run)
    write_page(finished, run / "report.html")
    if as_json:
        typer.echo(json.dumps(finished.for_scripts()))
    else:
        from rich.console import Console

        from prunus.core.display import summary

        Console().print(summary(finished))
    return 0


def _open(settings: Any, registry: list[Path] | None) -> Session:
    from prunus.core.registry import Registry

    return Registry.discover(registry or ()).adapter(settings.adapter)(settings)


def _inspection(session: Session, slices: bool) -> dict[str, Any]:
    from prunus.core.allocation import reachable

    description, graph = session.describe(), session.graph
    cost, shares = graph.cost(), reachable(graph)
    return {
        "model": description.model,
        "input_size": list(description.input_size),
        "macs": int(cost.macs),
        "params": int(cost.params),
        "bytes": int(cost.bytes),
        "reachable": {"macs": shares["macs"], "params": shares["params"]},
        "groups": _groups(graph, slices),
        "blocks": list(graph.blocks),
        "kernels": list(graph.kernels),
        "notes": list(description.notes),
    }


def _groups(graph: ChannelGraph, slices: bool) -> list[dict[str, Any]]:
    rows = []
    for name, group in graph.groups.items():
        row: dict[str, Any] = {
            "name": name,
            "units": group.units,
            "min_units": group.min_kept,
            "multiple_of": group.multiple_of,
            "equal_count": group.equal_count,
            "locked": group.locked,
        }
        if slices:
            row["slices"] = [
                {"tensor": s.tensor, "axis": s.axis, "role": s.role, "unit_of": s.unit_of.tolist()}
                for s in group.slices
            ]
        rows.append(row)
    return rows

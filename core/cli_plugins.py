"""`optimize plugins`: what is registered, from where, with which settings, and whether it keeps its contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prunus.core.registry import Entry, Kind, Registry

app = typer.Typer(help="Methods, estimators and adapters: list, show, check.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Registries = Annotated[
    list[Path] | None, typer.Option("--registry", help="Further registry file.", show_default=False)
]


@app.command("list")
def list_(registry: Registries = None, as_json: Json = False) -> None:
    """List everything that is registered, with its origin; what is broken says why."""
    from prunus.core.registry import KINDS, NOUNS, Registry

    found = Registry.discover(registry or ())
    rows = [(entry, found.broken(entry)) for kind in KINDS for entry in found.entries(kind)]
    if as_json:
        typer.echo(json.dumps({"entries": [_facts(entry, error) for entry, error in rows]}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("kind", "name", "what it does", "from"):
        table.add_column(column, overflow="fold")
    for entry, error in rows:
        says = Text(entry.summary) if error is None else Text(f"broken: {error}", style="red")
        table.add_row(NOUNS[entry.kind], Text(entry.name, style="bold"), says, Text(entry.source))
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A plugin's or estimator's name, or package.module:Class.")],
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of its settings.")] = False,
    registry: Registries = None,
    as_json: Json = False,
) -> None:
    """Show a plugin's settings: keys, types, defaults, bounds, meaning."""
    from prunus.core.plugin_settings import describe_config
    from prunus.core.registry import Registry

    found = Registry.discover(registry or ())
    kind = _kind_of(found, name)
    entry = found.entry(kind, name)
    plugin = found.policy(name) if kind == "plugins" else found.estimator(name)
    if schema:
        typer.echo(json.dumps(plugin.Config.model_json_schema(), indent=1))
        return
    rows = describe_config(plugin.Config)
    if as_json:
        facts = _facts(entry, None) | {"settings": rows, "schema": plugin.Config.model_json_schema()}
        typer.echo(json.dumps(facts, default=str))
        return
    _print_settings(entry, (plugin.__doc__ or "").strip(), rows)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A plugin's or estimator's name, or package.module:Class.")],
    registry: Registries = None,
    as_json: Json = False,
) -> int:
    """Run the contract kit on a plugin."""
    from prunus.core.registry import Registry
    from prunus.core.testing.contract import check_estimator_contract, check_policy_contract

    found = Registry.discover(registry or ())
    kind = _kind_of(found, name)
    if kind == "plugins":
        results = check_policy_contract(found.policy(name), name)
    else:
        results = check_estimator_contract(found.estimator(name), name)
    broken = [result for result in results if result.problem is not None]
    if as_json:
        rules = [{"rule": result.rule, "problem": result.problem} for result in results]
        typer.echo(json.dumps({"name": name, "kind": kind, "passed": not broken, "rules": rules}))
    else:
        for result in results:
            typer.echo(f"  {'ok    ' if result.problem is None else 'BROKEN'}  {result.rule}")
            if result.problem is not None:
                typer.echo(f"          {result.problem}")
        typer.echo(f"{name}: {len(results) - len(broken)} of {len(results)} rules kept")
    return 1 if broken else 0


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(help="Small letters, digits and dashes: the name in --plugin or --importance.")
    ],
    kind: Annotated[str, typer.Option("--kind", help="What it offers: importance or plugin.")] = "importance",
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder \\[prunus-NAME].", show_default=False)
    ] = None,
) -> None:
    """Write a package of your own, ready to install: a class, its entry point, a test that runs the kit."""
    from prunus.core.errors import ConfigError
    from prunus.core.scaffold import scaffold

    if kind not in ("importance", "plugin"):
        raise ConfigError(f"--kind {kind!r} must be importance or plugin", key="kind")
    folder = output or Path(f"prunus-{name}")
    for path in scaffold(name, "importance" if kind == "importance" else "plugins", folder):
        typer.echo(path)
    typer.echo(f"Next: pip install -e {folder} && optimize plugins check {name}")


def _kind_of(registry: Registry, name: str) -> Kind:
    """Which kind has that name; a direct target is looked at. Raises UnknownNameError with the nearest names."""
    from prunus.core.errors import PluginError, UnknownNameError

    if ":" in name:
        try:
            registry.policy(name)
        except PluginError:
            return "importance"
        return "plugins"
    if name in registry.names("plugins"):
        return "plugins"
    if name in registry.names("importance"):
        return "importance"
    raise UnknownNameError(
        "plugin or estimator", name, (*registry.names("plugins"), *registry.names("importance"))
    )


def _facts(entry: Entry, error: str | None) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "target": entry.target,
        "summary": entry.summary,
        "source": entry.source,
        "broken": error,
    }


def _print_settings(entry: Entry, about: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{entry.name}[/]  {escape(entry.target)}  (from {escape(entry.source)})", highlight=False)
    console.print(escape(about) + "\n", highlight=False)
    if not rows:
        console.print("It has no settings.")
        return
    table = Table(title="--set KEY=VALUE", title_justify="left")
    for column in ("key", "type", "default", "bounds", "meaning"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(row[column])) for column in ("key", "type", "default", "bounds", "meaning")))
    console.print(table)

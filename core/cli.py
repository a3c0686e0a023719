"""The commands `optimize` and `prunus`, the same program. Only typer is imported until a command runs."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from prunus.core import cli_compare, cli_export, cli_inspect, cli_latency, cli_plugins, cli_prune
from prunus.core.processes import Place

app = typer.Typer(
    name="optimize",
    help="Makes vision models smaller by removing whole channels, with proof that the result is right.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("prune")(cli_prune.prune)
app.command("inspect")(cli_inspect.inspect)
app.command("evaluate")(cli_inspect.evaluate)
app.command("report")(cli_inspect.report)
app.command("export")(cli_export.export)
app.command("latency")(cli_latency.latency)
app.command("compare")(cli_compare.compare)
app.add_typer(cli_plugins.app, name="plugins")


def _version(asked: bool) -> None:
    if asked:
        from prunus.core.pruning import prunus_version

        typer.echo(f"prunus {prunus_version()}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    if debug:
        os.environ["PRUNUS_DEBUG"] = "1"
    if context.invoked_subcommand != "prune":
        _leave_it_to_the_first_process()


def _leave_it_to_the_first_process() -> None:
    """Of several processes that a launcher started, one carries out what is not shared."""
    place = Place.here()
    if not place.first:
        raise typer.Exit
    if not place.alone:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave with its exit code: one clear line on stderr for every error."""
    # `my_module:MyMethod` is looked for here, too; last, so that nothing here hides an installed package
    sys.path.append(os.getcwd())
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code (design, section 8)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in words:  # wherever it stands
        words.remove("--debug")
        words.insert(0, "--debug")
    try:
        result = app(words, prog_name="optimize", standalone_mode=False)
    except typer.Exit as leave:
        return leave.exit_code
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except Exception as error:
        return _failed(error)
    return result if isinstance(result, int) else 0


def _failed(error: Exception) -> int:
    from prunus.core.errors import PrunusError

    if os.environ.get("PRUNUS_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, PrunusError):
        _say(str(error))
        return error.exit_code
    code = getattr(error, "exit_code", None)
    if code is not None and hasattr(error, "format_message"):  # typer's own: a wrong option or argument
        _say(error.format_message())
        return int(code)
    if isinstance(error, OSError) and error.errno is not None:
        _say(f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror}")
        return 1
    _say(f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)")
    return 1


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    who = "optimize" if rank == "0" else f"optimize (process {rank})"
    print(f"{who}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""Command line: one file a noun; each is registered by one line below."""

import logging
import sys
from typing import Annotated, NoReturn

import typer

from . import analyze, compare, container, crossover, device, doctor, image, pool
from .console import WRONG_USAGE, run

__all__ = ["app", "main"]

app = typer.Typer(
    name="blocksnap",
    help="Block-level snapshots: thin pools in user space, images on them, honest write amplification.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("compare", no_args_is_help=False)(compare.compare)
app.command("analyze")(analyze.analyze)
app.command("crossover")(crossover.crossover)
app.command("doctor")(doctor.doctor)
app.add_typer(pool.app, name="pool")
app.add_typer(device.app, name="device")
app.add_typer(image.app, name="image")
app.add_typer(container.app, name="container")

_debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"blocksnap {version('blocksnap')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _global_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("blocksnap").setLevel(logging.DEBUG)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG_USAGE)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the `blocksnap` command and exit with its status."""

    def command() -> object:
        return app(args=arguments, prog_name="blocksnap", standalone_mode=False)

    sys.exit(run(command, debug=lambda: _debug))

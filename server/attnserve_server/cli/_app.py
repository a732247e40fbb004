"""The Typer application of `attnserve-server`: registers every command. Each command is in the module of its group.

The import raises ModuleNotFoundError if a library of the extra `server` is missing.
"""

from __future__ import annotations

from typing import Annotated

import typer

from attnserve_server import __version__
from attnserve_server.cli import check, convert, inspect, plan, recommend, serve, token

app = typer.Typer(name="attnserve-server", no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnserve-server {__version__}")
        raise typer.Exit


@app.callback()
def _attnserve_server(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert ONNX attention models to bundles of a repository, and serve them over gRPC."""


serve.register(app)
convert.register(app)
inspect.register(app)
check.register(app)
recommend.register(app)
plan.register(app)
token.register(app)

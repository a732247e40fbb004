"""`attnserve-server`: the commands, each in a module of its own, and how their failures are told."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from attnserve_server.cli import bring, healthcheck, serve
from attnserve_server.domain.errors import AttnserveError

EXIT_REFUSED = 2
"""As for every command line that cannot be carried out."""

app = typer.Typer(name="attnserve-server", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attnserve-server {metadata.version('attnserve')}")
        raise typer.Exit


@app.callback()
def _attnserve_server(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Serve ONNX attention models over gRPC, and bring them into a repository."""


serve.register(app)
bring.register(app)
healthcheck.register(app)


def main() -> None:
    """Runs the command line. A failure that we know is told in one sentence on standard error, without a traceback."""
    try:
        app()
    except AttnserveError as error:
        typer.echo(f"attnserve-server: {error}", err=True)
        sys.exit(EXIT_REFUSED)

"""The commands of `attnserve-server`, put together. What each does is in the module of its name."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from attnserve_server.cli import check, healthcheck, serve
from attnserve_server.cli import convert as bring

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
check.register(app)
healthcheck.register(app)
